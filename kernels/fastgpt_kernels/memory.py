"""The one place where kernels get memory for their outputs.

Every launcher allocates through `empty`, so that the proof harness can wrap it: outputs that start as NaN
show a row nobody wrote, guard bytes around them show a store that ran past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Allocator = Callable[[Sequence[int], torch.dtype, torch.device], torch.Tensor]

_wrapper: Allocator | None = None
_empty_like, _FP32 = torch.empty_like, torch.float32


def empty(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor of `shape`."""
    if _wrapper is not None:
        return _wrapper((shape,) if isinstance(shape, int) else shape, dtype, device)
    if isinstance(shape, int):
        return torch.empty(shape, dtype=dtype, device=device)
    if not shape:
        return torch.empty_strided((), (), dtype=dtype, device=device)
    return torch.empty(*shape, dtype=dtype, device=device)  # as a tuple it costs half a microsecond more


def new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """`empty` with the dtype and device of `like`."""
    if _wrapper is not None:
        return _wrapper(shape, like.dtype, like.device)
    return like.new_empty(*shape)


def fp32_rows(like: torch.Tensor, rows: int) -> torch.Tensor:
    """`empty` [rows] in fp32 on the device of `like`: statistics."""
    if _wrapper is None and like.dtype is _FP32:
        return like.new_empty(rows)
    return empty(rows, _FP32, like.device)


def empty_like(like: torch.Tensor) -> torch.Tensor:
    """`empty` with the shape, dtype and device of `like`: less than half the host time."""
    if _wrapper is not None:
        return _wrapper(like.shape, like.dtype, like.device)
    if like.is_contiguous():
        return _empty_like(like)
    return _empty_like(like, memory_format=torch.contiguous_format)


def heads_inside(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised [B, H, T, D] over [B, T, H, D] storage, with the dtype and device of `like`."""
    batch, heads, rows, width = shape
    if _wrapper is not None:
        return _wrapper((batch, rows, heads, width), like.dtype, like.device).transpose(1, 2)
    stride = (rows * heads * width, width, heads * width, 1)
    return torch.empty_strided((batch, heads, rows, width), stride, dtype=like.dtype, device=like.device)


@contextmanager
def allocate_with(allocator: Allocator) -> Iterator[None]:
    """Within the block every kernel output comes from `allocator` (for the harness; not thread-safe)."""
    global _wrapper
    previous, _wrapper = _wrapper, allocator
    try:
        yield
    finally:
        _wrapper = previous
