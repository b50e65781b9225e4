"""What the attention kernels share, forward and backward: the description of a call and the work on one tile.

    s = scale * q k^T;  s = softcap * tanh(s / softcap);  s += -slope * |k - (t + Lk - Lq)|;  s += mask

Scores are kept in base 2 (s * log2 e), hidden ones are -inf. Where nothing is added and nothing capped, `scores`
leaves q k^T as it is, and what exponentiates multiplies by `rules.unit`: one fused multiply-add. Under a float mask
they are natural: its finite minimum, with which models hide keys, times log2 e would be -inf. `power` knows both.

`Options` are compile-time branches (the parameter is `opts`: Triton keeps the name `options` for itself). Sizes,
strides and numbers are plain run-time arguments under the same names in every kernel (`Call.named`), none
specialised: a new batch or length compiles nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.triton import philox

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# For `@triton.jit(do_not_specialize=...)`: every run-time number of the attention kernels (unknown names do no harm).
UNSPECIALIZED = [
    "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st",
    "mask_sb", "mask_sh", "mask_sq", "mask_sk", "alibi_sb",
    "heads", "queries", "keys", "rows", "scale", "cap", "left", "right", "threshold", "keep_scale",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a call asks for, as one compile-time argument."""

    width: int  # D
    value_width: int  # Dv
    group: int  # query heads per key head
    align: int  # elements: divides every stride of q, k and v, so that loads are vectors
    mask: int = 0  # NO_MASK, BOOL_MASK, FLOAT_MASK
    mask_rows: bool = False  # its elements along the keys are adjacent
    alibi: bool = False
    softcap: bool = False
    left: bool = False  # the window is bounded on that side
    right: bool = False
    lengths: bool = False
    varlen: bool = False
    dropout: bool = False
    folded: bool = False  # scores stay q k^T, `unit` is scale * log2 e

    @property
    def D(self) -> int:
        """The width of a tile of q or k: a power of two, 16 at least (what matrix units take)."""
        return max(16, triton.next_power_of_2(self.width))

    @property
    def DV(self) -> int:
        return max(16, triton.next_power_of_2(self.value_width))

    @property
    def causal(self) -> bool:
        return self.right and not self.left


@dataclass(frozen=True)
class Call:
    """One call, described. q, k, v: innermost dimension contiguous, copied where it was not."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    batch: int  # sequences: the batch, or the documents
    heads: int
    kv_heads: int
    queries: int  # of the longest sequence
    keys: int
    scale: float  # the public one
    keep_scale: float  # 1 / (1 - dropout_p)
    named: dict[str, Any]  # what every kernel takes by name


def describe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int,
) -> Call:  # fmt: skip
    """The arguments of `attention_fwd`, as kernels take them."""
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    heads, kv_heads = q.shape[1], k.shape[1]
    varlen = cu_seqlens_q is not None
    if varlen:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        batch, queries, keys = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    else:
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_kind = 0
    if mask is not None:
        mask_strides = mask.expand(batch, heads, queries, keys).stride()
        mask_kind = 1 if mask.dtype == torch.bool else 2
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    capped, base = softcap > 0.0, 1.0 if mask_kind == 2 else math.log2(math.e)
    options = Options(
        width=q.shape[3],
        value_width=v.shape[3],
        group=heads // max(kv_heads, 1),
        align=alignment(q, k, v),
        mask=mask_kind,
        mask_rows=mask_strides[3] == 1,
        alibi=alibi_slopes is not None,
        softcap=capped,
        left=window_left >= 0,
        right=window_right >= 0,
        lengths=kv_lengths is not None,
        varlen=varlen,
        dropout=dropout_p > 0.0,
        folded=scale > 0.0 and not capped and alibi_slopes is None and mask_kind != 2,
    )
    named: dict[str, Any] = {
        "mask_ptr": mask,
        "alibi_ptr": alibi_slopes,
        "lengths_ptr": None if kv_lengths is None else kv_lengths.contiguous(),
        "cu_q_ptr": cu_seqlens_q,
        "cu_k_ptr": cu_seqlens_k,
        "rng_ptr": rng.contiguous() if rng is not None and dropout_p > 0.0 else None,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "rows": q.shape[2],  # of out and lse in one head: queries, or those of all documents
        "scale": scale / softcap if capped else scale * base,
        "cap": softcap * base,
        "left": min(window_left, 1 << 30),
        "right": min(window_right, 1 << 30),
        "threshold": signed_threshold(dropout_p),
        "alibi_sb": heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "opts": options,
    }
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        named |= strides(name, tensor)
    named |= {f"mask_s{axis}": stride for axis, stride in zip("bhqk", mask_strides, strict=True)}
    keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return Call(q, k, v, options, batch, heads, kv_heads, queries, keys, scale, keep_scale, named)


def innermost_contiguous(x: Tensor) -> Tensor:
    """`x`, copied unless its rows are contiguous and lie near enough: the kernels take any other strides.

    Within a tile of at most 128 rows offsets are 32 bits wide.
    """
    fits = (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < 2**24
    return x if fits else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """{"q_sb": ..., "q_sh": ..., "q_st": ...}; 0 where there is one element only, whatever its stride says."""
    return {f"{name}_s{axis}": step for axis, step in zip("bht", _steps(x), strict=True)}


def _steps(x: Tensor) -> list[int]:
    return [0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]


def signed_threshold(dropout_p: float) -> int:
    """Philox's threshold with the bits of an int32, so that the argument's type never depends on dropout_p."""
    threshold = philox.threshold(dropout_p)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def alignment(*tensors: Tensor) -> int:
    """16 bytes in elements where every stride and width is a multiple of it, else 1: never half-way, so that
    only an odd width or an odd view changes the compiled kernel, not a length."""
    lanes = 16 // tensors[0].element_size()
    numbers = [n for t in tensors for n in (*_steps(t), t.shape[3])]
    return lanes if all(n % lanes == 0 for n in numbers) else 1


class Rules(NamedTuple):
    """What hides and changes the scores of one sequence and head. Per head: scalars, or columns over the rows
    of a tile whose rows belong to several heads."""

    queries: Any  # Lq
    keys: Any  # Lk
    shift: Any  # Lk - Lq: query t stands at key t + shift
    left: Any
    right: Any
    scale: Any
    cap: Any
    unit: Any  # what turns the result of `scores` into base 2, unless it is natural
    slope: Any  # ALiBi's, in the base of the scores
    mask_ptr: Any  # at [b, h, 0, 0]
    mask_sq: Any
    mask_sk: Any
    seed: Any
    offset: Any
    threshold: Any
    first: Any  # dropout's index of [b, h, 0, 0]
    stride: Any  # and its step from one query to the next


@triton.jit
def step(stride, opts: tl.constexpr):
    """`stride`, known to the compiler as a multiple of opts.align although it is not specialised."""
    return stride // opts.align * opts.align


@triton.jit
def sequence(b, queries, keys, lengths_ptr, cu_q_ptr, cu_k_ptr, opts: tl.constexpr):
    """(Lq, Lk, first query, first key) of sequence b; the firsts are rows of varlen's packed tensors, else 0."""
    first_q, first_k, Lq, Lk = 0, 0, queries, keys
    if opts.varlen:
        first_q = tl.load(cu_q_ptr + b)
        first_k = tl.load(cu_k_ptr + b)
        Lq = tl.load(cu_q_ptr + b + 1) - first_q
        Lk = tl.load(cu_k_ptr + b + 1) - first_k
    if opts.lengths:  # a length past the end must not read past it
        Lk = tl.minimum(Lk, tl.maximum(tl.load(lengths_ptr + b), 0).to(tl.int32))
    return Lq, Lk, first_q, first_k


@triton.jit
def head(ptr, b, h, first, sb, sh, st, opts: tl.constexpr):
    """ptr at row `first` of sequence b, head h."""
    offset = h.to(tl.int64) * step(sh, opts)
    if opts.varlen:
        offset += first.to(tl.int64) * step(st, opts)
    else:
        offset += b.to(tl.int64) * step(sb, opts)
    return ptr + offset


@triton.jit
def head_rules(
    b, h, Lq, Lk, mask_ptr, alibi_ptr, rng_ptr, mask_sb, mask_sh, mask_sq, mask_sk, alibi_sb,
    heads, queries, keys, scale, cap, left, right, threshold, opts: tl.constexpr,
):  # fmt: skip
    """Rules of sequence b and head h; h may be a column, one head per row of the tile."""
    slope, seed, offset, first, stride = 0.0, 0, 0, 0, 0
    unit = 1.0
    if opts.folded:
        unit = scale
    mask_at = 0  # not None: Triton 3.6 has no tuple that holds one
    if opts.mask != NO_MASK:
        mask_at = mask_ptr + b.to(tl.int64) * mask_sb + h.to(tl.int64) * mask_sh
    if opts.alibi:
        slope = tl.load(alibi_ptr + b * alibi_sb + h)
        if opts.mask != FLOAT_MASK:
            slope *= LOG2E
    if opts.dropout:
        seed = tl.load(rng_ptr)
        offset = tl.load(rng_ptr + 1)
        stride = keys.to(tl.int64)
        first = (b.to(tl.int64) * heads + h) * queries * stride
    return Rules(
        Lq, Lk, Lk - Lq, left, right, scale, cap, unit, slope, mask_at, mask_sq, mask_sk,
        seed, offset, threshold, first, stride,
    )  # fmt: skip


@triton.jit
def load_rows(
    ptr, row, end, stride, width: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, bounded: tl.constexpr
):
    """Rows row .. row + ROWS, below `end` if bounded, of a matrix `width` wide; zeros outside. [ROWS, D]"""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, D)[None, :]
    at = ptr + row * stride.to(tl.int64) + rows * stride + columns
    if bounded and width != D:
        return tl.load(at, mask=(row + rows < end) & (columns < width), other=0.0)
    elif bounded:
        return tl.load(at, mask=row + rows < end, other=0.0)
    elif width != D:
        return tl.load(at, mask=columns < width, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def tanh(x):
    """Right to a few units in the last place: 1 - 2 / (exp(2x) + 1) alone is not, near zero."""
    z = x * x
    small = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = x + x * z * (small * z - 3.33332819422e-1)
    size = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -size, size))


@triton.jit
def scores(qk, t, k, rules, opts: tl.constexpr, bounded: tl.constexpr):
    """(s, capped) from q k^T of one tile; `power` takes s; hidden ones are -inf.

    t, k: positions in the sequence, of shapes that broadcast to the tile (either may be the column).
    bounded: the tile may cross the end of the keys or the window's edge (queries past the end are the caller's).
    capped: tanh(scale * qk / softcap), for backward: ds *= 1 - capped^2.
    """
    s = qk
    if not opts.folded:
        s = qk * rules.scale
    capped = s
    if opts.softcap:
        capped = tanh(s)
        s = rules.cap * capped
    if opts.alibi:
        s -= rules.slope * tl.abs(k - t - rules.shift).to(tl.float32)
    if opts.mask != NO_MASK:
        inside = (t < rules.queries) & (k < rules.keys)
        row_at = rules.mask_ptr + t.to(tl.int64) * rules.mask_sq
        if opts.mask_rows:  # offsets that are known, from one address per row
            at = row_at + k
        else:
            at = row_at + k.to(tl.int64) * rules.mask_sk
        if opts.mask == BOOL_MASK:
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            added = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
            s = tl.where(added > -float("inf"), s + added, -float("inf"))
    if bounded:
        seen = k < rules.keys
        if opts.left:
            seen &= k - t - rules.shift >= -rules.left
        if opts.right:
            seen &= k - t - rules.shift <= rules.right
        s = tl.where(seen, s, -float("inf"))
    return s, capped


@triton.jit
def power(s, base, opts: tl.constexpr):
    """e^(s - base) of two numbers in the base of the scores."""
    if opts.mask == FLOAT_MASK:
        return tl.exp2((s - base) * LOG2E)
    else:
        return tl.exp2(s - base)


@triton.jit
def kept(t, k, rules):
    """Which probabilities dropout keeps. The index of an element is its place in [B, H, Tq, Tk]."""
    index = rules.first + t.to(tl.int64) * rules.stride + k
    return philox.keep(rules.seed, rules.offset, index, rules.threshold)


@triton.jit
def block_range(
    first, last, shift, left, right, end, has_left: tl.constexpr, has_right: tl.constexpr, BLOCK: tl.constexpr
):
    """(begin, inner_begin, inner_end, end): which part of the other side the rows first .. last see.

    From begin to end, in steps of BLOCK, lies all that any of them sees; the blocks from inner_begin to inner_end
    are seen whole by all of them. For keys seen by queries give shift = Lk - Lq, the window and Lk; for queries that
    see keys -shift, the window's sides exchanged and Lq.
    """
    begin, inner_begin, inner_end = 0, 0, end
    if has_left:
        begin = tl.maximum(first + shift - left, 0) // BLOCK * BLOCK
        inner_begin = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK) * BLOCK
    if has_right:
        inner_end = tl.minimum(end, first + shift + right + 1)
        end = tl.minimum(end, last + shift + right + 1)
    inner_end = tl.maximum(inner_end, 0) // BLOCK * BLOCK
    if has_left:
        inner_begin = tl.minimum(inner_begin, tl.cdiv(tl.maximum(end, begin), BLOCK) * BLOCK)
        inner_end = tl.maximum(inner_end, inner_begin)
    return begin, inner_begin, inner_end, end
