"""The backward kernels of softmax: dx, and the mask's gradient; see `softmax`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt_kernels.triton import philox
from fastgpt_kernels.triton.common import add_compensated
from fastgpt_kernels.triton.softmax_visible import visible_columns, within_columns


@triton.jit(do_not_specialize=["rows", "queries", "threshold"])
def _softmax_bwd_kernel(
    dy_ptr, p_ptr, dx_ptr, inner_ptr, rows, n, dy_stride, queries, scale, rng_ptr, threshold, keep_scale,
    CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    row_inside, visible = visible_columns(row, rows, n, queries, CAUSAL)
    if ONE_BLOCK:
        p, g = _p_and_g(
            dy_ptr,
            p_ptr,
            rng_ptr,
            row,
            cols,
            row_inside,
            visible,
            n,
            dy_stride,
            threshold,
            keep_scale,
            CAUSAL,
        )
        inner = tl.sum(p * g, axis=1)
        if dx_ptr is not None:
            _store_dx(dx_ptr, scale * p * (g - inner[:, None]), row, cols, row_inside, n)
    else:
        lane_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for begin in range(0, tl.max(visible) if CAUSAL else n, BLOCK_COLS):
            p, g = _p_and_g(
                dy_ptr, p_ptr, rng_ptr, row, begin + cols, row_inside, visible, n, dy_stride, threshold, keep_scale,
                CAUSAL,
            )  # fmt: skip
            lane_sum += p * g
        inner = tl.sum(lane_sum, axis=1)
        if dx_ptr is not None:
            for begin in range(0, n, BLOCK_COLS):
                p, g = _p_and_g(
                    dy_ptr, p_ptr, rng_ptr, row, begin + cols, row_inside, visible, n, dy_stride, threshold,
                    keep_scale, CAUSAL,
                )  # fmt: skip
                _store_dx(dx_ptr, scale * p * (g - inner[:, None]), row, begin + cols, row_inside, n)
    if inner_ptr is not None:
        tl.store(inner_ptr + row, inner, mask=row_inside)


@triton.jit
def _p_and_g(
    dy_ptr, p_ptr, rng_ptr, row, cols, row_inside, visible, n, dy_stride, threshold, keep_scale, CAUSAL: tl.constexpr
):  # fmt: skip
    """p and g = dy * keep / (1 - dropout_p), both zero where causality hides, whatever dy holds there."""
    fetched, seen = within_columns(cols, row_inside, visible, n, CAUSAL)
    at = (row.to(tl.int64) * n)[:, None] + cols[None, :]
    dy_at = (row.to(tl.int64) * dy_stride)[:, None] + cols[None, :]
    p = tl.load(p_ptr + at, mask=fetched, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + dy_at, mask=fetched, other=0.0).to(tl.float32)
    if rng_ptr is not None:
        kept = philox.keep(tl.load(rng_ptr), tl.load(rng_ptr + 1), at, threshold)
        g = tl.where(kept, g * keep_scale, 0.0)
    return tl.where(seen, p, 0.0), tl.where(seen, g, 0.0)


@triton.jit
def _store_dx(dx_ptr, dx, row, cols, row_inside, n):
    inside = row_inside[:, None] & (cols < n)[None, :]
    tl.store(
        dx_ptr + (row.to(tl.int64) * n)[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["members", "splits", "queries", "size1", "size2", "size3", "threshold"])
def _softmax_dmask_kernel(
    dy_ptr, p_ptr, inner_ptr, out_ptr, partials_ptr, members, splits, n, dy_stride, queries, size1, size2, size3,
    rng_ptr, threshold, keep_scale, CAUSAL: tl.constexpr, SHARED: tl.constexpr, DIMS: tl.constexpr,
    ONE_COLUMN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The sum of ds over the `members` rows that share a row of the mask, a part of them in every split.

    out: [rows of the mask, its columns], written if there is one split; else partials: [splits, as out], fp32. Which
    one depends on the number of rows, and must not be a matter of types. Grid: splits outermost, columns innermost.
    """
    blocks = 1 if ONE_COLUMN else (n + BLOCK_COLS - 1) // BLOCK_COLS
    groups = tl.num_programs(0) // blocks // splits
    group = tl.program_id(0) // blocks % groups
    split = tl.program_id(0) // blocks // groups
    first = (tl.program_id(0) % blocks) * BLOCK_COLS
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for begin in range(split * BLOCK_ROWS, members, splits * BLOCK_ROWS):
        member = begin + tl.arange(0, BLOCK_ROWS)
        inside = member < members
        row = _member_row(group, member, size1, size2, size3, SHARED, DIMS)
        inner = tl.load(inner_ptr + row, mask=inside, other=0.0)
        visible = tl.where(inside, n, 0)
        if CAUSAL:
            visible = tl.minimum(visible, tl.maximum(row % queries + 1 + n - queries, 0))
        for col in range(first, n if ONE_COLUMN else first + BLOCK_COLS, BLOCK_COLS):
            cols = col + tl.arange(0, BLOCK_COLS)
            p, g = _p_and_g(
                dy_ptr,
                p_ptr,
                rng_ptr,
                row,
                cols,
                inside,
                visible,
                n,
                dy_stride,
                threshold,
                keep_scale,
                CAUSAL,
            )
            seen = within_columns(cols, inside, visible, n, CAUSAL)[1]
            acc, lost = add_compensated(acc, lost, tl.where(seen, p * (g - inner[:, None]), 0.0))
    total = tl.sum(acc, axis=0)
    out_row = split.to(tl.int64) * groups + group
    if ONE_COLUMN:
        at = out_row
        total = tl.sum(total, axis=0)
        stored = None
    else:
        cols = first + tl.arange(0, BLOCK_COLS)
        at = out_row * n + cols
        stored = cols < n
    if splits == 1:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        tl.store(partials_ptr + at, total, mask=stored)


@triton.jit
def _member_row(group, member, size1, size2, size3, SHARED: tl.constexpr, DIMS: tl.constexpr):
    """The row of x: bit d of SHARED says whether `member` or `group` counts along dimension d of the rows."""
    row, step = member * 0, 1
    for k in tl.static_range(DIMS):
        size = size3 if k == 0 else (size2 if k == 1 else size1)
        if (SHARED >> (3 - k)) & 1:
            row += (member if k == DIMS - 1 else member % size) * step
            member //= size
        else:
            row += (group if k == DIMS - 1 else group % size) * step
            group //= size
        step *= size
    return row
