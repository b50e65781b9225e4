"""Scaled dot-product attention, by definition. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    r = scale * q @ k^T
    s = softcap * tanh(r / softcap)                    # with a softcap (Gemma Team 2024), else r
      - slope * |key - position| + mask                # ALiBi (Press et al. 2021); a float mask
    p = softmax(s),   lse = log sum exp s
    out = (p * keep / (1 - dropout_p)) @ v

q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]; H a multiple of Hkv: each key head serves H / Hkv query heads
in a row. Query t stands at position t + length - Tq, where length is Tk or `kv_lengths` of its sample: the last query
sees every key that there is. Seen are the keys before `length` with -left <= key - position <= right (-1: no limit;
causal is right = 0) that the mask leaves: a boolean one by True, a float one by more than -inf (as in PyTorch's
scaled_dot_product_attention, so that a row of nothing but -inf gives zeros here, where `softmax` gives NaN). Keys and
values from `length` on are never looked at.

Packed documents (`cu_seqlens`): the same for each document by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.philox import keep_at

Window = int | tuple[int | None, int | None] | None


class Options(NamedTuple):
    """What shapes the scores of one dense call, as the entries take it.

    first, max_q, max_k: where the elements of this call begin, and how they are spaced, among those dropout counts.
    """

    mask: Tensor | None
    alibi_slopes: Tensor | None
    kv_lengths: Tensor | None
    rng: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float
    first: int
    max_q: int
    max_k: int


class Scores(NamedTuple):
    """s, what may be seen of it (None: everything), its capped part, and the distances key - position."""

    s: Tensor
    seen: Tensor | None
    capped: Tensor
    distance: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """out [B, H, Tq, Dv] in q's dtype, with return_lse (out, lse); scale is 1 / sqrt(D) by default."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = (0, q.shape[2], k.shape[2])
    options = Options(
        mask, alibi_slopes, kv_lengths, rng, scale, *band(window, causal), softcap, dropout_p, *shape
    )
    out, lse = attend(q, k, v, options)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def band(window: Window, causal: bool) -> tuple[int, int]:
    """(left, right): how far before and behind its own position a query may look; -1: no limit."""
    if window is None:
        return -1, 0 if causal else -1
    if isinstance(window, int):
        window = (window - 1, window - 1)
    left, right = (-1 if side is None else side for side in window)
    return left, 0 if causal else right


def attend(q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) in the dtype that the reference computes in."""
    k, v = keys_and_values(q, k, v, o)
    found = scores(upcast(q), k, o)
    return dropped(probabilities(found), o) @ v, log_sum_exp(found)


def keys_and_values(q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """k and v, upcast, for every query head, zeros where no key is."""
    k, v = upcast(k), upcast(v)
    if o.kv_lengths is not None:
        absent = (torch.arange(k.shape[2], device=k.device) >= o.kv_lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    groups = q.shape[1] // max(k.shape[1], 1)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def scores(q: Tensor, k: Tensor, o: Options) -> Scores:
    """The scores of upcast q and k [B, H, T, D], all options applied."""
    queries, keys = q.shape[2], k.shape[2]
    capped = o.scale * (q @ k.mT)
    if o.softcap > 0.0:
        capped = o.softcap * torch.tanh(capped / o.softcap)
    key = torch.arange(keys, device=q.device)
    length: int | Tensor = keys if o.kv_lengths is None else o.kv_lengths.long()[:, None, None, None]
    distance = key - (torch.arange(queries, device=q.device)[:, None] + length - queries)
    conditions = []
    if o.kv_lengths is not None:
        conditions.append(key < length)
    if o.left >= 0:
        conditions.append(distance >= -o.left)
    if o.right >= 0:
        conditions.append(distance <= o.right)
    s = capped
    if o.alibi_slopes is not None:
        s = s - o.alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    if o.mask is not None:
        if o.mask.dtype == torch.bool:
            conditions.append(o.mask)
        else:
            s = s + upcast(o.mask)
            conditions.append(o.mask > -torch.inf)
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return Scores(s, seen, capped, distance)


def probabilities(found: Scores) -> Tensor:
    """softmax(s) over what is seen; zeros in rows that see nothing."""
    if found.seen is None:
        return torch.softmax(found.s, -1)
    p = torch.softmax(found.s.masked_fill(~found.seen, -torch.inf), -1)
    return p.masked_fill(~found.seen | ~found.seen.any(-1, keepdim=True), 0.0)


def log_sum_exp(found: Scores) -> Tensor:
    """[B, H, Tq]; -inf, without a gradient, for rows that see nothing."""
    if found.s.shape[-1] == 0:
        return found.s.sum(-1) - torch.inf  # of the scores, so that it can be differentiated
    if found.seen is None:
        return torch.logsumexp(found.s, -1)
    empty = ~found.seen.any(-1, keepdim=True)
    s = found.s.masked_fill(~found.seen, -torch.inf).masked_fill(empty, 0.0)
    return torch.logsumexp(s, -1).masked_fill(empty.squeeze(-1), -torch.inf)


def keep_factors(shape: torch.Size, o: Options) -> Tensor | None:
    """What dropout multiplies p [B, H, Tq, Tk] with: 0 or 1 / (1 - dropout_p); None without dropout."""
    if o.dropout_p == 0.0:
        return None
    assert o.rng is not None
    batch, heads, queries, keys = (torch.arange(size, device=o.rng.device) for size in shape)
    rows = ((o.first + batch)[:, None] * shape[1] + heads)[:, :, None] * o.max_q + queries
    return keep_at(rows[..., None] * o.max_k + keys, o.dropout_p, o.rng) / (1.0 - o.dropout_p)


def dropped(p: Tensor, o: Options) -> Tensor:
    """The probabilities after dropout."""
    factors = keep_factors(p.shape, o)
    return p if factors is None else p * factors.to(p.dtype)


def sum_over_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, D] summed to the key heads."""
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)


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
) -> None:
    """The definition takes everything."""
    return


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
    """(out, lse): lse [B, H, Tq], natural logarithm, -inf on rows that see nothing."""
    max_q, max_k = (q.shape[2], k.shape[2]) if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
    numbers = (scale, window_left, window_right, softcap, dropout_p, 0, max_q, max_k)
    options = Options(mask, alibi_slopes, kv_lengths, rng, *numbers)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = heads_inside(q, (*q.shape[:3], v.shape[-1]), q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for queries, keys, o in documents(options, cu_seqlens_q, cu_seqlens_k):
        out[:, :, queries], lse[:, :, queries] = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], o)
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
    """(dq, dk, dv, dmask); packed: (dqkv [B, T, 3 * H * D], None, None, dmask).

    ds = p * (dp - sum(p * dp) + dlse) with dp = keep * dout @ v^T;  dr = ds * (1 - (capped / softcap)^2)
    dq = scale * dr @ k,  dk = scale * dr^T @ q,  dv = (keep * p)^T @ dout
    """
    max_q, max_k = (q.shape[2], k.shape[2]) if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
    numbers = (scale, window_left, window_right, softcap, dropout_p, 0, max_q, max_k)
    options = Options(mask, alibi_slopes, kv_lengths, rng, *numbers)
    dqkv = q.new_zeros(q.shape[0], q.shape[2], 3 * q.shape[1] * q.shape[3]) if packed else None
    if dqkv is not None:
        dq, dk, dv = dqkv.unflatten(-1, (3, q.shape[1], q.shape[3])).permute(2, 0, 3, 1, 4)
    else:
        dq, dk, dv = (heads_inside(t, t.shape, t.dtype).zero_() for t in (q, k, v))
    dmask = upcast(mask.new_zeros(mask.shape)) if need_dmask and mask is not None else None
    for queries, keys, o in documents(options, cu_seqlens_q, cu_seqlens_k):
        q_wide, g = upcast(q[:, :, queries]), upcast(dout[:, :, queries])
        k_wide, v_wide = keys_and_values(q_wide, k[:, :, keys], v[:, :, keys], o)
        found = scores(q_wide, k_wide, o)
        p = probabilities(found)
        dp, factors = g @ v_wide.mT, keep_factors(p.shape, o)
        dp = dp if factors is None else dp * factors
        ds = dp - (p * dp).sum(-1, keepdim=True)
        ds = p * (ds if dlse is None else ds + dlse[:, :, queries, None])
        if found.seen is not None:  # a NaN in what is seen stays there
            ds = ds.masked_fill(~found.seen, 0.0)
        if dmask is not None:
            part = _mask_of(dmask, o, options)
            part += ds.sum_to_size(part.shape)
        dr = ds if o.softcap == 0.0 else ds * (1.0 - (found.capped / o.softcap) ** 2)
        dq[:, :, queries] = o.scale * (dr @ k_wide)
        dk[:, :, keys] = sum_over_groups(o.scale * (dr.mT @ q_wide), k.shape[1])
        dv[:, :, keys] = sum_over_groups(dropped(p, o).mT @ g, k.shape[1])
    found_dmask = None if dmask is None or mask is None else dmask.to(mask.dtype)
    return (dq, dk, dv, found_dmask) if dqkv is None else (dqkv, None, None, found_dmask)


def documents(
    o: Options, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice, Options]]:
    """(queries, keys, options) of each dense call that a call consists of: itself, or one per document."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield slice(None), slice(None), o
        return
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        queries, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        slopes, lengths = o.alibi_slopes, o.kv_lengths
        mask = None if o.mask is None else _document(o.mask, 4, b)
        if mask is not None:  # what broadcasts stays broadcast
            rows, columns = queries.stop - queries.start, keys.stop - keys.start
            mask = mask[..., : min(rows, mask.shape[-2]), : min(columns, mask.shape[-1])]
        yield (
            queries,
            keys,
            o._replace(
                mask=mask,
                alibi_slopes=None if slopes is None else _document(slopes, 2, b),
                kv_lengths=None if lengths is None else lengths[b : b + 1],
                first=b,
            ),
        )


def _document(value: Tensor, dims: int, b: int) -> Tensor:
    value = value[(None,) * (dims - value.dim())]
    return value[b : b + 1] if value.shape[0] > 1 else value


def _mask_of(dmask: Tensor, o: Options, whole: Options) -> Tensor:
    """The part of dmask that belongs to the mask of one document's options."""
    if o is whole:
        return dmask
    assert o.mask is not None
    return _document(dmask, 4, o.first)[..., : o.mask.shape[-2], : o.mask.shape[-1]]


def spread_mask(parts: Condition, o: Options, whole: Options) -> Condition:
    """What belongs to one document's mask, in the shape of the whole mask with zeros elsewhere."""
    assert whole.mask is not None
    spread = []
    for part in parts:
        assert part is not None
        found = part.new_zeros(whole.mask.shape)
        _mask_of(found, o, whole).copy_(part)
        spread.append(found)
    return Condition._make(spread)


def heads_inside(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """A [B, H, T, D] view of new [B, T, H, D] storage: what the output projection reads without a copy."""
    batch, heads, length, width = shape
    return like.new_empty((batch, length, heads, width), dtype=dtype).transpose(1, 2)
