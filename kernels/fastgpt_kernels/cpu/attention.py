"""Attention by csrc/cpu/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.masks import dropout_args

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2  # enum MaskKind in attention.h
_FAR = 1 << 40  # a window beyond any length, to which positions can still be added
PAIRS = kernels.is_amd()  # whether bf16 is multiplied in pairs: is_amd says why; the tests prove both ways


def supports(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int, need_lse: bool,
) -> str | None:  # fmt: skip
    """None, or the reason why not."""
    reason = unsupported(q)
    if reason is None and mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        reason = f"needs a mask of bool, float32 or {q.dtype}, got {mask.dtype}"
    return reason


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, Tq, Dv] over [B, Tq, H, Dv] storage, lse [B, H, Tq] fp32); lse costs nothing here."""
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    batch, heads, rows, _ = q.shape
    out = memory.heads_inside((batch, heads, rows, v.shape[3]), q)
    lse = memory.empty((batch, heads, rows), torch.float32, q.device)
    if lse.numel() == 0:
        return out, lse
    call, alive = _describe(
        q, k, v, mask, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q, max_seqlen_k,
        dropout_p,
    )  # fmt: skip
    pointers, shapes, masks, (threshold, keep_scale) = call
    kernels.attention_fwd(
        *pointers, out.data_ptr(), lse.data_ptr(), *shapes, *masks, scale, softcap, min(window_left, _FAR),
        min(window_right, _FAR), threshold, keep_scale, DTYPE_CODES[q.dtype], PAIRS, get_num_threads(),
    )  # fmt: skip
    del alive
    return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, alibi_slopes: Tensor | None, kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, rng: Tensor | None, scale: float, window_left: int, window_right: int,
    softcap: float, dropout_p: float, max_seqlen_q: int, max_seqlen_k: int, packed: bool, need_dmask: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dmask), each over [B, T, H, D] storage; packed: (dqkv [B, T, 3 * H * D], None, None, dmask)."""
    q, k, v, dout, out = (_rows_contiguous(x) for x in (q, k, v, dout, out))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    batch, heads, rows, width = q.shape
    if packed:
        dqkv = memory.empty((batch, rows, 3 * heads * width), q.dtype, q.device)
        grads = dqkv.view(batch, rows, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        dqkv = None
        grads = tuple(memory.heads_inside(x.shape, x) for x in (q, k, v))
    dmask: Tensor | None = None
    dmask_shape: tuple[int, ...] = (1, 1, 1, 1)
    if need_dmask and mask is not None:
        dmask = memory.empty(mask.shape, torch.float32, mask.device).zero_()
        dmask_shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if lse.numel() == 0 or k.shape[2] == 0:
        for grad in grads:
            grad.zero_()
    else:
        call, alive = _describe(
            q, k, v, mask, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q, max_seqlen_k,
            dropout_p,
        )  # fmt: skip
        pointers, shapes, masks, (threshold, keep_scale) = call
        kernels.attention_bwd(
            *pointers, dout.data_ptr(), out.data_ptr(), lse.data_ptr(), _at(dlse), *(g.data_ptr() for g in grads),
            *shapes, *(step for x in (dout, out, *grads) for step in x.stride()[:3]), *masks, scale, softcap,
            min(window_left, _FAR), min(window_right, _FAR), threshold, keep_scale, _at(dmask), *dmask_shape,
            DTYPE_CODES[q.dtype], PAIRS, get_num_threads(),
        )  # fmt: skip
        del alive
    found_dmask = None if dmask is None or mask is None else dmask.to(mask.dtype)
    return (*grads, found_dmask) if dqkv is None else (dqkv, None, None, found_dmask)  # type: ignore[return-value]


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _describe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
) -> tuple[Any, Any]:  # fmt: skip
    """What both kernels take: (pointers, shapes and strides, mask, dropout); and what must live until they return."""
    _, heads, rows, width = q.shape
    kv_heads = k.shape[1]
    if cu_seqlens_q is None:
        batch, queries, keys = q.shape[0], rows, k.shape[2]
    else:
        assert cu_seqlens_k is not None
        batch, queries, keys = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    lengths = None if kv_lengths is None else kv_lengths.to(torch.int64).contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    slopes_b = 0 if slopes is None or slopes.dim() == 1 or slopes.shape[0] == 1 else heads
    masks: tuple[int, ...] = (0, 0, 0, 0, _NO_MASK, 0)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        masks = (
            *mask.expand(batch, heads, queries, keys).stride(),
            *((_BOOL_MASK, 0) if boolean else (_FLOAT_MASK, DTYPE_CODES[mask.dtype])),
        )
    rng, (rng_at, threshold, keep_scale) = dropout_args(dropout_p, rng)
    pointers = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), _at(mask), _at(slopes), _at(lengths), _at(cu_seqlens_q),
        _at(cu_seqlens_k), rng_at,
    )  # fmt: skip
    shapes = (
        batch, heads, kv_heads, queries, keys, rows, width, v.shape[3],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], slopes_b,
    )  # fmt: skip
    return (pointers, shapes, masks, (threshold, keep_scale)), (
        slopes,
        lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        rng,
    )
