"""The tiled attention forward: a program per block of queries of one head, online softmax over the keys.

    m' = max(m, max s);  p = 2^(s - m');  l = l * 2^(m - m') + sum p;  acc = acc * 2^(m - m') + p v
    out = acc / l,  lse = ln 2 * (m + log2 l)

Dao, "FlashAttention-2" (2023), algorithm 1. p is rounded to the inputs' dtype before its product with v, relative to
the running maximum: never to less precision than p itself would have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.triton.attention_config import forward_config
from fastgpt_kernels.triton.attention_tile import (
    FLOAT_MASK,
    LN2,
    NO_MASK,
    UNSPECIALIZED,
    Call,
    block_range,
    head,
    head_rules,
    kept,
    load_rows,
    power,
    scores,
    sequence,
    step,
)
from fastgpt_kernels.triton.common import cdiv, sixteen_warps
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch

_CACHED_BYTES = 16 << 20  # of keys and values that the heads worked on at one time may take of the L2 cache


def allocate(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), not yet written; the padding between documents has no rows."""
    q = call.q
    batch, heads, rows = q.shape[:3]
    out = memory.empty((batch, rows, heads, call.options.value_width), q.dtype, q.device).transpose(1, 2)
    return out, memory.empty((batch, heads, rows), torch.float32, q.device)


def launch_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attention_fwd`."""
    out, lse = allocate(call)
    arch = arch_of(call.q.device)
    config = forward_config(call.options, call.q.dtype, arch)
    # Wide rows in fp32 are held whole in registers.
    wide = call.q.dtype == torch.float32 and max(call.options.D, call.options.DV) > 128
    spare = sixteen_warps(arch, config.num_warps) if wide else {}
    blocks, heads = cdiv(call.queries, config.BLOCK_M), call.batch * call.heads
    head_bytes = call.keys * (call.options.width + call.options.value_width) * call.q.element_size()
    section = max(_CACHED_BYTES // max(head_bytes, 1), 1) * call.options.group
    launch(
        _attention_fwd_kernel, (blocks * heads,), call.q, call.k, call.v, out, lse, **call.named,
        keep_scale=call.keep_scale, blocks=blocks, all_heads=heads, section=min(section, heads),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps, num_stages=config.num_stages,
        **spare,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "blocks", "all_heads", "section"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, alibi_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, rng_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, rows, scale, cap, left, right, threshold, keep_scale, blocks, all_heads, section,
    opts: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # As many heads at a time as the L2 cache holds the keys of; within them the longest blocks first.
    program = tl.program_id(0)
    first_head = program // (section * blocks) * section
    program -= first_head * blocks
    together = tl.minimum(section, all_heads - first_head)
    block = program // together
    if opts.right:
        block = blocks - 1 - block
    b, h = (first_head + program % together) // heads, (first_head + program % together) % heads

    Lq, Lk, first_q, first_k = sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts)
    row = block * BLOCK_M
    if row >= Lq:  # a document shorter than the longest
        return
    rules = head_rules(
        b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
        heads, queries, keys, scale, cap, left, right, threshold, opts,
    )  # fmt: skip
    q_head = head(q_ptr, b, h, first_q, q_sb, q_sh, q_st, opts)
    k_head = head(k_ptr, b, h // opts.group, first_k, k_sb, k_sh, k_st, opts)
    v_head = head(v_ptr, b, h // opts.group, first_k, v_sb, v_sh, v_st, opts)
    q = load_rows(q_head, row, Lq, step(q_st, opts), opts.width, BLOCK_M, opts.D, True)
    t = row + tl.arange(0, BLOCK_M)[:, None]
    last = tl.minimum(row + BLOCK_M, Lq) - 1
    begin, inner_begin, inner_end, end = block_range(
        row, last, rules.shift, left, right, Lk, opts.left, opts.right, BLOCK_N
    )
    acc, m, l = attend_range(
        q, k_head, v_head, k_st, v_st, t, begin, inner_begin, inner_end, end, rules, opts, BLOCK_M, BLOCK_N
    )
    out, lse = finish(acc, m, l, keep_scale, opts)
    first_row = row.to(tl.int64) + first_q
    lse_at = h.to(tl.int64) * rows + first_row
    if not opts.varlen:
        lse_at += b.to(tl.int64) * heads * rows
        first_row += b.to(tl.int64) * rows
    t = tl.arange(0, BLOCK_M)
    column = tl.arange(0, opts.DV)[None, :]
    out_at = (first_row * heads + h) * opts.value_width + t[:, None] * heads * opts.value_width + column
    stored = (row + t)[:, None] < Lq
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=stored & (column < opts.value_width))
    tl.store(lse_ptr + lse_at + t, lse, mask=row + t < Lq)


@triton.jit
def attend_range(
    q, k_ptr, v_ptr, k_st, v_st, t, begin, inner_begin, inner_end, end, rules, opts: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(acc, m, l) of the rows `q` [ROWS, D] at positions t [ROWS, 1] over the ranges that `block_range` gives."""
    DV: tl.constexpr = opts.DV
    acc = tl.zeros([ROWS, DV], tl.float32)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    k_st, v_st = step(k_st, opts), step(v_st, opts)
    edge, gap = begin, begin * 0  # of the blocks begin .. end, those from `edge` on lie `gap` further
    if opts.mask == NO_MASK:
        acc, m, l = _attend(
            acc,
            m,
            l,
            q,
            k_ptr,
            v_ptr,
            k_st,
            v_st,
            t,
            inner_begin,
            inner_end,
            0,
            0,
            rules,
            opts,
            BLOCK_N,
            False,
        )
        if opts.left:  # both edges in one loop: with a third, sm_90 serializes its matrix instructions
            edge, gap = inner_begin, inner_end - inner_begin
            end -= gap
        else:
            begin = inner_end
    return _attend(
        acc, m, l, q, k_ptr, v_ptr, k_st, v_st, t, begin, end, edge, gap, rules, opts, BLOCK_N, True
    )


@triton.jit
def _attend(
    acc, m, l, q, k_ptr, v_ptr, k_st, v_st, t, begin, end, edge, gap, rules, opts: tl.constexpr,
    BLOCK_N: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    for block in tl.range(begin, end, BLOCK_N):
        start = block
        if bounded and opts.left and opts.mask == NO_MASK:
            start += tl.where(block >= edge, gap, 0)
        k = load_rows(k_ptr, start, rules.keys, k_st, opts.width, BLOCK_N, opts.D, bounded)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        position = start + tl.arange(0, BLOCK_N)[None, :]
        s, _ = scores(qk, t, position, rules, opts, bounded)
        # A NaN need not survive `max`: it comes back through 2^(NaN - m), by which l and acc become NaN.
        higher = tl.maximum(m, tl.max(s, 1) * rules.unit)
        # 2^(-inf - 0) is nothing, 2^(inf - 0) inf.
        base = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        p = power(s * rules.unit, base[:, None], opts)
        shrink = power(m, base, opts)
        l = l * shrink + tl.sum(p, 1)
        if opts.dropout:
            p = tl.where(kept(t, position, rules), p, 0.0)
        v = load_rows(v_ptr, start, rules.keys, v_st, opts.value_width, BLOCK_N, opts.DV, bounded)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = higher
    return acc, m, l


@triton.jit
def finish(acc, m, l, keep_scale, opts: tl.constexpr):
    """(out fp32, lse): zeros and -inf for a row that saw nothing, NaN and inf where a score is inf."""
    norm = tl.where(l == 0.0, 1.0, tl.where(m == float("inf"), float("nan"), l))
    out = acc / norm[:, None]
    if opts.dropout:
        out *= keep_scale
    if opts.mask == FLOAT_MASK:
        return out, m + tl.log2(l) * LN2
    else:
        return out, (m + tl.log2(l)) * LN2
