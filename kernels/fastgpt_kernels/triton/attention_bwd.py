"""Attention backward in Triton: deterministic, in two loops over the tiles of the scores.

    p = exp(s - lse),  dp = dout v^T,  delta = rowsum(dout * out) - dlse,  ds = p * (dp - delta)
    dv = p^T dout,  dk = scale * ds^T q,  dq = scale * ds k

A program of the first loop owns a block of keys and runs over the queries that see it (dk, dv), one of the second
owns a block of queries and runs over its keys (dq). Computing the scores twice costs 7 products in place of 5; in
return nothing is summed by atomics, and the same inputs give the same bits. Dao, "FlashAttention-2" (2023),
section 3.1; delta is from there as well. The gradient of a float mask is a kernel of its own (`attention_dmask`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.triton import attention_bwd_tile as bwd
from fastgpt_kernels.triton import attention_dmask
from fastgpt_kernels.triton import attention_tile as tile
from fastgpt_kernels.triton.attention_bwd_config import candidates, dkdv_config, dq_config
from fastgpt_kernels.triton.common import Tunable, cdiv
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch

_L2_BYTES = (
    24 << 20
)  # what programs at work at the same time may read over and over: half the L2 of an A100 or H100


def launch_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, alibi_slopes: Tensor | None, kv_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int, packed: bool, need_dmask: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dmask); packed: (dqkv, None, None, dmask), dqkv [B, T, 3 * H * D]."""
    call = tile.describe(
        q, k, v, mask, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_k, rng,
        scale, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    dout, out = (_as_aligned(x, call.options.align) for x in (dout, out))
    delta, lse2 = _row_statistics(call, out, dout, lse, dlse)
    dqkv = None
    if packed:
        batch, heads, length, width = q.shape
        dqkv = memory.empty((batch, length, 3 * heads * width), q.dtype, q.device)
        dq, dk, dv = dqkv.view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        dq, dk, dv = _heads_inside(q), _heads_inside(k), _heads_inside(v)
    common = (
        call.named | tile.strides("dout", dout) | {"grad_scale": call.scale, "keep_scale": call.keep_scale}
    )
    inputs = (call.q, call.k, call.v, dout, lse2, delta)
    _launch_dkdv(call, inputs, dk, dv, common)
    _launch_dq(call, inputs, dq, common)
    dmask = None
    if need_dmask and mask is not None:
        dmask = attention_dmask.launch_dmask(call, mask, inputs, common)
    return (dq, dk, dv, dmask) if dqkv is None else (dqkv, None, None, dmask)


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, f"{dtype}-{width}-{form}", candidates(kernel, width), _problem(dtype, width, form))
        for kernel in ("attention_bwd_dkdv", "attention_bwd_dq")
        for dtype in ("bf16", "fp16")
        for width in (64, 128, 256)
        for form in ("causal", "full")
    ]


def _problem(dtype: str, width: int, form: str) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        shape, kind = (4, 2048, 16, width), torch.bfloat16 if dtype == "bf16" else torch.float16
        q, k, v, out, dout = (torch.randn(shape, dtype=kind, device=device).transpose(1, 2) for _ in range(5))
        lse = torch.full(q.shape[:3], 10.0, device=device)  # finite p: the time does not depend on its value
        right = 0 if form == "causal" else -1
        return lambda: launch_backward(
            dout, None, q, k, v, out, lse, None, None, None, None, None, None,
            width**-0.5, -1, right, 0.0, 0.0, 0, 0, False, False,
        )  # fmt: skip

    return make


def _as_aligned(x: Tensor, align: int) -> Tensor:
    """`x`, copied if its rows are not contiguous or less aligned than those of q, k and v."""
    x = tile.innermost_contiguous(x)
    return x if all(stride % align == 0 for stride in tile.strides("x", x).values()) else x.contiguous()


def _heads_inside(like: Tensor) -> Tensor:
    batch, heads, length, width = like.shape
    return memory.empty((batch, length, heads, width), like.dtype, like.device).transpose(1, 2)


def _row_statistics(
    call: tile.Call, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(delta, lse in the base of the scores), fp32 [B, H, rows]."""
    delta, lse2 = (memory.empty(lse.shape, torch.float32, lse.device) for _ in range(2))
    rows = lse.shape[2]
    block = max(16, 4096 // call.options.DV)
    launch(
        _attention_bwd_delta_kernel, (lse.shape[0] * lse.shape[1] * cdiv(rows, block),),
        out, dout, lse.contiguous(), None if dlse is None else dlse.contiguous(), delta, lse2,
        **tile.strides("out", out), **tile.strides("dout", dout), heads=call.heads, rows=rows,
        opts=call.options, BLOCK_M=block, num_warps=4,
    )  # fmt: skip
    return delta, lse2


def _launch_dkdv(
    call: tile.Call, inputs: tuple[Tensor, ...], dk: Tensor, dv: Tensor, common: dict[str, Any]
) -> None:
    config = dkdv_config(call.options, call.q.dtype, arch_of(call.q.device))
    # The keys of a batch element, not those below its length: every row gets its gradient, or zero.
    blocks, pairs = cdiv(call.keys, config.BLOCK_N), call.batch * call.kv_heads
    read = call.queries * call.options.group * (call.options.width + call.options.value_width)
    launch(
        _attention_bwd_dkdv_kernel, (blocks * pairs,), *inputs, dk, dv,
        **common, **tile.strides("dk", dk), **tile.strides("dv", dv),
        pairs=pairs, blocks=blocks, section=_section(pairs, read * call.q.element_size()),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_dq(call: tile.Call, inputs: tuple[Tensor, ...], dq: Tensor, common: dict[str, Any]) -> None:
    config = dq_config(call.options, call.q.dtype, arch_of(call.q.device))
    blocks, pairs = cdiv(call.queries, config.BLOCK_M), call.batch * call.heads
    read = call.keys * (call.options.width + call.options.value_width)
    launch(
        _attention_bwd_dq_kernel, (blocks * pairs,), *inputs, dq,
        **common, **tile.strides("dq", dq),
        pairs=pairs, blocks=blocks, section=_section(pairs, read * call.q.element_size()),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _section(pairs: int, bytes_read: int) -> int:
    """How many heads take turns, longest blocks first, so that what they all read stays in the L2 cache."""
    return max(1, min(pairs, _L2_BYTES // max(bytes_read, 1)))


@triton.jit(do_not_specialize=bwd.UNSPECIALIZED)
def _attention_bwd_delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr,
    out_sb, out_sh, out_st, dout_sb, dout_sh, dout_st, heads, rows,
    opts: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, and lse in the base of the scores: +inf, so that p is 0, where a query
    sees nothing."""
    blocks = tl.cdiv(rows, BLOCK_M)
    pair = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_M
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    out_ptr += b * tile.step(out_sb, opts) + h * tile.step(out_sh, opts)
    dout_ptr += b * tile.step(dout_sb, opts) + h * tile.step(dout_sh, opts)
    out_st, dout_st = tile.step(out_st, opts), tile.step(dout_st, opts)
    out = tile.load_rows(out_ptr, row, rows, out_st, opts.value_width, BLOCK_M, opts.DV, True)
    dout = tile.load_rows(dout_ptr, row, rows, dout_st, opts.value_width, BLOCK_M, opts.DV, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    at = row + tl.arange(0, BLOCK_M)
    inside = at < rows
    at += pair.to(tl.int64) * rows
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=inside, other=0.0)
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    if opts.mask != tile.FLOAT_MASK:
        lse *= tile.LOG2E
    tl.store(lse2_ptr + at, lse, mask=inside)


@triton.jit
def _place(program, pairs, blocks, section):
    """(pair, block): `section` pairs take turns block by block, then the next `section` of them."""
    at = program // (section * blocks)
    program -= at * section * blocks
    width = tl.minimum(section, pairs - at * section)
    return at * section + program % width, program // width


@triton.jit
def _dkdv_tile(
    dk, dv, k, v, k_ptr, v_ptr, k_st, v_st, row_n, row, q_ptr, dout_ptr, lse2_ptr, delta_ptr, q_st, dout_st,
    keep_scale, rules, opts: tl.constexpr, BLOCK_M: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """Adds the queries row .. row + BLOCK_M. Scores are held as [keys, queries], so that p and ds go into their
    products from registers, as they are."""
    q = tile.load_rows(q_ptr, row, rules.queries, q_st, opts.width, BLOCK_M, opts.D, bounded)
    lse2, delta = bwd.statistics(lse2_ptr, delta_ptr, row, rules.queries, BLOCK_M, bounded)
    t = (row + tl.arange(0, BLOCK_M))[None, :]
    n = (row_n + tl.arange(0, k.shape[0]))[:, None]
    qk = bwd.row_products(
        k, q, k_ptr, row_n, rules.keys, k_st, q_ptr, row, rules.queries, q_st, opts.width, opts
    )
    p, capped, hidden = bwd.probabilities(qk, t, n, lse2[None, :], rules, opts, bounded)
    dout = tile.load_rows(dout_ptr, row, rules.queries, dout_st, opts.value_width, BLOCK_M, opts.DV, bounded)
    dp = bwd.row_products(
        v, dout, v_ptr, row_n, rules.keys, v_st, dout_ptr, row, rules.queries, dout_st, opts.value_width, opts
    )
    if opts.dropout:
        keep = tile.kept(t, n, rules)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        p_kept = tl.where(keep, p * keep_scale, 0.0)
        dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision="ieee")
    else:
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = bwd.score_gradients(p, dp, delta[None, :], capped, hidden, opts.softcap, opts, bounded)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=bwd.UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    mask_ptr, alibi_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, rng_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, dout_sb, dout_sh, dout_st,
    dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, rows, scale, cap, left, right, threshold, grad_scale, keep_scale,
    pairs, blocks, section,
    opts: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, summed over its query heads in their order."""
    # Under causality the first keys are seen by most queries: longest first is the order as it is.
    pair, block = _place(tl.program_id(0), pairs, blocks, section)
    kv_heads = heads // opts.group
    b, kv_head = pair // kv_heads, pair % kv_heads
    row_n = block * BLOCK_N
    Lq, Lk, first_q, first_k = tile.sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts)
    stored = keys  # rows of this sequence, those past its length included
    if opts.varlen:
        stored = tl.load(cu_k_ptr + b + 1) - first_k
    q_st, k_st = tile.step(q_st, opts), tile.step(k_st, opts)
    v_st, dout_st = tile.step(v_st, opts), tile.step(dout_st, opts)
    k_ptr = tile.head(k_ptr, b, kv_head, first_k, k_sb, k_sh, k_st, opts)
    v_ptr = tile.head(v_ptr, b, kv_head, first_k, v_sb, v_sh, v_st, opts)
    k = tile.load_rows(k_ptr, row_n, Lk, k_st, opts.width, BLOCK_N, opts.D, True)
    v = tile.load_rows(v_ptr, row_n, Lk, v_st, opts.value_width, BLOCK_N, opts.DV, True)
    n = (row_n + tl.arange(0, BLOCK_N))[:, None]
    begin, inner_begin, inner_end, end = tile.block_range(
        row_n, tl.minimum(row_n + BLOCK_N, Lk) - 1, Lq - Lk, right, left, tl.where(row_n < Lk, Lq, 0),
        opts.right, opts.left, BLOCK_M,
    )  # fmt: skip
    before = tl.cdiv(tl.maximum(inner_begin - begin, 0), BLOCK_M)
    edges = before + tl.cdiv(tl.maximum(end - inner_end, 0), BLOCK_M)
    D: tl.constexpr = opts.D
    DV: tl.constexpr = opts.DV
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for i in range(opts.group):
        h = kv_head * opts.group + i
        rules = tile.head_rules(
            b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
            heads, queries, keys, scale, cap, left, right, threshold, opts,
        )  # fmt: skip
        q_head = tile.head(q_ptr, b, h, first_q, q_sb, q_sh, q_st, opts)
        dout_head = tile.head(dout_ptr, b, h, first_q, dout_sb, dout_sh, dout_st, opts)
        at = bwd.statistics_row(b, h, first_q, heads, rows, opts)
        for j in range(edges):
            row = tl.where(j < before, begin + j * BLOCK_M, inner_end + (j - before) * BLOCK_M)
            dk, dv = _dkdv_tile(
                dk, dv, k, v, k_ptr, v_ptr, k_st, v_st, row_n, row, q_head, dout_head, lse2_ptr + at, delta_ptr + at,
                q_st, dout_st, keep_scale, rules, opts, BLOCK_M, True,
            )  # fmt: skip
        for row in range(inner_begin, inner_end, BLOCK_M):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, k_ptr, v_ptr, k_st, v_st, row_n, row, q_head, dout_head, lse2_ptr + at, delta_ptr + at,
                q_st, dout_st, keep_scale, rules, opts, BLOCK_M, False,
            )  # fmt: skip
    # Keys past the length took part as zeros, not hidden: what was summed for them is dropped here.
    dk_st, dv_st = tile.step(dk_st, opts), tile.step(dv_st, opts)
    dk_ptr = tile.head(dk_ptr, b, kv_head, first_k, dk_sb, dk_sh, dk_st, opts)
    dv_ptr = tile.head(dv_ptr, b, kv_head, first_k, dv_sb, dv_sh, dv_st, opts)
    store_rows(dk_ptr, tl.where(n < Lk, dk * grad_scale, 0.0), row_n, stored, dk_st, opts.width)
    store_rows(dv_ptr, tl.where(n < Lk, dv, 0.0), row_n, stored, dv_st, opts.value_width)


@triton.jit
def store_rows(ptr, x, row, end, stride, width: tl.constexpr):
    rows = tl.arange(0, x.shape[0])[:, None]
    columns = tl.arange(0, x.shape[1])[None, :]
    at = ptr + row.to(tl.int64) * stride + rows * stride + columns
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(row + rows < end) & (columns < width))


@triton.jit
def _dq_tile(
    dq, q, dout, q_ptr, dout_ptr, q_st, dout_st, row_m, lse2, delta, row, k_ptr, v_ptr, k_st, v_st,
    keep_scale, rules, opts: tl.constexpr, BLOCK_N: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """Adds the keys row .. row + BLOCK_N."""
    k = tile.load_rows(k_ptr, row, rules.keys, k_st, opts.width, BLOCK_N, opts.D, bounded)
    t = (row_m + tl.arange(0, q.shape[0]))[:, None]
    n = (row + tl.arange(0, BLOCK_N))[None, :]
    qk = bwd.row_products(
        q, k, q_ptr, row_m, rules.queries, q_st, k_ptr, row, rules.keys, k_st, opts.width, opts
    )
    p, capped, hidden = bwd.probabilities(qk, t, n, lse2, rules, opts, bounded)
    v = tile.load_rows(v_ptr, row, rules.keys, v_st, opts.value_width, BLOCK_N, opts.DV, bounded)
    dp = bwd.row_products(
        dout, v, dout_ptr, row_m, rules.queries, dout_st, v_ptr, row, rules.keys, v_st, opts.value_width, opts
    )
    if opts.dropout:
        dp = tl.where(tile.kept(t, n, rules), dp * keep_scale, 0.0)
    ds = bwd.score_gradients(p, dp, delta, capped, hidden, opts.softcap, opts, bounded)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=bwd.UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr,
    mask_ptr, alibi_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, rng_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, dout_sb, dout_sh, dout_st,
    dq_sb, dq_sh, dq_st, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, rows, scale, cap, left, right, threshold, grad_scale, keep_scale,
    pairs, blocks, section,
    opts: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    pair, block = _place(tl.program_id(0), pairs, blocks, section)
    if opts.causal:  # the last queries see most keys: they go first
        block = blocks - 1 - block
    b, h = pair // heads, pair % heads
    row_m = block * BLOCK_M
    Lq, Lk, first_q, first_k = tile.sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts)
    q_st, k_st = tile.step(q_st, opts), tile.step(k_st, opts)
    v_st, dout_st = tile.step(v_st, opts), tile.step(dout_st, opts)
    kv_head = h // opts.group
    q_ptr = tile.head(q_ptr, b, h, first_q, q_sb, q_sh, q_st, opts)
    dout_ptr = tile.head(dout_ptr, b, h, first_q, dout_sb, dout_sh, dout_st, opts)
    k_ptr = tile.head(k_ptr, b, kv_head, first_k, k_sb, k_sh, k_st, opts)
    v_ptr = tile.head(v_ptr, b, kv_head, first_k, v_sb, v_sh, v_st, opts)
    q = tile.load_rows(q_ptr, row_m, Lq, q_st, opts.width, BLOCK_M, opts.D, True)
    dout = tile.load_rows(dout_ptr, row_m, Lq, dout_st, opts.value_width, BLOCK_M, opts.DV, True)
    at = bwd.statistics_row(b, h, first_q, heads, rows, opts)
    lse2, delta = bwd.statistics(lse2_ptr + at, delta_ptr + at, row_m, Lq, BLOCK_M, True)
    lse2, delta = lse2[:, None], delta[:, None]
    rules = tile.head_rules(
        b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
        heads, queries, keys, scale, cap, left, right, threshold, opts,
    )  # fmt: skip
    begin, inner_begin, inner_end, end = tile.block_range(
        row_m, tl.minimum(row_m + BLOCK_M, Lq) - 1, Lk - Lq, left, right, tl.where(row_m < Lq, Lk, 0),
        opts.left, opts.right, BLOCK_N,
    )  # fmt: skip
    before = tl.cdiv(tl.maximum(inner_begin - begin, 0), BLOCK_N)
    edges = before + tl.cdiv(tl.maximum(end - inner_end, 0), BLOCK_N)
    D: tl.constexpr = opts.D
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for j in range(edges):
        row = tl.where(j < before, begin + j * BLOCK_N, inner_end + (j - before) * BLOCK_N)
        dq = _dq_tile(
            dq, q, dout, q_ptr, dout_ptr, q_st, dout_st, row_m, lse2, delta, row, k_ptr, v_ptr, k_st, v_st,
            keep_scale, rules, opts, BLOCK_N, True,
        )  # fmt: skip
    for row in range(inner_begin, inner_end, BLOCK_N):
        dq = _dq_tile(
            dq, q, dout, q_ptr, dout_ptr, q_st, dout_st, row_m, lse2, delta, row, k_ptr, v_ptr, k_st, v_st,
            keep_scale, rules, opts, BLOCK_N, False,
        )  # fmt: skip
    dq_st = tile.step(dq_st, opts)
    dq_ptr = tile.head(dq_ptr, b, h, first_q, dq_sb, dq_sh, dq_st, opts)
    store_rows(dq_ptr, dq * grad_scale, row_m, Lq, dq_st, opts.width)
