"""The forward kernel of softmax: see `softmax`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt_kernels.triton import philox
from fastgpt_kernels.triton.softmax_visible import visible_columns, within_columns


@triton.jit(
    do_not_specialize=[
        "rows", "queries", "size1", "size2", "size3", "stride0", "stride1", "stride2", "stride3", "threshold"
    ]
)  # fmt: skip
def _softmax_fwd_kernel(
    x_ptr, y_ptr, p_ptr, rows, n, x_stride, queries, scale,
    mask_ptr, mask_col_stride, size1, size2, size3, stride0, stride1, stride2, stride3, rng_ptr, threshold,
    keep_scale, CAUSAL: tl.constexpr, DIMS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    row_inside, visible = visible_columns(row, rows, n, queries, CAUSAL)
    x_ptr += (row.to(tl.int64) * x_stride)[:, None]  # from here on [rows, 1] pointers
    if mask_ptr is not None:
        # Where the mask's row begins: the row's index is split over the mask's leading dimensions.
        if DIMS == 1:
            mask_at = row.to(tl.int64) * stride3
        else:
            rest = row // size3
            mask_at = (row % size3).to(tl.int64) * stride3
            if DIMS == 2:
                mask_at += rest.to(tl.int64) * stride2
            else:
                mask_at += (rest % size2).to(tl.int64) * stride2
                rest //= size2
                if DIMS == 3:
                    mask_at += rest.to(tl.int64) * stride1
                else:
                    mask_at += (rest % size1).to(tl.int64) * stride1 + (rest // size1).to(tl.int64) * stride0
        if ALIGNED:
            mask_at = tl.multiple_of(mask_at, 16)
        mask_ptr += mask_at[:, None]
    if ONE_BLOCK:
        s, seen = _scores(x_ptr, mask_ptr, cols, mask_col_stride, row_inside, visible, n, scale, CAUSAL)
        e = tl.exp(s - tl.max(s, axis=1)[:, None])
        inverse = 1.0 / tl.sum(e, axis=1)
        _store(y_ptr, p_ptr, rng_ptr, e, seen, inverse, row, cols, row_inside, n, threshold, keep_scale)
    else:
        end = tl.max(visible) if CAUSAL else n
        lane_max = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
        lane_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for begin in range(0, end, BLOCK_COLS):
            s, seen = _scores(
                x_ptr, mask_ptr, begin + cols, mask_col_stride, row_inside, visible, n, scale, CAUSAL
            )
            # One exponential, of -|s - max|, rescales the sum or is added to it. NaN goes to the sum.
            rise = tl.where(s == float("-inf"), s, s - lane_max)
            e = tl.exp(-tl.abs(rise))
            lane_sum = tl.where(rise > 0, lane_sum * e + 1.0, lane_sum + e)
            lane_max = tl.where(rise > 0, s, lane_max)
        top = tl.max(lane_max, axis=1)
        inverse = 1.0 / tl.sum(lane_sum * tl.exp(lane_max - top[:, None]), axis=1)
        for begin in range(0, n, BLOCK_COLS):
            s, seen = _scores(
                x_ptr, mask_ptr, begin + cols, mask_col_stride, row_inside, visible, n, scale, CAUSAL
            )
            e = tl.exp(s - top[:, None])
            _store(
                y_ptr,
                p_ptr,
                rng_ptr,
                e,
                seen,
                inverse,
                row,
                begin + cols,
                row_inside,
                n,
                threshold,
                keep_scale,
            )


@triton.jit
def _scores(x_ptr, mask_ptr, cols, mask_col_stride, row_inside, visible, n, scale, CAUSAL: tl.constexpr):
    """(s, seen): -inf where nothing is to be seen."""
    fetched, seen = within_columns(cols, row_inside, visible, n, CAUSAL)
    s = tl.load(x_ptr + cols[None, :], mask=fetched, other=0.0).to(tl.float32) * scale
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + (cols.to(tl.int64) * mask_col_stride)[None, :], mask=fetched, other=0)
        if mask.dtype == tl.uint8:
            seen = seen & (mask != 0)
        else:
            s += mask.to(tl.float32)
    return tl.where(seen, s, float("-inf")), seen


@triton.jit
def _store(y_ptr, p_ptr, rng_ptr, e, seen, inverse, row, cols, row_inside, n, threshold, keep_scale):
    """p = e / sum, and y after dropout; zeros where nothing is to be seen, whatever the row holds."""
    p = tl.where(seen, e * inverse[:, None], 0.0)
    inside = row_inside[:, None] & (cols < n)[None, :]
    at = (row.to(tl.int64) * n)[:, None] + cols[None, :]
    if rng_ptr is not None:
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
        kept = philox.keep(tl.load(rng_ptr), tl.load(rng_ptr + 1), at, threshold)
        p = tl.where(kept, p * keep_scale, 0.0)
    tl.store(y_ptr + at, p.to(y_ptr.dtype.element_ty), mask=inside)
