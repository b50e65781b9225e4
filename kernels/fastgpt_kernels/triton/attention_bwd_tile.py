"""What the three backward kernels of attention share: names, rows' statistics, p and ds of one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt_kernels.triton import attention_tile as tile

UNSPECIALIZED = [
    *tile.UNSPECIALIZED, "dout_sb", "dout_sh", "dout_st", "out_sb", "out_sh", "out_st",
    "dq_sb", "dq_sh", "dq_st", "dk_sb", "dk_sh", "dk_st", "dv_sb", "dv_sh", "dv_st",
    "grad_scale", "keep_scale", "pairs", "blocks", "section", "batch",
    "mask_batch", "mask_heads", "mask_queries", "mask_keys",
]  # fmt: skip


# Columns at a time of an fp32 product: without a matrix unit, a thread has whole rows of operands in registers.
CHUNK = tl.constexpr(32)


@triton.jit
def row_products(
    a, b, a_ptr, a_row, a_end, a_st, b_ptr, b_row, b_end, b_st, width: tl.constexpr, opts: tl.constexpr
):
    """a b^T of two tiles of rows, which lie at a_ptr and b_ptr: wide fp32 ones are read from there in chunks."""
    if a.dtype == tl.float32 and a.shape[1] > CHUNK:
        A: tl.constexpr = a.shape[0]
        B: tl.constexpr = b.shape[0]
        rows_a, rows_b = a_row + tl.arange(0, A)[:, None], b_row + tl.arange(0, B)[:, None]
        a_at = a_ptr + rows_a * a_st.to(tl.int64)
        b_at = b_ptr + rows_b * b_st.to(tl.int64)
        product = tl.zeros([A, B], tl.float32)
        for first in range(0, width, CHUNK):
            column = first + tl.arange(0, CHUNK)[None, :]
            part_a = tl.load(a_at + column, mask=(rows_a < a_end) & (column < width), other=0.0)
            part_b = tl.load(b_at + column, mask=(rows_b < b_end) & (column < width), other=0.0)
            product = tl.dot(part_a, tl.trans(part_b), product, input_precision="ieee")
        return product
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def statistics(lse2_ptr, delta_ptr, row, end, BLOCK_M: tl.constexpr, bounded: tl.constexpr):
    """(lse in the base of the scores, delta) of BLOCK_M rows; past the end +inf and 0, so that p and ds are 0."""
    at = row + tl.arange(0, BLOCK_M)
    if bounded:
        lse2 = tl.load(lse2_ptr + at, mask=at < end, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=at < end, other=0.0)
    else:
        lse2, delta = tl.load(lse2_ptr + at), tl.load(delta_ptr + at)
    return lse2, delta


@triton.jit
def statistics_row(b, h, first_q, heads, rows, opts: tl.constexpr):
    """Where the statistics of sequence b, head h begin in [B, H, rows]."""
    if opts.varlen:
        return h.to(tl.int64) * rows + first_q
    else:
        return (b.to(tl.int64) * heads + h) * rows


@triton.jit
def probabilities(qk, t, k, lse2, rules, opts: tl.constexpr, bounded: tl.constexpr):
    """(p, capped, hidden) of a tile, from q k^T; `hidden` selects, as 0 * NaN would not."""
    s, capped = tile.scores(qk, t, k, rules, opts, bounded)
    p = tile.power(s * rules.unit, lse2, opts)
    hidden = s == -float("inf")
    if opts.mask == tile.FLOAT_MASK:  # a row of nothing but finite minima: its lse is too coarse to say p
        p = tl.where(p > 1.0, 1.0, p)
    if bounded:  # a query past the end is 0, and NaN times an infinite key
        hidden |= t >= rules.queries
    if bounded or opts.mask != tile.NO_MASK:
        p = tl.where(hidden, 0.0, p)
    return p, capped, hidden


@triton.jit
def score_gradients(
    p, dp, delta, capped, hidden, softcap: tl.constexpr, opts: tl.constexpr, bounded: tl.constexpr
):
    """ds; with softcap, of the scores before it."""
    ds = p * (dp - delta)
    if softcap:
        ds *= 1.0 - capped * capped
    if bounded or opts.mask != tile.NO_MASK:
        ds = tl.where(hidden, 0.0, ds)
    return ds
