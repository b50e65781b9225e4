"""The dropout of attention under `fastgpt.patch`: how much, where, of which generator, and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import (
    called,
    check_agrees,
    check_same,
    modules,
    results,
    shaken,
)
from torch import Tensor, nn

import fastgpt


def shown(p: float) -> nn.MultiheadAttention:
    """An attention that shows its probabilities, before dropout all the same: values say which key they are of."""
    module = nn.MultiheadAttention(32, 4, dropout=p, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.zero_()
        module.in_proj_weight[64:] = torch.eye(32)
        module.out_proj.weight.copy_(torch.eye(32))
    return module


def probabilities(module: nn.Module, queries: int, seed: int, itself: bool) -> Tensor:
    """[B, T, H, S] with B = 16, H = 4, S = 8."""
    torch.manual_seed(seed)
    values = torch.eye(8).repeat(1, 4).expand(16, 8, 32)  # key s is one at place s of every head
    q = values if itself else torch.zeros(16, queries, 32)
    out = module(q, values, values, need_weights=False)[0]
    return out.unflatten(-1, (4, 8))


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_attention_dropout_drops_probabilities(p: float, itself: bool) -> None:
    module = shown(p)
    fastgpt.patch(module, strict=True)
    found = torch.stack([probabilities(module, 8, seed, itself) for seed in range(20)])
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / 8 / (1 - p)))
    number = found.numel()  # 81,920 draws
    for axis in range(found.dim()):  # no part of them more than another: each within five deviations
        others = [i for i in range(found.dim()) if i != axis]
        off = (kept.double().mean(others) - (1 - p)).abs()
        assert off.max() < 5 * (p * (1 - p) * found.shape[axis] / number) ** 0.5
        a, b = kept.index_select(axis, torch.tensor([0])), kept.index_select(axis, torch.tensor([1]))
        assert 0.5 * p * (1 - p) < float((a != b).double().mean()) < 4 * p * (1 - p)  # and no two the same
    assert torch.equal(probabilities(module, 8, 3, itself), found[3])
    torch.testing.assert_close(probabilities(module.eval(), 8, 0, itself), torch.full(found.shape[1:], 1 / 8))


def test_attention_dropout_leaves_the_expectation() -> None:
    """Attention is linear in its probabilities: the mean over seeds is what it gives without dropout."""
    module, x = shaken(nn.MultiheadAttention(32, 4, dropout=0.3, batch_first=True)), torch.randn(2, 6, 32)
    exact = module.eval()(x, x, x, need_weights=False)[0]
    fastgpt.patch(module.train(), strict=True)
    with torch.no_grad():
        drawn = torch.stack([module(x, x, x, need_weights=False)[0] for _ in range(600)]).double()
    off = (drawn.mean(0) - exact).abs() / (drawn.std(0) / 600**0.5)
    assert off.max() < 5
    assert drawn.std(0).min() > 0


DROPPED = ("attention", "cross", "encoder", "pre", "decoder")


def dropping(name: str, p: float = 0.4) -> tuple[nn.Module, Callable[..., Tensor], list[Tensor]]:
    """A module that drops in its attention alone, how to call it, and on what."""
    x, memory = torch.randn(2, 6, 32), torch.randn(2, 7, 32)
    if name in ("attention", "cross"):
        module = shaken(nn.MultiheadAttention(32, 4, dropout=p, batch_first=True))
        if name == "attention":
            return module, lambda m, x: m(x, x, x, need_weights=False)[0], [x]
        return module, lambda m, x, y: m(x, y, y, need_weights=False)[0], [x, memory]
    kind = nn.TransformerDecoderLayer if name == "decoder" else nn.TransformerEncoderLayer
    module = shaken(kind(32, 4, 48, p, F.gelu, batch_first=True, norm_first=name == "pre"))
    for child in module.children():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if name == "decoder":
        return module, lambda m, x, y: m(x, y, causal, tgt_is_causal=True), [x, memory]
    return module, lambda m, x: m(x, src_mask=causal), [x]


def seeded(call: Callable[..., Tensor], seed: int) -> Callable[..., Tensor]:
    def replayed(*args: Any) -> Tensor:
        torch.manual_seed(seed)
        return call(*args)

    return replayed


@pytest.mark.parametrize("name", DROPPED)
def test_attention_dropout_is_drawn_from_torch_s_generator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, call, inputs = dropping(name)
    fastgpt.patch(module, strict=True)
    monkeypatch.setattr(type(module).__mro__[2], "forward", None)  # PyTorch's own is not what draws
    first, again, other = (seeded(call, seed)(module, *inputs) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(call(module, *inputs), call(module, *inputs))
    quiet = call(module.eval(), *inputs)
    assert torch.equal(quiet, call(module, *inputs))
    assert (first - quiet).abs().max() > 0.01


@pytest.mark.parametrize("name", DROPPED)
def test_gradients_under_attention_dropout(name: str) -> None:
    """By the same draws as forward: those of fp32's kernels beside the reference in fp64, which gradcheck holds to
    differences of what forward gives."""
    module, call, inputs = dropping(name)
    fastgpt.patch(module, strict=True)
    exact_module = copy.deepcopy(module).double()
    exact = results(exact_module, seeded(call, 5), [x.double() for x in inputs])
    got = results(module, seeded(call, 5), inputs)
    assert got.keys() == exact.keys()
    assert len([n for n in got if n != "out"]) == len(inputs) + len(list(module.parameters()))
    for key, value in exact.items():
        # A gradient that is zero but for rounding (of the keys' bias) is held to the others.
        off = float((got[key].double() - value).norm()) / (float(value.norm()) + 0.1)
        assert off < 1e-4, key
    small = [x[:1, :2].double().requires_grad_() for x in inputs]
    if name in ("attention", "cross"):
        assert torch.autograd.gradcheck(lambda *x: seeded(call, 5)(exact_module, *x), small, fast_mode=True)
    parameters = [p for n, p in exact_module.named_parameters() if "attn" in n or "in_proj" in n]
    for p in parameters[:4]:
        check_direction(exact_module, seeded(call, 5), [x.double() for x in inputs], p)


def check_direction(m: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor], p: Tensor) -> None:
    """One derivative of a parameter's by central differences."""
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def loss() -> Tensor:
        out = call(m, *inputs)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

    (grad,) = torch.autograd.grad(loss(), p)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            p.add_(along, alpha=step)
            values.append(float(loss()))
        p.add_(along, alpha=1e-5)
    assert float((grad * along).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-6)


def test_attention_dropout_replays_under_checkpointing() -> None:
    module, call, (x,) = dropping("encoder")
    fastgpt.patch(module, strict=True)
    leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    seeded(call, 1)(module, leaf).square().sum().backward()
    torch.manual_seed(1)
    checkpointed = torch.utils.checkpoint.checkpoint(lambda x: call(module, x), again, use_reentrant=False)
    checkpointed.square().sum().backward()
    torch.testing.assert_close(again.grad, leaf.grad)


@pytest.mark.parametrize("name", ["attention", "encoder", "decoder"])
@pytest.mark.parametrize("p", [1.0, 1])
def test_a_dropout_of_everything(name: str, p: float) -> None:
    module, x = modules(name, dropout=p), torch.randn(3, 6, 32)
    check_agrees(module, lambda m: called(m, x))
    check_same(module, lambda m, x: called(m, x), [x])
