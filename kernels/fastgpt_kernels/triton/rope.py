"""Rotary position embedding of q and k in one Triton launch.

    y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin

A program takes one position of one sequence and a block of heads, of q or of k: the heads share its cos and sin, and
lie side by side in the output and mostly in the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.triton.common import (
    DTYPE_NAMES,
    LaunchConfig,
    Tunable,
    cdiv,
    configured,
    next_power_of_2,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """None, or the reason why not."""
    return unsupported(q)


@dataclass(frozen=True)
class RopeConfig(LaunchConfig):
    BLOCK_HEADS: int = 16


def heuristic(width: int, dtype: torch.dtype, arch: str) -> RopeConfig:
    """Some 2048 elements a program; the width of a head is never cut."""
    cols = next_power_of_2(width)
    if arch == "interpreter":
        return configured(arch, "rope", _key(width, dtype), RopeConfig(BLOCK_HEADS=32))
    heads = min(max(2048 // cols, 1), 32)
    warps = min(max(heads * cols // 512, 1), 16)
    rule = RopeConfig(max(warps // 2, 1) if arch.startswith("gfx") else warps, BLOCK_HEADS=heads)
    return configured(arch, "rope", _key(width, dtype), rule)


def tunables() -> Sequence[Tunable]:
    choices = [RopeConfig(warps, BLOCK_HEADS=heads) for heads in (4, 8, 16, 32) for warps in (1, 2, 4, 8)]
    return [
        Tunable("rope", _key(width, dtype), choices, _problem(width, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for width in (64, 128)
    ]


def _problem(width: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        q, k = (torch.randn(8, 1024, 32, width, dtype=dtype, device=device).transpose(1, 2) for _ in "qk")
        cos, sin = torch.randn(2, 1024, width // 2, device=device)
        return lambda: rope_fwd(q, k, cos, sin, False)

    return make


def _key(width: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(width)}"


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(q', k'): [B, H, T, D] views of [B, T, H, D] storage."""
    q_out, k_out = _rotate(q, k, cos, sin, interleaved, 1.0)
    assert q_out is not None
    assert k_out is not None
    return q_out, k_out


def rope_bwd(
    cos: Tensor, sin: Tensor, dq: Tensor | None, dk: Tensor | None, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk): by the negative angle."""
    return _rotate(dq, dk, cos, sin, interleaved, -1.0)


def _rotate(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, sign: float
) -> tuple[Tensor | None, Tensor | None]:
    q, q_out = _side(q)
    k, k_out = _side(k)
    # With one of the two alone it takes both places, and the second has no heads.
    x, out = (q, q_out) if q is not None else (k, k_out)
    other, other_out = (k, k_out) if q is not None and k is not None else (x, out)
    assert x is not None
    assert out is not None
    assert other is not None
    batch, heads, length, width = x.shape
    other_heads = other.shape[1] if other is not x else 0
    config = heuristic(width, x.dtype, arch_of(x.device))
    cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[-1]
    strides = (*x.stride()[:3], *other.stride()[:3])
    head_blocks = cdiv(heads, config.BLOCK_HEADS)
    # Strides are no part of what is compiled for, but whether all of them keep rows aligned to 16 elements is.
    aligned = width % 16 == 0 and half % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    launch(
        _rope_kernel, (batch * length, head_blocks + cdiv(other_heads, config.BLOCK_HEADS)) if width else (0,),
        x, out, other, other_out, cos, sin,
        *strides, heads, other_heads, head_blocks, length, half * length if cos.dim() == 3 else 0, width, half, sign,
        INTERLEAVED=interleaved, ALIGNED=aligned, BLOCK_HEADS=config.BLOCK_HEADS,
        BLOCK_HALF=next_power_of_2(half), BLOCK_REST=next_power_of_2(width - 2 * half) if width > 2 * half else 0,
        num_warps=config.num_warps,
    )  # fmt: skip
    return q_out, k_out


def _side(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(x with adjacent features, memory for what becomes of it)."""
    if x is None:
        return None, None
    batch, heads, length, width = x.shape
    x = x if x.stride(-1) == 1 or width == 1 else x.contiguous()
    return x, memory.empty((batch, length, heads, width), x.dtype, x.device).transpose(1, 2)


@triton.jit(
    do_not_specialize=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "q_heads", "k_heads", "q_blocks", "length", "table_sb"
    ]
)  # fmt: skip
def _rope_kernel(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, q_heads, k_heads, q_blocks, length, table_sb, width, half, sign,
    INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // length).to(tl.int64)
    t = (tl.program_id(0) % length).to(tl.int64)
    table = b * table_sb + t * half
    block = tl.program_id(1)
    if block < q_blocks:
        _rotate_heads(
            q_ptr, q_out_ptr, b, t, block * BLOCK_HEADS, q_heads, q_sb, q_sh, q_st, length, width, half,
            cos_ptr + table, sin_ptr + table, sign, INTERLEAVED, ALIGNED, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, k_out_ptr, b, t, (block - q_blocks) * BLOCK_HEADS, k_heads, k_sb, k_sh, k_st, length, width, half,
            cos_ptr + table, sin_ptr + table, sign, INTERLEAVED, ALIGNED, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, b, t, first_head, heads, sb, sh, st, length, width, half, cos_ptr, sin_ptr, sign,
    INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A block of heads at one position: x [B, H, T, D] by strides to out [B, T, H, D]."""
    head = first_head + tl.arange(0, BLOCK_HEADS).to(tl.int64)
    here = (head < heads)[:, None]
    begin, rows = b * sb + t * st, head * sh
    if ALIGNED:
        begin, rows = tl.multiple_of(begin, 16), tl.multiple_of(rows, 16)
    x_ptr += begin + rows[:, None]  # [heads, 1] pointers
    out_ptr += (b * length + t) * (heads.to(tl.int64) * width) + (head * width)[:, None]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :] * sign
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        inside = here & (cols < 2 * half)
        x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
        y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        tl.store(out_ptr + cols, tl.reshape(y, (BLOCK_HEADS, 2 * BLOCK_HALF)).to(kind), mask=inside)
    else:
        cols = pair[None, :]
        inside = here & (cols < half)
        x1 = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + half + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + cols, (x1 * cos - x2 * sin).to(kind), mask=inside)
        tl.store(out_ptr + half + cols, (x2 * cos + x1 * sin).to(kind), mask=inside)
    if BLOCK_REST > 0:
        cols = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        inside = here & (cols < width)
        tl.store(out_ptr + cols, tl.load(x_ptr + cols, mask=inside), mask=inside)
