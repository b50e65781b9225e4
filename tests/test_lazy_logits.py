"""The replaced head: losses without logits, and the logits for whoever looks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.interop.head import FusedHead, LazyLogits
from fastgpt.interop.swap import exchange


def heads(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(8, 30, bias=False, dtype=dtype)
    fused = copy.deepcopy(plain)
    exchange(fused, FusedHead)
    return plain, fused, torch.randn(2, 5, 8, dtype=dtype), torch.randint(30, (2, 5))


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that a head calls."""
    called: list[str] = []
    for name in ("linear", "linear_cross_entropy"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: (called.append(n), f(*a, **k))[1])
    return called


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


# --- what people do: the same script on a head and on a replaced one ---

Script = Callable[[nn.Linear, Tensor, Tensor], list[Tensor]]
SCRIPTS: dict[str, Script] = {}


def script(function: Script) -> Script:
    SCRIPTS[function.__name__] = function
    return function


def loss_of(y: Tensor, t: Tensor, **options: str) -> Tensor:
    return F.cross_entropy(y.view(-1, 30), t.view(-1), **options)


def backward(loss: Tensor) -> list[Tensor]:
    loss.backward()
    return [loss]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -3 * dy


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dy


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.mul_(2))
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def _functions(function: Any, change: bool) -> Script:
    def run(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
        y = h(x)
        first = loss_of(y, t)
        if change:
            y[..., 3] = -4.0
        return backward(first + loss_of(function.apply(y), t) + function.apply(y.float()).square().mean())

    return run


def _hooks(where: str, ask: str, when: str) -> Script:
    """Somebody asks for the gradient of logits, of a view or of a copy of them, before or after a loss."""

    def run(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
        y, seen = h(x), list[Tensor]()
        wide = y.float()
        rows = wide.view(-1, 30)
        it = {"root": y, "float": wide, "view": rows}[where]

        def hook(*given: Any) -> None:
            seen.append(given[0][0] if isinstance(given[0], tuple) else given[0])

        def hang() -> None:
            if ask == "hook":
                it.register_hook(lambda dy: (hook(dy), 2 * dy)[1])
            elif ask == "retain":
                it.retain_grad()
            elif ask == "node":
                it.grad_fn.register_prehook(hook)
            elif ask == "multi":
                torch.autograd.graph.register_multi_grad_hook([it], lambda dys: hook(tuple(dys)))

        if when == "before":
            hang()
        loss = F.cross_entropy(rows, t.view(-1)) * 3
        if when == "after":
            hang()
        if ask == "inputs":
            loss.backward(inputs=[it, h.weight])
        elif ask == "grad":
            seen += torch.autograd.grad(loss, [it, h.weight])
        elif ask == "edge":
            seen += torch.autograd.grad(loss, [torch.autograd.graph.get_gradient_edge(it)])
        else:
            loss.backward()
        return [loss, *seen, *([it.grad] if ask in ("retain", "inputs") else [])]

    return run


def _reductions(reduction: str, late: bool) -> Script:
    def run(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
        y = h(x)
        loss = loss_of(y, t, reduction=reduction)
        if late:
            y.retain_grad()
        (loss * torch.arange(1, 1 + loss.numel())).sum().backward()
        return [loss, *([y.grad] if late else [])]

    return run


def _autocast(head: bool, loss: bool, wide: bool, late: bool) -> Script:
    def run(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=head):
            y = h(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=loss):
            z = y.float() if wide else y
            of = loss_of(z, t)
        if late:
            z.retain_grad()
        of.backward()
        return [of, *([z.grad] if late else [])]

    return run


for _f in (Reversed, Cubed, Doubled):
    SCRIPTS |= {f"{_f.__name__}_{change}": _functions(_f, change) for change in (False, True)}
for _where in ("root", "float", "view"):
    for _ask in ("hook", "retain", "node", "multi"):
        SCRIPTS |= {f"{_ask}_{_where}_{when}": _hooks(_where, _ask, when) for when in ("before", "after")}
    SCRIPTS |= {f"{ask}_{_where}": _hooks(_where, ask, "") for ask in ("inputs", "grad", "edge")}
for _late in (False, True):
    SCRIPTS |= {f"{r}_{_late}": _reductions(r, _late) for r in ("none", "sum", "mean")}
    for _wide in (False, True):
        for _on in (False, True):
            for _off in (False, True):
                SCRIPTS[f"autocast_{_on}_{_off}_{_wide}_{_late}"] = _autocast(_on, _off, _wide, _late)


@script
def second_derivatives(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    found = []
    for look in (lambda y: None, lambda y: y.retain_grad(), lambda y: y.exp()):
        y = h(x)
        look(y)
        grads = torch.autograd.grad(loss_of(y, t), [x, y], create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        found += grads
    return found


@script
def several_losses(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    for scale in (1, 2, 3):  # accumulated
        loss = loss_of(h(x * scale), t)
        loss /= 3
        loss += 1
        loss.backward(retain_graph=True)
        loss.backward()
    y = h(x)
    first = loss_of(y, t) + 2 * loss_of(y.float(), t.flip(0), reduction="sum")
    second = loss_of(y, t) + 1e-2 * y.logsumexp(-1).square().mean()
    return backward(first + second)


@script
def changed_after_a_loss(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    wide, rows = y.float(), y.view(-1, 30)
    flat, first = wide.view(-1, 30), loss_of(y, t)
    y.register_hook(lambda dy: dy * 2)
    y *= 2
    y[:, :2].mul_(3)
    torch._foreach_add_([y], 2.0)
    with torch.no_grad():
        y[..., 3] = -5
    F.leaky_relu(y, inplace=True)
    assert y._version == rows._version == 5
    after = F.cross_entropy(rows, t.view(-1)) + F.cross_entropy(flat, t.view(-1))
    return [*backward(first + after), y, wide, rows]


@script
def kept_and_then_changed(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    y.retain_grad()
    y += 1
    return [*backward(loss_of(y, t)), y.grad]


@script
def detached_in_place(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    y.detach_()
    assert not loss_of(y, t).requires_grad
    y.requires_grad_()
    return [*backward(loss_of(y, t)), y.grad]


@script
def without_gradient(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    with torch.no_grad():
        rows, wide, loss = y.view(-1, 30), y.float() * 1, loss_of(y, t)
    with torch.inference_mode():
        best, same = y.argmax(-1), loss_of(y, t)
    losses = [loss, same, loss_of(wide, t)]
    assert not any(of.requires_grad for of in losses)
    losses.append(F.cross_entropy(rows, t.view(-1)))  # views are tied to what they are views of even so
    return [best, *losses, *backward(loss_of(y, t) + losses[-1])]


@script
def metrics_after_the_loss(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    loss = loss_of(y, t)
    with torch.no_grad():
        found = [y.argmax(-1), y.softmax(-1), y[0, 1:3, None], y[:, -1], y.max(-1).values, y.data.clone()]
    found += [torch.from_numpy(y.detach().float().numpy()), torch.stack(list(y)), y.double()]
    return [*backward(loss), *found]


@script
def data_is_the_memory(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    y.data[..., 3] = -5
    y.detach()[..., 4] = 6
    torch.from_dlpack(y.detach())[..., 5] = 7
    return [*backward(loss_of(y, t)), y]


@script
def distilled(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    q = y.detach().softmax(-1)
    first = F.cross_entropy(y.view(-1, 30), q.view(-1, 30)) + loss_of(y, t)
    return backward(first + F.kl_div(F.log_softmax(y.float() / 2, -1), q.float(), reduction="batchmean"))


@script
def nothing_counts(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    return [
        *backward(loss_of(h(x), torch.full_like(t, -100))),
        *backward(loss_of(h(x[:0]), t[:0], reduction="sum")),
    ]


@script
def one_row(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x[0, 0])
    return backward(F.cross_entropy(y, t[0, 0]) + F.cross_entropy(y.view(1, 30), t[0, :1]))


@script
def checkpointed(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    found = []
    for reentrant in (False, True):

        def kept(function: Any, given: Tensor, reentrant: bool = reentrant) -> Tensor:
            return torch.utils.checkpoint.checkpoint(function, given, use_reentrant=reentrant)

        found += backward(loss_of(kept(h, x), t) + kept(lambda x: loss_of(h(x), t), x))
        found += backward(kept(lambda y: loss_of(y, t), h(x)))
    return found


@script
def weight_freed_and_frozen_after_the_call(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    h.weight.requires_grad_(False)
    y = h(x)
    h.weight.requires_grad_(True)
    found = backward(loss_of(y, t))
    assert h.weight.grad is None
    y = h(x)
    h.weight.requires_grad_(False)
    found += backward(loss_of(y, t))
    h.weight.requires_grad_(True)
    return found


@script
def hooks_of_the_module(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    seen = list[Tensor]()
    handles = [
        h.register_full_backward_hook(lambda m, i, o: seen.extend([*i, *o])),
        h.register_forward_hook(lambda m, i, o: o * 2),
    ]
    found = backward(loss_of(h(x), t))
    for handle in handles:
        handle.remove()
    return [*found, *seen]


@script
def packed_and_watched_by_autograd(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda a: a.detach().clone(), lambda a: a),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        return backward(loss_of(h(x), t))


@script
def torch_func(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    found = [torch.vmap(torch.sum)(y), torch.func.grad(lambda y: loss_of(y, t))(y)]
    found.append(torch.func.grad(lambda k: k * loss_of(h(x), t))(torch.ones(())))
    with forward_ad.dual_level():
        return [*found, *forward_ad.unpack_dual(loss_of(forward_ad.make_dual(y, torch.ones_like(y)), t))]


@script
def copies_and_files(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y, file = h(x), io.BytesIO()
    first = backward(loss_of(y, t))
    torch.save({"logits": y}, file)
    file.seek(0)
    found = [
        torch.load(file)["logits"],
        pickle.loads(pickle.dumps(y)),
        copy.deepcopy(y.detach()),
        copy.copy(y),
    ]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(y)
    return [*first, *found, y.share_memory_()]


@script
def what_is_told_of_it(h: nn.Linear, x: Tensor, t: Tensor) -> list[Tensor]:
    y = h(x)
    assert {y: 1}[y] == 1
    assert (y.stride(), y.is_contiguous(), y._version, y.storage_offset()) == ((150, 30, 1), True, 0, 0)
    assert not y.is_leaf
    assert not y._is_view()
    assert y.untyped_storage().nbytes() == y.nbytes
    assert y.data_ptr() == y.detach().data_ptr() == y.untyped_storage().data_ptr() != 0
    for wrong in (lambda: y.numpy(), lambda: y.view(7, -1), lambda: y.requires_grad_(False)):
        with pytest.raises(RuntimeError):
            wrong()
    return backward(loss_of(y, t))


def ran(run: Script, head: nn.Linear, x: Tensor, targets: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    return [*run(head, x, targets), x.grad, head.weight.grad]


@pytest.mark.filterwarnings("ignore")  # what is warned of is the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_people_do(name: str, dtype: torch.dtype) -> None:
    plain, fused, x, targets = heads(dtype)
    expected, got = (ran(SCRIPTS[name], head, x, targets) for head in (plain, fused))
    coarse = dtype == torch.bfloat16 or "autocast" in name
    bounds = {"rtol": 3e-2, "atol": 1e-2} if coarse else {"rtol": 1e-4, "atol": 1e-6}
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.detach().clone(), b.detach(), equal_nan=True, **bounds)


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
