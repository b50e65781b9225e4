"""Attention for a few queries: split over the keys, so that one token of one sequence still fills the GPU.

A program attends all queries of all heads that share one key head, packed as the rows of a tile, to one part of the
keys, and leaves acc, m and l (attention_fwd.py) in fp32; a second kernel combines the parts in a fixed order:

    M = max m_i;  out = sum 2^(m_i - M) acc_i / L,  L = sum 2^(m_i - M) l_i,  lse = ln 2 * (M + log2 L)

The number of parts is a run-time number: it grows with the keys and falls with the programs, and compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.triton.attention_config import decode_config
from fastgpt_kernels.triton.attention_fwd import allocate, attend_range, finish
from fastgpt_kernels.triton.attention_tile import (
    UNSPECIALIZED,
    Call,
    block_range,
    head,
    head_rules,
    power,
    sequence,
    step,
)
from fastgpt_kernels.triton.common import cdiv, processors
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import INTERPRETING, launch

MAX_QUERIES = 16
_MAX_PARTS = 128


def parts_of(programs: int, keys: int, block: int, processors: int) -> int:
    """Into how many parts the keys go: two programs per processor, but no part below two blocks."""
    wanted = cdiv(2 * processors, max(programs, 1))
    return max(1, min(wanted, cdiv(keys, 2 * block), _MAX_PARTS))


def launch_decode(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attention_fwd`."""
    out, lse = allocate(call)
    opts, device = call.options, call.q.device
    packed = call.queries * opts.group
    config = decode_config(opts, packed, call.q.dtype, arch_of(device))
    tiles = cdiv(packed, config.BLOCK_M)
    programs = tiles * call.batch * call.kv_heads
    parts = parts_of(programs, call.keys, config.BLOCK_N, processors(device))
    acc = memory.empty((parts, lse.numel(), opts.value_width), torch.float32, device)
    ml = memory.empty((parts, 2, lse.numel()), torch.float32, device)
    launch(
        _attention_decode_kernel, (programs * parts,), call.q, call.k, call.v, acc, ml, **call.named,
        kv_heads=call.kv_heads, tiles=tiles, parts=parts, all_rows=lse.numel(),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    rows = 16 if INTERPRETING else 1
    launch(
        _attention_combine_kernel, (cdiv(lse.numel(), rows),), acc, ml, out, lse, heads=call.heads, rows=lse.shape[2],
        keep_scale=call.keep_scale, parts=parts, all_rows=lse.numel(), opts=opts, PARTS=16, ROWS=rows,
        num_warps=4,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "kv_heads", "tiles", "parts", "all_rows"])
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, ml_ptr, mask_ptr, alibi_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, rng_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, rows, scale, cap, left, right, threshold, kv_heads, tiles, parts, all_rows,
    opts: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of the same keys side by side, then the parts.
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    part, program = program % parts, program // parts
    kv_head, b = program % kv_heads, program // kv_heads

    Lq, Lk, first_q, first_k = sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts)
    packed = (
        tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    )  # row t * group + g: query t of the group's head g
    inside = packed < Lq * opts.group
    t = tl.minimum(packed // opts.group, Lq)
    h = kv_head * opts.group + packed % opts.group
    rules = head_rules(
        b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
        heads, queries, keys, scale, cap, left, right, threshold, opts,
    )  # fmt: skip
    k_head = head(k_ptr, b, kv_head, first_k, k_sb, k_sh, k_st, opts)
    v_head = head(v_ptr, b, kv_head, first_k, v_sb, v_sh, v_st, opts)
    q_row = head(q_ptr, b, h, first_q, q_sb, q_sh, q_st, opts) + t.to(tl.int64) * step(q_st, opts)
    column = tl.arange(0, opts.D)[None, :]
    q = tl.load(q_row + column, mask=inside & (column < opts.width), other=0.0)

    begin, inner_begin, inner_end, end = block_range(
        0, Lq - 1, rules.shift, left, right, Lk, opts.left, opts.right, BLOCK_N
    )
    size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), parts) * BLOCK_N
    begin += part * size
    end = tl.maximum(tl.minimum(begin + size, end), begin)
    inner_begin = tl.minimum(tl.maximum(inner_begin, begin), end)
    inner_end = tl.minimum(tl.maximum(inner_end, inner_begin), end)
    acc, m, l = attend_range(
        q, k_head, v_head, k_st, v_st, t, begin, inner_begin, inner_end, end, rules, opts, BLOCK_M, BLOCK_N
    )
    place = h.to(tl.int64) * rows + first_q + t  # in lse
    if not opts.varlen:
        place += b.to(tl.int64) * heads * rows
    column = tl.arange(0, opts.DV)[None, :]
    acc_at = (part.to(tl.int64) * all_rows + place) * opts.value_width + column
    tl.store(acc_ptr + acc_at, acc, mask=inside & (column < opts.value_width))
    ml_at = part.to(tl.int64) * 2 * all_rows + place
    tl.store(ml_ptr + ml_at, m[:, None], mask=inside)
    tl.store(ml_ptr + ml_at + all_rows, l[:, None], mask=inside)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "parts", "all_rows"])
def _attention_combine_kernel(
    acc_ptr, ml_ptr, out_ptr, lse_ptr, heads, rows, keep_scale, parts, all_rows,
    opts: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < all_rows
    column = tl.arange(0, opts.DV)[None, :]
    stored = inside[:, None] & (column < opts.value_width)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    DV: tl.constexpr = opts.DV
    acc = tl.zeros([ROWS, DV], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None].to(tl.int64)
        there = (part < parts) & inside[None, :]
        m_part = tl.load(ml_ptr + part * 2 * all_rows + place[None, :], mask=there, other=-float("inf"))
        l_part = tl.load(ml_ptr + (part * 2 + 1) * all_rows + place[None, :], mask=there, other=0.0)
        acc_at = (part * all_rows + place[None, :])[:, :, None] * opts.value_width + column[None, :, :]
        acc_part = tl.load(acc_ptr + acc_at, mask=(part < parts)[:, :, None] & stored[None, :, :], other=0.0)
        higher = tl.maximum(m, tl.max(m_part, 0))
        base = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        weight = power(m_part, base[None, :], opts)  # [PARTS, ROWS]
        shrink = power(m, base, opts)
        l = l * shrink + tl.sum(weight * l_part, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * acc_part, 0)
        m = higher
    out, lse = finish(acc, m, l, keep_scale, opts)
    row = (place // rows // heads * rows + place % rows) * heads + place // rows % heads  # [B, T, H]
    out_at = row[:, None] * opts.value_width + column
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + place, lse, mask=inside)
