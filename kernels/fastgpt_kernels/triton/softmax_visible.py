"""Which columns a block of rows fetches and sees, for the kernels of softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_columns(row, rows, n, queries, CAUSAL: tl.constexpr):
    """(row < rows, how many columns causality leaves visible)."""
    row_inside = row < rows
    visible = tl.where(row_inside, n, 0)
    if CAUSAL:
        visible = tl.minimum(visible, tl.maximum(row % queries + 1 + n - queries, 0))
    return row_inside, visible


@triton.jit
def within_columns(cols, row_inside, visible, n, CAUSAL: tl.constexpr):
    """(what is fetched, what is visible)  # [rows, cols]

    Causality fetches up to a multiple of 16 columns, lest every element be fetched by an instruction of its own.
    """
    fetched = row_inside[:, None] & (cols < n)[None, :]
    seen = fetched
    if CAUSAL:
        reach = (visible + 15) // 16 * 16
        fetched = fetched & (cols[None, :] < reach[:, None])
        seen = seen & (cols[None, :] < visible[:, None])
    return fetched, seen
