"""Scaled dot-product attention: one kernel family, dense here, packed in `attention_qkv` and `attention_varlen`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import apply, backward_through, double_backward_wanted
from fastgpt._core.dispatch import Backend
from fastgpt._core.library import call
from fastgpt._core.plan import Planned, planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Entry, OpSpec
from fastgpt.ops import attention_cases
from fastgpt.reference import attention as reference
from fastgpt.reference.attention import Window
from fastgpt.reference.attention_condition import condition
from fastgpt.reference.attention_qkv import split


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
    backend: Backend = None,
) -> Any:
    """softmax(scale * q @ k^T + mask) @ v for every head.

    Query t stands at position t + length - Tq among the keys, where length is Tk or its sample's `kv_lengths`: the
    last query sees every key that there is.

    Args:
        q: [B, H, Tq, D], floating.
        k: [B, Hkv, Tk, D], v: [B, Hkv, Tk, Dv], in q's dtype; H a multiple of Hkv (grouped-query attention).
        causal: a query sees no key behind its position.
        scale: multiplies q @ k^T; 1 / sqrt(D) when None.
        mask: broadcastable to [B, H, Tq, Tk]: boolean (True = may look), or float in q's dtype or fp32, added;
            -inf hides a key. Differentiable; read by its strides, never expanded.
        alibi_slopes: fp32 [H] or [B, H]: slope * |key - position| is subtracted. No gradient.
        window: (left, right) keys before and behind its own position that a query may see, None for no limit on a
            side; an int w stands for (w - 1, w - 1): with causal, the last w keys.
        softcap: s becomes softcap * tanh(s / softcap), before mask and slopes; 0 for none.
        kv_lengths: int32 or int64 [B], 0 <= length <= Tk: keys and values from there on are never read.
        dropout_p: probability, 0 <= p < 1, that a probability is zeroed; the rest is divided by 1 - p.
        rng: int64 tensor (seed, offset) on q's device: Philox 4x32-10 with the index of the element in [B, H, Tq, Tk]
            plus offset as its counter. Drawn from torch's generator when None.
        return_lse: also return the logarithm of each softmax's denominator.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        [B, H, Tq, Dv] in q's dtype, a view of [B, Tq, H, Dv] storage; with return_lse (out, lse): lse fp32
        [B, H, Tq], natural logarithm, differentiable. A query that sees nothing gives zeros, an lse of -inf, and
        zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1; tiled as in Dao, "FlashAttention-2" (2023).
    """
    rng = validate.drawn_rng(q, dropout_p, rng)
    options = causal, scale, mask, alibi_slopes, window, softcap, kv_lengths, dropout_p, rng, return_lse
    plan = planned(SPEC, backend, (q, k, v, *options))
    if kv_lengths is not None:
        validate.between("kv_lengths", kv_lengths, 0, k.shape[2])
    out, lse = attend(plan)
    return (out, lse) if return_lse else out


def attend(plan: Planned, qkv: Tensor | None = None, heads: int = 0) -> Any:
    """(out, lse) of a planned call. With `qkv` its gradient is one tensor; q, k and v are then views of it."""
    run, backend, args = plan
    if run is None:
        inputs = args[:3] if qkv is None else (qkv, None, None)
        found = apply(Attention, backend, heads, *inputs, *args[3:])
        return found if args[-1] else (found, None)
    return run(*args)


class Attention(torch.autograd.Function):
    """Of q, k and v, or of a packed qkv in q's place, with its number of heads.

    An lse that nobody asked for is no output: compiled code would send zeros back through it.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: str, heads: int, q: Tensor, k: Tensor | None, v: Tensor | None, *options: Any
    ) -> Any:
        parts = split(q, heads) if heads else (q, k, v)
        out, lse = call("attention_fwd", backend, *parts, *options)
        ctx.save_for_backward(q, k, v, out, lse, *options[:6])
        ctx.backend, ctx.heads, ctx.numbers = backend, heads, options[6:-1]
        ctx.set_materialize_grads(False)
        need_lse = options[-1]
        return (out, lse) if need_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        mask, need_dmask = tensors[0], ctx.needs_input_grad[5]
        dout = torch.zeros_like(out) if dout is None else dout
        if double_backward_wanted():
            needed = backward_through(
                lambda q, k, v, mask: _by_definition(ctx, q, k, v, mask, tensors[1:]),
                (q, k, v, mask),
                (dout, torch.zeros_like(lse) if dlse is None else dlse),
            )
            dq, dk, dv, dmask = needed
        else:
            packed = bool(ctx.heads)
            parts = split(q, ctx.heads) if packed else (q, k, v)
            dq, dk, dv, dmask = call(
                "attention_bwd", ctx.backend, dout, dlse, *parts, out, lse, *tensors, *ctx.numbers, packed, need_dmask
            )  # fmt: skip
        needs = ctx.needs_input_grad[2:6]
        dq, dk, dv, dmask = (g if need else None for g, need in zip((dq, dk, dv, dmask), needs, strict=True))
        return None, None, dq, dk, dv, dmask, *(None,) * (len(tensors) + len(ctx.numbers))


def _by_definition(ctx: Any, q: Tensor, k: Any, v: Any, mask: Tensor | None, tensors: Any) -> Any:
    """(out, lse) by the reference, for gradients of gradients."""
    parts = split(q, ctx.heads) if ctx.heads else (q, k, v)
    slopes, lengths, cu_seqlens_q, cu_seqlens_k, rng = tensors
    scale, left, right, softcap, dropout_p, max_q, max_k = ctx.numbers
    if cu_seqlens_q is None:
        max_q, max_k = parts[0].shape[2], parts[1].shape[2]
    options = reference.Options(
        mask, slopes, lengths, rng, scale, left, right, softcap, dropout_p, 0, max_q, max_k
    )
    found = [
        reference.attend(parts[0][:, :, queries], parts[1][:, :, keys], parts[2][:, :, keys], o)
        for queries, keys, o in reference.documents(options, cu_seqlens_q, cu_seqlens_k)
    ]
    out, lse = (torch.cat(part, 2) for part in zip(*found, strict=True))
    return out.to(q.dtype), lse


def _prepare(
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
) -> tuple[Any, ...]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        validate.floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected [B, H, T, D], got shape {tuple(tensor.shape)}")
    q, k, v = validate.autocast(q, k, v)
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    validate.grouped_heads(heads, kv_heads)
    validate.beside("k", k, (batch, kv_heads, keys, width), (q.dtype,), "q", q)
    validate.beside("v", v, (batch, kv_heads, keys, v.shape[-1]), (q.dtype,), "q", q)
    options = prepare_options(
        q, (batch, heads, queries, keys), causal=causal, scale=scale, mask=mask, alibi_slopes=alibi_slopes,
        window=window, softcap=softcap, kv_lengths=kv_lengths, dropout_p=dropout_p, rng=rng,
    )  # fmt: skip
    return q, k, v, *options, 0, 0, return_lse


def prepare_options(
    q: Tensor,
    scores: tuple[int, int, int, int],
    *,
    causal: bool,
    scale: float | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: Window,
    softcap: float,
    kv_lengths: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Any, ...]:
    """The arguments of `attention_fwd` between v and max_seqlen_q, checked for scores [B, H, Tq, Tk]."""
    batch, heads, _, keys = scores
    if mask is not None:
        mask = validate.autocast_mask(mask, q)
        validate.mask("mask", mask, "q", q, scores)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, batch, heads)
    if kv_lengths is not None:
        validate.integers("kv_lengths", kv_lengths, (batch,), (torch.int32, torch.int64), "q", q, 0, keys)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else validate.number("scale", scale)
    softcap = validate.number("softcap", softcap)
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    if window is not None:
        _check_window(window)
    dropout_p, rng = validate.dropout(q, "q", dropout_p, rng)
    left, right = reference.band(window, bool(causal))
    return mask, alibi_slopes, kv_lengths, *cu_seqlens, rng, scale, left, right, softcap, dropout_p


def _check_slopes(slopes: Tensor, q: Tensor, batch: int, heads: int) -> None:
    validate.floating("alibi_slopes", slopes)
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    validate.dtype("alibi_slopes", slopes, (wanted, torch.float32), f"q is {q.dtype}")
    validate.same_device("alibi_slopes", slopes, "q", q)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected shape {(heads,)} or {(batch, heads)}, got {tuple(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes: expected a tensor that needs no gradient; to train a bias pass it as mask"
        )


def _check_window(window: Any) -> None:
    sides = window if isinstance(window, tuple) else (window,)
    whole = [side for side in sides if side is not None]
    least = 0 if isinstance(window, tuple) else 1
    if len(sides) != (2 if isinstance(window, tuple) else 1) or any(
        isinstance(side, bool) or not isinstance(side, int) or side < least for side in whole
    ):
        raise ValueError(
            f"window: expected None, a number of keys >= 1, or (left, right) of None or >= 0, got {window!r}"
        )


def _fwd_fake(
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
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = reference.heads_inside(q, (*q.shape[:3], v.shape[-1]), q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=statistics)


def _bwd_fake(
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
    dmask = mask.new_empty(mask.shape) if need_dmask and mask is not None else None
    if packed:
        batch, heads, length, width = q.shape
        return q.new_empty(batch, length, 3 * heads * width), None, None, dmask
    dq, dk, dv = (reference.heads_inside(t, t.shape, t.dtype) for t in (q, k, v))
    return dq, dk, dv, dmask


_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? kv_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? rng, float scale, int window_left, int window_right, float softcap, float dropout_p,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k"
)

SPEC = register(
    OpSpec(
        name="attention",
        entries={
            "fwd": Entry(
                f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool need_lse) -> (Tensor, Tensor)", _fwd_fake
            ),
            "bwd": Entry(
                "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
                f" {_OPTIONS}, bool packed, bool need_dmask) -> (Tensor, Tensor, Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=attention,
        prepare=_prepare,
        reference=reference.attention,
        condition=condition,
        outputs=("out", "lse"),
        gradients=("q", "k", "v", "mask"),
        make_inputs=attention_cases.make_inputs,
        cases=attention_cases.CASES,
        bench_cases=attention_cases.BENCH,
        cpu_cases=attention_cases.CPU,
        independent=2,
        cost=attention_cases.cost,
        baseline=attention_cases.baseline,
        c=8.0,
    )
)
