"""Softmax with scale, mask, causality and dropout by csrc/cpu/softmax.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2  # enum MaskKind in softmax.cpp
_MAX_DIMS = 4  # leading dimensions of a mask, after merging, that the kernels step through


def supports(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> str | None:
    """None, or the reason why not."""
    reason = unsupported(x)
    if reason is None and mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, x.dtype):
            return f"needs a mask of bool, float32 or {x.dtype}, got {mask.dtype}"
        dims = max(len(_mask_dims(x.shape, mask)[0]), len(_shared_dims(x.shape, mask.shape)[0]))
        if dims > _MAX_DIMS:
            return f"needs a mask whose leading dimensions merge into {_MAX_DIMS} or fewer, got {dims}"
    return reason


def softmax_fwd(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y, p): p, the probabilities before dropout, only with dropout."""
    x = x.contiguous()
    shape, dtype = x.shape, x.dtype
    cols = shape[-1]
    y = memory.empty_like(x)
    p, p_at = None, 0
    if dropout_p > 0.0:
        p = memory.empty_like(x)
        p_at = p.data_ptr()
    mask_args: tuple[int, ...] = (0, _NO_MASK, 0, 1, 1, 1, 0, 0, 0, 0, 0)
    if x.numel() == 0:
        return y, p
    if mask is not None:
        sizes, strides, column_stride = _mask_dims(shape, mask)
        sizes, strides = _pad(sizes, 1), _pad(strides, 0)
        kind, code = (_BOOL_MASK, 0) if mask.dtype == torch.bool else (_FLOAT_MASK, DTYPE_CODES[mask.dtype])
        mask_args = (mask.data_ptr(), kind, code, *sizes[1:], *strides, column_stride)
    rng, dropout_args = _dropout(dropout_p, rng)
    kernels.softmax_fwd(
        x.data_ptr(), y.data_ptr(), p_at, x.numel() // cols, cols, shape[-2] if causal else 0, DTYPE_CODES[dtype],
        scale, *mask_args, *dropout_args, torch.get_num_threads(),
    )  # fmt: skip
    return y, p


def softmax_bwd(
    dy: Tensor,
    p: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dmask); the mask is given only for its shape and dtype."""
    dy, p = dy.contiguous(), p.contiguous()
    shape, dtype = p.shape, p.dtype
    cols = shape[-1]
    dx = memory.empty_like(p) if need_dx else None
    dmask = None
    mask_args: tuple[int, ...] = (0, 1, 1, 1, 1, 1, 0)
    dmask_at = 0
    if need_dmask and mask is not None:
        dmask = memory.empty_like(mask)
        dmask_at = dmask.data_ptr()
        sizes, shared = _shared_dims(shape, mask.shape)
        sizes, shared = _pad(sizes, 1), _pad(shared, 0)
        mask_cols = mask.shape[-1] if mask.dim() else 1
        bits = sum(bit << d for d, bit in enumerate(shared))
        mask_args = (DTYPE_CODES[mask.dtype], mask_cols, *sizes, bits)
    if p.numel() == 0:
        return dx, None if dmask is None else dmask.zero_()
    rng, dropout_args = _dropout(dropout_p, rng)
    kernels.softmax_bwd(
        dy.data_ptr(), p.data_ptr(), 0 if dx is None else dx.data_ptr(), dmask_at, p.numel() // cols, cols,
        shape[-2] if causal else 0, DTYPE_CODES[dtype], scale, *mask_args, *dropout_args, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dmask


def _dropout(dropout_p: float, rng: Tensor | None) -> tuple[Tensor | None, tuple[int, int, float]]:
    """rng (kept alive by the caller) and (its address or 0, threshold, scale of what is kept)."""
    if dropout_p <= 0.0:
        return None, (0, 0, 1.0)
    assert rng is not None
    rng = rng.contiguous()
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return rng, (rng.data_ptr(), threshold, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def _mask_dims(shape: Sequence[int], mask: Tensor) -> tuple[list[int], list[int], int]:
    """Sizes and strides of the mask over x's leading dimensions, neighbours merged, and its column stride."""
    *strides, column_stride = mask.expand(shape).stride()
    sizes, strides = _merge(shape[:-1], strides, lambda outer, inner, size: outer == inner * size)
    return sizes, strides, column_stride


def _shared_dims(shape: Sequence[int], mask_shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """x's leading dimensions, neighbours merged, and for each 1 if the mask is broadcast over it, else 0."""
    padded = (1,) * (len(shape) - len(mask_shape)) + tuple(mask_shape)
    shared = [int(m != s) for s, m in zip(shape[:-1], padded[:-1], strict=True)]
    return _merge(shape[:-1], shared, lambda outer, inner, size: outer == inner)


def _merge(
    sizes: Sequence[int], keys: Sequence[int], same: Callable[[int, int, int], bool]
) -> tuple[list[int], list[int]]:
    """Merges neighbours where same(outer key, inner key, inner size); drops dimensions of size one."""
    merged_sizes: list[int] = []
    merged_keys: list[int] = []
    for size, key in zip(reversed(sizes), reversed(keys), strict=True):
        if size == 1:
            continue
        if merged_sizes and same(key, merged_keys[0], merged_sizes[0]):
            merged_sizes[0] *= size
        else:
            merged_sizes.insert(0, size)
            merged_keys.insert(0, key)
    return merged_sizes, merged_keys


def _pad(values: list[int], fill: int) -> list[int]:
    return [fill] * (_MAX_DIMS - len(values)) + values
