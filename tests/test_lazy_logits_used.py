"""What people do with logits: the same script on a head and on a replaced one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from head_helpers import backward, heads, loss_of
from torch import Tensor, nn

Script = Callable[[nn.Linear, Tensor, Tensor], list[Tensor]]
SCRIPTS: dict[str, Script] = {}


def script(function: Script) -> Script:
    SCRIPTS[function.__name__] = function
    return function


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
