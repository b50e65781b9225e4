"""Hazards of the rotary embedding alone: which features form pairs, layouts, what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DEVICE, variants

from fastgpt import nn, ops
from fastgpt.testing.memory import same_bits

VARIANTS = variants("rope")


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


@on(VARIANTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_quarter_turn(variant: Any, interleaved: bool) -> None:
    """cos 0, sin 1: (x1, x2) becomes (-x2, x1), to the bit."""
    variant.enter()
    q = drawn(1, 2, 3, 10)
    cos, sin = torch.zeros(3, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    got, _ = ops.rope(q, q, cos, sin, interleaved=interleaved, backend=variant.backend)
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    assert torch.equal(got[..., first], -q[..., second])
    assert torch.equal(got[..., second], q[..., first])
    assert torch.equal(got[..., 8:], q[..., 8:])


@on(VARIANTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(variant: Any, interleaved: bool) -> None:
    """What the embedding is for: q at m and k at n have the product of q at m + 5 and k at n + 5."""
    variant.enter()
    q, k = drawn(1, 1, 1, 16).expand(1, 1, 12, 16), drawn(1, 1, 1, 16).flip(-1).expand(1, 1, 12, 16)
    rotary = nn.RotaryEmbedding(16, 12, interleaved=interleaved, backend=variant.backend).to(DEVICE)
    q_rotated, k_rotated = rotary(q, k)
    scores = (q_rotated @ k_rotated.mT)[0, 0]
    torch.testing.assert_close(scores[:7, :7], scores[5:, 5:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 5], rtol=1e-2)


@on(VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_layout_gives_the_same_bits_and_heads_inside(variant: Any, dtype: torch.dtype) -> None:
    """Packed projections, expanded heads, features apart: whatever the strides of q and k."""
    variant.enter()
    packed = drawn(2, 5, 3 * 4 * 18, dtype=dtype)
    q, k, _ = (part.unflatten(-1, (4, 18)).transpose(1, 2) for part in packed.chunk(3, -1))
    cos, sin = drawn(2, 5, 6), drawn(2, 5, 12)[..., ::2]
    expected = ops.rope(q.contiguous(), k.contiguous(), cos, sin.contiguous(), backend=variant.backend)
    for layout in (lambda t: t, lambda t: t.mT.contiguous().mT):
        for got, wanted in zip(
            ops.rope(layout(q), layout(k), cos, sin, backend=variant.backend), expected, strict=True
        ):
            assert same_bits(got, wanted)
            assert got.transpose(1, 2).is_contiguous()
    one = k[:, :1]
    got = ops.rope(one.expand(2, 4, 5, 18), one, cos, sin, backend=variant.backend)
    assert same_bits(got[0][:, 3:], got[1])


@on(VARIANTS)
def test_backward_turns_back(variant: Any) -> None:
    """Where cos and sin are of an angle the gradient of the rotated is the vector itself."""
    variant.enter()
    rotary = nn.RotaryEmbedding(64, 9).to(DEVICE)
    q, k = drawn(2, 3, 9, 64).requires_grad_(), drawn(2, 1, 9, 64).requires_grad_()
    rotated = ops.rope(q, k, rotary.cos, rotary.sin, backend=variant.backend)
    back = torch.autograd.grad(rotated, (q, k), rotated)
    for got, x in zip(back, (q, k), strict=True):
        torch.testing.assert_close(got, x.detach())


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_module(interleaved: bool) -> None:
    rotary = nn.RotaryEmbedding(8, 16, base=100.0, interleaved=interleaved)
    assert not rotary.state_dict()
    angle = torch.arange(16.0)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(rotary.cos, angle.cos())
    torch.testing.assert_close(rotary.sin, angle.sin())
    q, k = drawn(2, 3, 7, 8).to("cpu"), drawn(2, 1, 7, 8).to("cpu")
    expected = ops.rope(q, k, rotary.cos[4:11], rotary.sin[4:11], interleaved=interleaved)
    for positions in (torch.arange(4, 11), torch.arange(4, 11).expand(2, 7)):
        for got, wanted in zip(rotary(q, k, positions), expected, strict=True):
            assert same_bits(got, wanted)
    assert rotary.bfloat16().cos.dtype == torch.float32  # angles of far positions need it
    with pytest.raises(ValueError, match="max_seq_length=16 positions, got 17"):
        rotary(drawn(1, 1, 17, 8), drawn(1, 1, 17, 8))
    with pytest.raises(ValueError, match="dim: expected an even number"):
        nn.RotaryEmbedding(7, 16)
