"""Attention by PyTorch's scaled_dot_product_attention.

On the CPU its flash kernel is called as the pair of forward and backward that it is, with heads repeated and widths
filled up where it wants them equal. What that kernel does not take, and other devices, is written out with the whole
matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PAIR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Options(NamedTuple):
    mask: Tensor | None
    alibi_slopes: Tensor | None
    kv_lengths: Tensor | None
    scale: float
    left: int
    right: int
    document: int = -1  # of packed documents


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rng: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    need_lse: bool,
) -> str | None:
    """None, or the reason why not."""
    if dropout_p > 0.0:
        return "PyTorch's dropout is not Philox by the element's index"
    if softcap > 0.0:
        return "PyTorch's scaled_dot_product_attention has no softcap"
    return None


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rng: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    options = _Options(mask, alibi_slopes, kv_lengths, scale, window_left, window_right)
    if cu_seqlens_q is None:
        out, lse = _forward(q, k, v, options, need_lse)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    out = _heads_inside(q, (*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=_wide(q))
    for queries, keys, o in _documents(options, cu_seqlens_q, cu_seqlens_k):
        out[:, :, queries], lse[:, :, queries] = _forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], o, need_lse
        )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rng: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    packed: bool,
    need_dmask: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dmask); packed: (dqkv, None, None, dmask)."""
    options = _Options(mask, alibi_slopes, kv_lengths, scale, window_left, window_right)
    batch, heads, length, width = q.shape
    dqkv = q.new_empty(batch, length, 3 * heads * width) if packed else None
    if dqkv is None:
        grads = [_heads_inside(t, t.shape) for t in (q, k, v)]
    else:
        grads = list(dqkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4))
    dmask = mask.new_zeros(mask.shape, dtype=_wide(mask)) if need_dmask and mask is not None else None
    for queries, keys, o in _documents(options, cu_seqlens_q, cu_seqlens_k):
        g, of_lse = dout[:, :, queries], None if dlse is None else dlse[:, :, queries]
        inputs = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        if of_lse is None and dmask is None and _is_pair(*inputs):
            found = [*_pair_backward(g, *inputs, out[:, :, queries], lse[:, :, queries], o)]
        else:
            *found, ds = _written_out_backward(g, of_lse, *inputs, o)
            if dmask is not None:
                part = dmask if o.document < 0 else _part(dmask, o.document, *ds.shape[2:])
                part += ds.sum_to_size(part.shape)
        for grad, value, where in zip(grads, found, (queries, keys, keys), strict=True):
            grad[:, :, where] = value
    found_dmask = None if dmask is None or mask is None else dmask.to(mask.dtype)
    return (*grads, found_dmask) if dqkv is None else (dqkv, None, None, found_dmask)  # type: ignore[return-value]


def _documents(
    o: _Options, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice, _Options]]:
    """(queries, keys, options) of the whole call, or of each of its documents."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield slice(None), slice(None), o
        return
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = o._replace(document=b)
        if o.mask is not None:
            own = own._replace(mask=_part(o.mask, b, queries.stop - queries.start, keys.stop - keys.start))
        if o.alibi_slopes is not None and o.alibi_slopes.dim() == 2:
            own = own._replace(alibi_slopes=o.alibi_slopes[b])
        if o.kv_lengths is not None:
            own = own._replace(kv_lengths=o.kv_lengths[b : b + 1])
        yield queries, keys, own


def _part(mask: Tensor, document: int, queries: int, keys: int) -> Tensor:
    """What of a mask [N, H, Tq, Tk] belongs to one document; what broadcasts stays broadcast."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[document : document + 1] if mask.shape[0] > 1 else mask
    return mask[..., : min(queries, mask.shape[2]), : min(keys, mask.shape[3])]


def _forward(q: Tensor, k: Tensor, v: Tensor, o: _Options, need_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse). In bf16 and fp16 PyTorch's exponential is right to 2e-5 only: enough for out, not for an lse."""
    if need_lse and q.dtype in (torch.bfloat16, torch.float16):
        out, lse = _forward(q.float(), k.float(), v.float(), o, False)
        return out.to(q.dtype), lse
    if _is_pair(q, k, v):
        added, top_left = _added(q, k, o)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_paired(q, k, v, o), 0.0, top_left, attn_mask=added, scale=o.scale
        )
        if added is not None:  # that kernel's lse of a row that sees nothing is finite or NaN
            empty = (added == -torch.inf).all(-1).expand(lse.shape)
            lse = lse.masked_fill(empty, -torch.inf)
        return out[..., : v.shape[-1]], lse
    s, _, hidden = _scores(q, k, o)
    s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
    _, v_wide = _per_query_head(q, k, v, o)
    return (_softmax(s, hidden) @ v_wide.to(s.dtype)).to(q.dtype), torch.logsumexp(s, -1)


def _pair_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, o: _Options
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in fp32: PyTorch's kernel adds up dk and dv block by block in the dtype that it is given."""
    added, top_left = _added(q, k, o)
    q_wide, k_wide, v_wide = (t.float() for t in _paired(q, k, v, o))
    width = q_wide.shape[-1]
    dout, out = (_widened(t.float(), width) for t in (dout, out))
    if added is not None:
        added = added.float()
        lse = lse.masked_fill(
            lse == -torch.inf, 0.0
        )  # exp(-inf - 0) is 0 there, exp(-inf + inf) would be NaN
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q_wide, k_wide, v_wide, out, lse, 0.0, top_left, attn_mask=added, scale=o.scale
    )
    dk, dv = (_sum_over_groups(t, k.shape[1]) for t in (dk, dv))
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _written_out_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: _Options
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, ds) by the formulas: autograd does not run inside an op that was called below a dispatch mode."""
    wide = _wide(q)
    s, scaled, hidden = _scores(q, k, o)
    p = _softmax(s if hidden is None else s.masked_fill(hidden, -torch.inf), hidden)
    k_wide, v_wide = (t.to(wide) for t in _per_query_head(q, k, v, o))
    g = dout.to(wide)
    dp = g @ v_wide.mT
    ds = dp - (p * dp).sum(-1, keepdim=True)
    ds = p * (ds if dlse is None else ds + dlse[..., None])
    if hidden is not None:  # a NaN in what is seen stays there
        ds = ds.masked_fill(hidden, 0.0)
    dk, dv = (_sum_over_groups(t, k.shape[1]) for t in (ds.mT @ scaled, p.mT @ g))
    return o.scale * (ds @ k_wide), dk, dv, ds


def _scores(q: Tensor, k: Tensor, o: _Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """(all scores with what is added to them, scale * q, what is hidden), in fp32 or fp64."""
    scaled = o.scale * q.to(_wide(q))
    k_wide, _ = _per_query_head(q, k, k, o)
    s = scaled @ k_wide.to(scaled.dtype).mT
    bias, hidden = _bias(q, k, o)
    return s if bias is None else s + bias, scaled, hidden


def _softmax(s: Tensor, hidden: Tensor | None) -> Tensor:
    p = torch.softmax(s, -1)
    return p if hidden is None else p.masked_fill(hidden, 0.0)  # zeros, not NaN, where a query sees nothing


def _bias(q: Tensor, k: Tensor, o: _Options) -> tuple[Tensor | None, Tensor | None]:
    """(what is added to the scores, what is hidden), each broadcastable to them or None."""
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)
    length: int | Tensor = keys if o.kv_lengths is None else o.kv_lengths.long()[:, None, None, None]
    hidden, added = None, None

    def hide(where: Tensor) -> None:
        nonlocal hidden
        hidden = where if hidden is None else hidden | where

    if o.kv_lengths is not None:
        hide(key >= length)
    if o.left >= 0 or o.right >= 0 or o.alibi_slopes is not None:
        distance = key - (torch.arange(queries, device=q.device)[:, None] + length - queries)
        if o.left >= 0:
            hide(distance < -o.left)
        if o.right >= 0:
            hide(distance > o.right)
        if o.alibi_slopes is not None:
            added = -o.alibi_slopes.to(_wide(q))[..., None, None] * distance.abs()
    if o.mask is not None:
        if o.mask.dtype == torch.bool:
            hide(~o.mask)
        else:
            hide(o.mask == -torch.inf)
            added = o.mask if added is None else added + o.mask
    return added, hidden


def _added(q: Tensor, k: Tensor, o: _Options) -> tuple[Tensor | None, bool]:
    """(what to add to the scores, SDPA's is_causal). Its causality is top-left: only the square case agrees."""
    plain = o.mask is None and o.alibi_slopes is None and o.kv_lengths is None and o.left < 0
    if plain and (o.right < 0 or (o.right == 0 and q.shape[2] == k.shape[2])):
        return None, o.right == 0
    added, hidden = _bias(q, k, o)
    if added is None:
        added = torch.zeros((), device=q.device)
    added = added.float()  # SDPA takes fp32 beside any dtype
    if hidden is not None:
        added = added.masked_fill(hidden, -torch.inf)
    return added[(None,) * (4 - added.dim())], False


def _is_pair(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's CPU flash kernel takes the call."""
    return q.is_cpu and q.dtype in _PAIR_DTYPES and 0 not in (*q.shape, *k.shape, *v.shape)


def _paired(q: Tensor, k: Tensor, v: Tensor, o: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as that kernel wants them: as many heads, one width, adjacent elements."""
    k, v = _per_query_head(q, k, v, o)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _widened(q, width), _widened(k, width), _widened(v, width)


def _widened(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else torch.nn.functional.pad(t, (0, width - t.shape[-1]))


def _per_query_head(q: Tensor, k: Tensor, v: Tensor, o: _Options) -> tuple[Tensor, Tensor]:
    if o.kv_lengths is not None:  # what lies there is not looked at, a NaN neither
        absent = (torch.arange(k.shape[2], device=k.device) >= o.kv_lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    groups = q.shape[1] // max(k.shape[1], 1)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _sum_over_groups(grad: Tensor, kv_heads: int) -> Tensor:
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _heads_inside(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A [B, H, T, D] view of new [B, T, H, D] storage."""
    batch, heads, length, width = shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)
