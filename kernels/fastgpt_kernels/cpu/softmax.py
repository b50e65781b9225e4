"""Softmax with scale, mask, causality and dropout by csrc/cpu/softmax.cpp."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.masks import dropout_args, mask_dims, shared_dims, unsupported_mask

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2  # enum MaskKind in softmax.cpp
_NO_MASK_ARGS: tuple[int, ...] = (0, _NO_MASK, 0, 1, 1, 1, 0, 0, 0, 0, 0)
_NO_DMASK_ARGS: tuple[int, ...] = (0, 1, 1, 1, 1, 1, 0)
_, _NO_DROPOUT = dropout_args(0.0, None)


def supports(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> str | None:
    """None, or the reason why not."""
    reason = unsupported(x)
    if reason is None and mask is not None:
        reason = unsupported_mask(x, mask)
    return reason


def softmax_fwd(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y, p): p, the probabilities before dropout, only with dropout."""
    x = x.contiguous()
    y, p, p_at = memory.empty_like(x), None, 0
    mask_args, dropping = _NO_MASK_ARGS, _NO_DROPOUT
    if dropout_p > 0.0:
        p = memory.empty_like(x)
        p_at = p.data_ptr()
        rng, dropping = dropout_args(dropout_p, rng)
    elements, shape = x.numel(), x.shape
    if elements == 0:
        return y, p
    if mask is not None:
        sizes, strides, column_stride = mask_dims(shape, mask)
        kind, code = (_BOOL_MASK, 0) if mask.dtype == torch.bool else (_FLOAT_MASK, DTYPE_CODES[mask.dtype])
        mask_args = (mask.data_ptr(), kind, code, *sizes[1:], *strides, column_stride)
    cols = shape[-1]
    kernels.softmax_fwd(
        x.data_ptr(), y.data_ptr(), p_at, elements // cols, cols, shape[-2] if causal else 0, DTYPE_CODES[x.dtype],
        scale, *mask_args, *dropping, get_num_threads(),
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
    mask_args, dropping = _NO_DMASK_ARGS, _NO_DROPOUT
    dmask_at = 0
    if need_dmask and mask is not None:
        dmask = memory.empty_like(mask)
        dmask_at = dmask.data_ptr()
        sizes, shared = shared_dims(shape, mask.shape)
        mask_cols = mask.shape[-1] if mask.dim() else 1
        mask_args = (DTYPE_CODES[mask.dtype], mask_cols, *sizes, shared)
    elements = p.numel()
    if elements == 0:
        return dx, None if dmask is None else dmask.zero_()
    if dropout_p > 0.0:
        rng, dropping = dropout_args(dropout_p, rng)
    kernels.softmax_bwd(
        dy.data_ptr(), p.data_ptr(), 0 if dx is None else dx.data_ptr(), dmask_at, elements // cols, cols,
        shape[-2] if causal else 0, DTYPE_CODES[dtype], scale, *mask_args, *dropping, get_num_threads(),
    )  # fmt: skip
    return dx, dmask
