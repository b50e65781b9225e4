"""The gradient of attention's float mask, in Triton: ds, summed over the dimensions that the mask broadcasts.

A program owns one tile of the mask and computes ds of every place of [B, H, Tq, Tk] where that tile was added, in a
fixed order: one tile of the scores for a mask [B, H, Tq, Tk], all heads of all sequences for a mask [1, 1, Tq, Tk],
a row of tiles in each of them for a mask [1, 1, 1, Tk].
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.triton import attention_bwd_tile as bwd
from fastgpt_kernels.triton import attention_tile as tile
from fastgpt_kernels.triton.attention_bwd_config import dmask_config
from fastgpt_kernels.triton.common import cdiv
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch


def launch_dmask(call: tile.Call, mask: Tensor, inputs: tuple[Tensor, ...], common: dict[str, Any]) -> Tensor:
    """dmask, of the mask's shape and dtype. inputs, common: as in `attention_bwd`."""
    dmask = memory.empty(mask.shape, mask.dtype, mask.device)
    config = dmask_config(call.options, call.q.dtype, arch_of(call.q.device))
    mask_batch, mask_heads, mask_queries, mask_keys = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    # The whole of a broadcast dimension belongs to one tile.
    tiles = cdiv(mask_queries, config.BLOCK_M) * cdiv(mask_keys, config.BLOCK_N)
    launch(
        _attention_bwd_dmask_kernel, (mask_batch * mask_heads * tiles,), *inputs, dmask, **common,
        batch=call.batch, mask_batch=mask_batch, mask_heads=mask_heads, mask_queries=mask_queries,
        mask_keys=mask_keys, SUM_M=mask_queries == 1, SUM_N=mask_keys == 1,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dmask


@triton.jit(do_not_specialize=bwd.UNSPECIALIZED)
def _attention_bwd_dmask_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dmask_ptr,
    mask_ptr, alibi_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, rng_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, dout_sb, dout_sh, dout_st,
    mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, rows, scale, cap, left, right, threshold, grad_scale, keep_scale,
    batch, mask_batch, mask_heads, mask_queries, mask_keys, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    opts: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(mask_queries, BLOCK_M), tl.cdiv(mask_keys, BLOCK_N)
    program = tl.program_id(0)
    tile_n, program = program % blocks_n, program // blocks_n
    tile_m, program = program % blocks_m, program // blocks_m
    mask_h, mask_b = program % mask_heads, program // mask_heads
    q_st, k_st = tile.step(q_st, opts), tile.step(k_st, opts)
    v_st, dout_st = tile.step(v_st, opts), tile.step(dout_st, opts)
    sequences = tl.where(mask_batch == 1, batch, 1)
    heads_summed = tl.where(mask_heads == 1, heads, 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(sequences):
        b = mask_b + i
        Lq, Lk, first_q, first_k = tile.sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts)
        m_begin, m_end = tile_m * BLOCK_M, tl.minimum(tile_m * BLOCK_M + BLOCK_M, Lq)
        if SUM_M:
            m_end = Lq
        for j in range(heads_summed):
            h = mask_h + j
            kv_head = h // opts.group
            rules = tile.head_rules(
                b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
                heads, queries, keys, scale, cap, left, right, threshold, opts,
            )  # fmt: skip
            q_head = tile.head(q_ptr, b, h, first_q, q_sb, q_sh, q_st, opts)
            dout_head = tile.head(dout_ptr, b, h, first_q, dout_sb, dout_sh, dout_st, opts)
            k_head = tile.head(k_ptr, b, kv_head, first_k, k_sb, k_sh, k_st, opts)
            v_head = tile.head(v_ptr, b, kv_head, first_k, v_sb, v_sh, v_st, opts)
            at = bwd.statistics_row(b, h, first_q, heads, rows, opts)
            for row_m in range(m_begin, m_end, BLOCK_M):
                n_begin, _, _, n_end = tile.block_range(
                    row_m, tl.minimum(row_m + BLOCK_M, Lq) - 1, Lk - Lq, left, right, Lk,
                    opts.left, opts.right, BLOCK_N,
                )  # fmt: skip
                if not SUM_N:
                    n_begin = tl.maximum(n_begin, tile_n * BLOCK_N)
                    n_end = tl.minimum(n_end, tile_n * BLOCK_N + BLOCK_N)
                q = tile.load_rows(q_head, row_m, Lq, q_st, opts.width, BLOCK_M, opts.D, True)
                dout = tile.load_rows(dout_head, row_m, Lq, dout_st, opts.value_width, BLOCK_M, opts.DV, True)
                lse2, delta = bwd.statistics(lse2_ptr + at, delta_ptr + at, row_m, Lq, BLOCK_M, True)
                t = (row_m + tl.arange(0, BLOCK_M))[:, None]
                for row_n in range(n_begin, n_end, BLOCK_N):
                    k = tile.load_rows(k_head, row_n, Lk, k_st, opts.width, BLOCK_N, opts.D, True)
                    v = tile.load_rows(v_head, row_n, Lk, v_st, opts.value_width, BLOCK_N, opts.DV, True)
                    n = (row_n + tl.arange(0, BLOCK_N))[None, :]
                    qk = bwd.row_products(
                        q, k, q_head, row_m, Lq, q_st, k_head, row_n, Lk, k_st, opts.width, opts
                    )
                    p, capped, hidden = bwd.probabilities(qk, t, n, lse2[:, None], rules, opts, True)
                    dp = bwd.row_products(
                        dout, v, dout_head, row_m, Lq, dout_st, v_head, row_n, Lk, v_st, opts.value_width, opts
                    )  # fmt: skip
                    if opts.dropout:
                        dp = tl.where(tile.kept(t, n, rules), dp * keep_scale, 0.0)
                    acc += bwd.score_gradients(p, dp, delta[:, None], capped, hidden, False, opts, True)
    m, n = (
        tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None],
        tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :],
    )
    if SUM_M:
        acc = tl.sum(acc, axis=0, keep_dims=True)
        m = tl.zeros([1, 1], tl.int32)
    if SUM_N:
        acc = tl.sum(acc, axis=1, keep_dims=True)
        n = tl.zeros([1, 1], tl.int32)
    at = ((mask_b.to(tl.int64) * mask_heads + mask_h) * mask_queries + m) * mask_keys + n
    tl.store(dmask_ptr + at, acc.to(dmask_ptr.dtype.element_ty), mask=(m < mask_queries) & (n < mask_keys))
