"""Softmax with scale, mask, causality and dropout by csrc/cuda/softmax.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.cuda.common import DTYPE_CODES, kernels, place_of, unsupported
from fastgpt_kernels.masks import dropout_args, mask_dims, shared_dims, unsupported_mask

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2  # enum MaskKind in softmax.h

# The gradient of a mask is summed by this many warps at least, where there are enough rows: they fill a GPU.
_MASK_WARPS = 2048
_MEMBERS_OF_A_PART = 64


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
    shape = x.shape
    cols = shape[-1]
    y = memory.empty_like(x)
    p = memory.empty_like(x) if dropout_p > 0.0 else None
    if x.numel() == 0:
        return y, p
    mask_args: tuple[int, ...] = (0, _NO_MASK, 0, 1, 1, 1, 0, 0, 0, 0, 0)
    if mask is not None:
        sizes, strides, column_stride = mask_dims(shape, mask)
        kind, code = (_BOOL_MASK, 0) if mask.dtype == torch.bool else (_FLOAT_MASK, DTYPE_CODES[mask.dtype])
        mask_args = (mask.data_ptr(), kind, code, *sizes[1:], *strides, column_stride)
    rng, dropping = dropout_args(dropout_p, rng)
    kernels.softmax_fwd(
        x.data_ptr(), y.data_ptr(), 0 if p is None else p.data_ptr(), x.numel() // cols, cols,
        shape[-2] if causal else 0, DTYPE_CODES[x.dtype], scale, *mask_args, *dropping, *place_of(x),
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
    shape = p.shape
    cols = shape[-1]
    dx = memory.empty_like(p) if need_dx else None
    dmask = memory.empty_like(mask) if need_dmask and mask is not None else None
    if p.numel() == 0:
        return dx, None if dmask is None else dmask.zero_()
    rows, queries, code = p.numel() // cols, shape[-2] if causal else 0, DTYPE_CODES[p.dtype]
    sums = None if dmask is None else memory.empty((rows, 2), torch.float32, p.device)
    rng, dropping = dropout_args(dropout_p, rng)
    place = place_of(p)
    kernels.softmax_bwd(
        dy.data_ptr(), p.data_ptr(), 0 if dx is None else dx.data_ptr(), 0 if sums is None else sums.data_ptr(),
        rows, cols, queries, code, scale, *dropping, *place,
    )  # fmt: skip
    if dmask is not None and sums is not None:
        sizes, shared = shared_dims(shape, dmask.shape)
        mask_cols = dmask.shape[-1] if dmask.dim() else 1
        groups = dmask.numel() // mask_cols
        parts = _parts(groups, rows // groups, mask_cols)
        partial = None
        if parts > 1:
            partial = memory.empty((groups, parts, mask_cols), torch.float32, p.device)
        kernels.softmax_bwd_mask(
            dy.data_ptr(), p.data_ptr(), sums.data_ptr(), dmask.data_ptr(),
            0 if partial is None else partial.data_ptr(), parts, rows, cols, queries, code,
            DTYPE_CODES[dmask.dtype], mask_cols, *sizes, shared, *dropping, *place,
        )  # fmt: skip
    return dx, dmask


def _parts(groups: int, members: int, mask_cols: int) -> int:
    """How many parts the rows that share a row of the mask are summed in: a function of the shape alone."""
    units = groups * -(-mask_cols // 32)
    wanted = max(1, min(-(-_MASK_WARPS // units), members // _MEMBERS_OF_A_PART))
    return -(-members // -(-members // wanted))  # none of them empty
