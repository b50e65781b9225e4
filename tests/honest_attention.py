"""Attention once more, nothing of it from the reference, in small replaceable parts: `wrong_attention` breaks them.

Documents that lie end to end are padded here and computed at once, where the reference takes them one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Rules(NamedTuple):
    """What a call asks for beside its tensors; lq and lk [B]: how many queries and keys each sample has."""

    scale: float
    left: int | None
    right: int | None
    softcap: float
    slopes: Tensor | None
    dropout_p: float
    rng: Tensor | None
    lq: Tensor
    lk: Tensor


class State(NamedTuple):
    """What backward computes again: q, k and v per query head, the scores on their way, and what is seen of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    capped: Tensor
    s: Tensor
    seen: Tensor
    p: Tensor
    keep: Tensor | None


class AttentionParts:
    # --- which keys a query sees

    def sides(self, window: Any, causal: bool) -> tuple[int | None, int | None]:
        """How many keys to the left and to the right of its position."""
        left, right = window if isinstance(window, tuple) else (window, window)
        if isinstance(window, int):
            left, right = window - 1, window - 1
        return left, 0 if causal else right

    def lengths(self, kv_lengths: Tensor) -> Tensor:
        return kv_lengths

    def offset(self, rules: Rules, queries: int, keys: int) -> Tensor:
        """[B]: the position of query 0."""
        return rules.lk - rules.lq

    def distance(self, rules: Rules, queries: int, keys: int) -> Tensor:
        """key - position [B, 1, Tq, Tk]."""
        first = self.offset(rules, queries, keys)[:, None, None, None]
        return torch.arange(keys) - torch.arange(queries)[:, None] - first

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen = seen if left is None else seen & (distance + left >= 0)
        return seen if right is None else seen & (distance - right <= 0)

    def present(self, rules: Rules, queries: int, keys: int) -> Tensor:
        """What is no padding."""
        lq, lk = rules.lq[:, None, None, None], rules.lk[:, None, None, None]
        return (torch.arange(queries)[:, None] < lq) & (torch.arange(keys) < lk)

    def erase(self, kv: Tensor, lk: Tensor) -> Tensor:
        """Zeros where no key is."""
        exists = torch.arange(kv.shape[2])[:, None] < lk[:, None, None, None]
        return torch.where(exists, kv, 0.0)

    # --- scores

    def per_query_head(self, kv: Tensor, heads: int) -> Tensor:
        return kv.repeat_interleave(heads // kv.shape[1], dim=1)

    def values(self, v: Tensor, width: int) -> Tensor:
        return v

    def cap(self, r: Tensor, softcap: float) -> Tensor:
        return softcap * torch.tanh(r / softcap)

    def bias(self, slopes: Tensor, rules: Rules, queries: int, keys: int) -> Tensor:
        return -slopes[..., None, None] * self.distance(rules, queries, keys).abs()

    def scores(self, r: Tensor, mask: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
        """(capped, s) of the products r."""
        capped = self.cap(r, rules.softcap) if rules.softcap else r
        return capped, capped + self.added(mask, rules, r)

    def added(self, mask: Tensor | None, rules: Rules, like: Tensor) -> Tensor:
        total = torch.zeros_like(like)
        if rules.slopes is not None:
            total = total + self.bias(rules.slopes, rules, *like.shape[2:])
        return total if mask is None or mask.dtype == torch.bool else total + mask.float()

    # --- probabilities

    def normalise(self, s: Tensor) -> Tensor:
        return torch.softmax(s, -1)

    def lse(self, s: Tensor, p: Tensor) -> Tensor:
        """Of hidden scores of -inf, and the probabilities after dropout."""
        return torch.logsumexp(s, -1)

    def row_length(self, rules: Rules, keys: int) -> Any:
        """How many elements dropout counts in a row."""
        return keys

    def counter(self, shape: torch.Size, rules: Rules) -> Tensor:
        batch, heads, queries, keys = shape
        rows = torch.arange(batch * heads * queries).view(batch, heads, queries, 1)
        return rows * self.row_length(rules, keys) + torch.arange(keys)

    def keep(self, shape: torch.Size, rules: Rules) -> Tensor | None:
        if not rules.dropout_p or rules.rng is None:
            return None
        seed, offset = rules.rng.tolist()
        words = philox(seed, self.counter(shape, rules).numpy().astype(np.uint64) + np.uint64(offset))
        return torch.from_numpy(words >= np.uint64(round(rules.dropout_p * 2**32)))

    def keep_in_backward(self, shape: torch.Size, rules: Rules) -> Tensor | None:
        return self.keep(shape, rules)

    def drop(self, t: Tensor, keep: Tensor | None, rules: Rules) -> Tensor:
        return t if keep is None else torch.where(keep, t, 0.0) / (1.0 - rules.dropout_p)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: Rules
    ) -> tuple[Tensor, Tensor, State]:
        k, v = (self.per_query_head(self.erase(t.float(), rules.lk), q.shape[1]) for t in (k, v))
        q, v = q.float(), self.values(v, k.shape[-1])
        capped, s = self.scores(rules.scale * (q @ k.mT), mask, rules)
        seen = self.inside(self.distance(rules, *s.shape[2:]), rules.left, rules.right)
        seen = (seen & self.present(rules, *s.shape[2:])).expand(s.shape)
        if mask is not None:
            seen = seen & (mask if mask.dtype == torch.bool else mask > -torch.inf)
        s = torch.where(seen, s, -torch.inf)
        p = torch.where(seen, self.normalise(s), 0.0)
        keep = self.keep(s.shape, rules)
        kept = self.drop(p, keep, rules)
        return kept @ v, self.lse(s, kept), State(q, k, v, capped, s, seen, p, keep)

    # --- backward

    def mask_in_backward(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def p_of_dv(self, state: State) -> Tensor:
        return state.p

    def ds(self, p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
        ds = dp - (p * dp).sum(-1, keepdim=True)
        return p * (ds if dlse is None else ds + dlse[..., None])

    def uncap(self, ds: Tensor, capped: Tensor, softcap: float) -> Tensor:
        return ds * (1.0 - (capped / softcap).square())

    def dq(self, dr: Tensor, k: Tensor, scale: float) -> Tensor:
        return scale * (dr @ k)

    def dk(self, dr: Tensor, q: Tensor, scale: float) -> Tensor:
        return scale * (dr.mT @ q)

    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return ds.sum_to_size(shape)

    def sum_over_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (kv_heads, -1)).sum(2)

    def dk_of_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return self.sum_over_groups(grad, kv_heads)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, state: State, rules: Rules
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk and dv per query head, and the gradient of what is added to the scores."""
        keep = self.keep_in_backward(state.s.shape, rules)
        ds = self.ds(state.p, self.drop(dout @ state.v.mT, keep, rules), dlse)
        ds = torch.where(state.seen, ds, 0.0)
        dr = self.uncap(ds, state.capped, rules.softcap) if rules.softcap else ds
        dv = self.drop(self.p_of_dv(state), keep, rules).mT @ dout
        return self.dq(dr, state.k, rules.scale), self.dk(dr, state.q, rules.scale), dv, ds

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lq: Tensor | None = None,
        lk: Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        window: Any = None,
        softcap: float = 0.0,
        kv_lengths: Tensor | None = None,
        dropout_p: float = 0.0,
        rng: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of q, k, v [B, H, T, D], of which in sample b lq[b] queries and lk[b] keys count."""
        lq = torch.full(q.shape[:1], q.shape[2]) if lq is None else lq
        lk = torch.full(q.shape[:1], k.shape[2]) if lk is None else lk
        lk = lk if kv_lengths is None else self.lengths(kv_lengths)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        rules = Rules(
            scale, *self.sides(window, causal), softcap, alibi_slopes, dropout_p, rng, lq.long(), lk.long()
        )

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
                ctx.save_for_backward(q, k, v, mask)
                ctx.set_materialize_grads(False)
                out, lse, _ = self.forward(q, k, v, mask, rules)
                return out.to(q.dtype), lse

            @staticmethod
            def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> Any:
                q, k, v, mask = ctx.saved_tensors
                _, _, state = self.forward(q, k, v, self.mask_in_backward(mask), rules)
                dq, dk, dv, ds = self.backward(dout.float(), dlse, state, rules)
                return (
                    dq.to(q.dtype),
                    self.dk_of_groups(dk, k.shape[1]).to(k.dtype),
                    self.sum_over_groups(dv, k.shape[1]).to(v.dtype),
                    self.dmask(ds, mask.shape).to(mask.dtype) if ctx.needs_input_grad[3] else None,
                )

        return Function.apply(q, k, v, mask)


class Attention(AttentionParts):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any) -> Any:
        found = self.run(q, k, v, **options)
        return found if return_lse else found[0]


class AttentionQKV(AttentionParts):
    def three(self, qkv: Tensor, num_heads: int) -> list[Tensor]:
        return [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)]

    def __call__(self, qkv: Tensor, num_heads: int, *, return_lse: bool = False, **options: Any) -> Any:
        found = self.run(*self.three(qkv, num_heads), **options)
        return found if return_lse else found[0]


class AttentionVarlen(AttentionParts):
    def bounds(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """[N] each: where documents begin, and how long they are."""
        return ends[:-1].long(), ends.diff().long()

    def key_bounds(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        return self.bounds(ends)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        starts_q, lq = self.bounds(cu_seqlens_q)
        starts_k, lk = self.key_bounds(cu_seqlens_k)
        out, lse = self.run(
            padded(q, starts_q, lq, max_seqlen_q), padded(k, starts_k, lk, max_seqlen_k),
            padded(v, starts_k, lk, max_seqlen_k), lq, lk, **options,
        )  # fmt: skip
        real = torch.arange(max_seqlen_q) < lq[:, None]
        out, lse = out.transpose(1, 2)[real], lse.transpose(1, 2)[real].T
        return (out, lse) if return_lse else out


def padded(t: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """[N, H, longest, D] of documents that lie end to end, zeros beyond their ends."""
    place = torch.arange(longest)
    index = (starts[:, None] + place).clamp(max=max(len(t) - 1, 0))
    rows = t[index] if len(t) else t.new_zeros(*index.shape, *t.shape[1:])
    return torch.where((place < lengths[:, None])[:, :, None, None], rows, 0.0).transpose(1, 2)


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """The first word of each block of Philox 4x32-10, as uint64."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [counter & low, counter >> shift, np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> shift) ^ c[1] ^ np.uint64(key[0]),
            b & low,
            (a >> shift) ^ c[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]
