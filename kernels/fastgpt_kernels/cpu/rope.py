"""Rotary position embedding by csrc/cpu/rope.cpp."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported

_ABSENT = (0, 0, 0, 0, 0, 0)


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """None, or the reason why not."""
    return unsupported(q)


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
    one = q if q is not None else k
    assert one is not None
    batch, _, length, width = one.shape
    q, q_out, q_args = _side(q)
    k, k_out, k_args = _side(k)
    cos, sin = _adjacent(cos), _adjacent(sin)
    kernels.rope(
        *q_args, *k_args, cos.data_ptr(), *_table_strides(cos), sin.data_ptr(), *_table_strides(sin),
        batch, length, width, cos.shape[-1], DTYPE_CODES[one.dtype], DTYPE_CODES[cos.dtype], int(interleaved), sign,
        get_num_threads(),
    )  # fmt: skip
    return q_out, k_out


def _side(x: Tensor | None) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """(x with adjacent features, its output, what the kernel is told of the two)."""
    if x is None:
        return None, None, _ABSENT
    batch, heads, length, width = x.shape
    x = _adjacent(x)
    out = memory.new(x, batch, length, heads, width)
    batch_stride, head_stride, position_stride, _ = x.stride()
    args = (x.data_ptr(), out.data_ptr(), heads, batch_stride, head_stride, position_stride)
    return x, out.transpose(1, 2), args


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Between batches and between positions of [T, R / 2] or [B, T, R / 2]."""
    return (table.stride(0), table.stride(1)) if table.dim() == 3 else (0, table.stride(0))
