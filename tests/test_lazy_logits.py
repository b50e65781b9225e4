"""The replaced head: losses without logits, and the logits for whoever looks."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from head_helpers import count, heads, loss_of
from torch import Tensor, nn

from fastgpt.interop.head import LazyLogits

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flat": lambda y, t: F.cross_entropy(y.view(-1, 30), t.view(-1)),
    "float": lambda y, t: F.cross_entropy(y.float().view(-1, 30), t.view(-1)),
    "module": lambda y, t: nn.CrossEntropyLoss()(y.view(-1, y.size(-1)), t.view(-1)),
    "reshape": lambda y, t: F.cross_entropy(y.contiguous().reshape(10, 30), t.reshape(-1), reduction="sum"),
    "ignored": lambda y, t: F.cross_entropy(
        y.view((-1, y.shape[-1])), t.view(-1).masked_fill(t.view(-1) < 9, -1), ignore_index=-1
    ),
    "each": lambda y, t: F.cross_entropy(y.view(10, -1), t.view(-1), reduction="none").sum(),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smoothed": lambda y, t: F.cross_entropy(y.view(-1, 30), t.view(-1), label_smoothing=0.1),
    "weighted": lambda y, t: F.cross_entropy(y.view(-1, 30), t.view(-1), weight=torch.arange(30.0)),
    "shifted": lambda y, t: F.cross_entropy(y[:, :-1].reshape(-1, 30), t[:, 1:].reshape(-1)),
    "classes_second": lambda y, t: F.cross_entropy(y.transpose(1, 2), t),
    "probabilities": lambda y, t: F.cross_entropy(y.view(-1, 30), F.one_hot(t.view(-1), 30).float()),
    "other_rows": lambda y, t: F.cross_entropy(y.view(-1, 15), t.view(-1).repeat(2) % 15),
    "sum": lambda y, t: (y * y).sum(),
    "softcap": lambda y, t: F.cross_entropy((5 * torch.tanh(y / 5)).view(-1, 30), t.view(-1)),
    "list": lambda y, t: torch.stack([y, y]).sum() + torch.cat([y, y], 0).square().mean(),
    "in_place": lambda y, t: _masked(y, t),
    "in_place_of_a_view": lambda y, t: _masked(y.view(-1, 30), t),
    "in_place_then_view": lambda y, t: _masked_first(y, t),
    "chunk": lambda y, t: y.chunk(2, -1)[0].exp().sum(),
}


def _masked(y: Tensor, t: Tensor) -> Tensor:
    y[..., 3] = -4.0
    return F.cross_entropy(y.view(-1, 30), t.view(-1))


def _masked_first(y: Tensor, t: Tensor) -> Tensor:
    flat = y.view(-1, 30)
    y[..., 3] = -4.0  # which `flat` sees
    return F.cross_entropy(flat, t.view(-1))


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_whatever_is_done_with_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused, x, targets = heads()
    loss = (LOSSES | OTHERS)[name]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = loss(plain(a), targets)
    expected.backward()
    called = count(monkeypatch)
    got = loss(fused(b), targets)
    assert type(got) is Tensor
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-6)
    assert called == (["linear_cross_entropy"] if name in LOSSES else ["linear"])


def test_bf16_in_float_before_and_after_a_change() -> None:
    """`float` of bf16 is a copy: what is changed in one does not show in the other."""
    plain, fused, x, targets = heads(torch.bfloat16)
    for change_first in (False, True):
        losses = []
        for head in (plain, fused):
            logits = head(x)
            if change_first:
                logits[..., 2] = 7.0
            wide = logits.float()
            wide[..., 3] = -4.0
            losses.append(
                F.cross_entropy(wide.view(-1, 30), targets.view(-1))
                + F.cross_entropy(logits.view(-1, 30), targets.view(-1)).float()
            )
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)


def test_logits_after_the_loss_are_the_logits() -> None:
    plain, fused, x, targets = heads()
    logits, expected = fused(x), plain(x)
    assert isinstance(logits, LazyLogits)
    loss = F.cross_entropy(logits.view(-1, 30), targets.view(-1))
    assert logits._memory.numbers is None
    loss.backward()
    assert (logits.shape, logits.dtype, logits.device, logits.dim(), len(logits)) == (
        expected.shape, torch.float32, x.device, 3, 2,
    )  # fmt: skip
    assert logits.requires_grad
    assert not logits.is_leaf
    assert logits._memory.numbers is None
    for view in (logits, logits.detach(), logits + 0, logits[:], logits.clone()):
        torch.testing.assert_close(view.detach() + 0, expected.detach())
    assert str(logits.argmax(-1)) == str(expected.argmax(-1))
    assert logits.detach().numpy().shape == (2, 5, 30)
    torch.testing.assert_close(torch.tensor(logits.tolist()), expected.detach())


def test_hooks_and_kept_gradients_are_of_the_logits() -> None:
    """Who asks for them before the loss gets them."""
    plain, fused, x, targets = heads()
    results = []
    for head in (plain, fused):
        logits, seen = head(x), list[Tensor]()
        logits.retain_grad()
        logits.register_hook(seen.append)
        F.cross_entropy(logits.view(-1, 30), targets.view(-1)).backward()
        assert logits.grad is not None
        torch.testing.assert_close(seen[0], logits.grad)
        results.append(logits.grad)
    torch.testing.assert_close(results[1], results[0])


def test_the_modes_are_those_of_the_call() -> None:
    plain, fused, x, _ = heads()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        logits = fused(x)
        with mode:
            assert logits.sum().dtype == torch.float32
        assert logits.grad_fn is not None
        assert torch.equal(logits + 0, plain(x)) or torch.allclose(logits + 0, plain(x), 1e-5, 1e-6)
        logits.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    plain, fused, x, _ = heads()
    leaves = []
    for head in (plain, fused):
        leaves.append(x.clone().requires_grad_())
        torch.utils.checkpoint.checkpoint(head, leaves[-1], use_reentrant=reentrant).exp().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad)


def test_copies_and_files_are_of_the_logits() -> None:
    _, fused, x, _ = heads()
    with torch.no_grad():
        assert type(fused(x)) is Tensor  # nothing to be gained without gradients
    expected = (fused(x) + 0).detach()
    detached = fused(x).detach()
    assert torch.equal(pickle.loads(pickle.dumps(detached)), expected)
    file = io.BytesIO()
    torch.save(fused(x).detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)


def test_the_graph_is_seen_from_outside() -> None:
    """As DistributedDataParallel looks for parameters that take part."""
    _, fused, x, _ = heads()
    edges = [edge[0] for edge in fused(x).grad_fn.next_functions if edge[0] is not None]
    assert any(getattr(edge, "variable", None) is fused.weight for edge in edges)


def test_what_passes_by_torch_functions_gets_the_numbers() -> None:
    plain, fused, x, _ = heads()
    with torch._C.DisableTorchFunctionSubclass():
        got = fused(x).exp()
    torch.testing.assert_close(got, plain(x).exp())
    got.sum().backward()
    plain(x).exp().sum().backward()
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad)


def test_logits_after_a_step_are_an_error() -> None:
    """They would be those of the new weights."""
    _, fused, x, targets = heads()
    logits = fused(x)
    F.cross_entropy(logits.view(-1, 30), targets.view(-1)).backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="looked at before their weight changes"):
        logits.argmax(-1)
    with pytest.raises(RuntimeError, match="looked at before their weight changes"):
        F.cross_entropy(logits.view(-1, 30), targets.view(-1))
    seen = fused(x)
    first = seen.detach().clone()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    assert torch.equal(seen.detach(), first)


def test_weights_that_change_unseen_are_an_error() -> None:
    """Through `.data` and from kernels no version tells of it."""
    _, fused, x, targets = heads()
    logits, others = fused(x), fused(x)
    fused.weight.data[7] *= 1.01
    with pytest.raises(RuntimeError, match="looked at before their weight changes"):
        logits.argmax(-1)
    with pytest.raises(RuntimeError, match="looked at before their weight changes"):
        F.cross_entropy(others.view(-1, 30), targets.view(-1))
    logits = fused(x)
    fused.weight.data = fused.weight.data.clone()
    with pytest.raises(RuntimeError, match="looked at before their weight changes"):
        logits.argmax(-1)


@pytest.mark.parametrize("lent", ["class", "fsdp", "zero"])
def test_a_head_whose_weight_is_lent_gives_logits(lent: str) -> None:
    """As to fully_shard, which may make another class of the head, and to ZeRO: they take it away after."""
    _, fused, x, _ = heads()
    if lent == "class":
        fused.__class__ = type("Sharded", (type(fused),), {})
    elif lent == "fsdp":
        fused._is_fsdp_managed_module = True
    else:
        fused.weight.ds_id = 0
    assert type(fused(x)) is Tensor


SHAPES: dict[str, Callable[[Tensor], object]] = {
    "unsqueeze_": lambda y: y.unsqueeze_(0),
    "squeeze_": lambda y: y.squeeze_(),
    "transpose_": lambda y: y.transpose_(0, 1),
    "swapdims_": lambda y: y.swapdims_(0, 1),
    "swapaxes_": lambda y: y.swapaxes_(0, 1),
    "resize_": lambda y: y.detach_().resize_(3),
    "as_strided_": lambda y: y.as_strided_((2,), (1,)),
    "set_": lambda y: y.detach_().set_(torch.zeros(3)),
    "data": lambda y: setattr(y, "data", torch.zeros(2, 5, 30)),
}


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_memory_are_not_exchanged(name: str, looked: bool) -> None:
    _, fused, x, _ = heads()
    logits = fused(x)
    if looked:
        logits.sum()
    with pytest.raises(RuntimeError, match="computed on first use"):
        SHAPES[name](logits)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # it runs that part as it is
def test_what_is_compiled_gets_the_numbers() -> None:
    plain, fused, x, targets = heads()
    for part in (lambda y: y, lambda y: y[:, 1:]):
        found = []
        for head in (plain, fused):
            torch._dynamo.reset()
            function = torch.compile(
                lambda y, t: F.cross_entropy(y.reshape(-1, 30), t.reshape(-1)), backend="aot_eager"
            )
            logits = part(head(x))
            found.append(function(logits, targets[:, : logits.shape[1]]))
            found[-1].backward()
        torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad)


def test_no_cycles_keep_the_graph() -> None:
    """The memory goes when the last reference does, whatever was done with them."""
    _, fused, x, targets = heads()
    gc.disable()
    try:
        for kept in (
            lambda y: y.detach(),
            lambda y: loss_of(y, targets).detach(),
            lambda y: y.argmax(-1),
            str,
        ):
            hidden = x.clone().requires_grad_() * 1
            node, logits = weakref.ref(hidden), fused(hidden)
            result = kept(logits)
            del hidden, logits
            assert node() is None, result
    finally:
        gc.enable()
