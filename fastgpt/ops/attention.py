"""Scaled dot-product attention. Its kernels come later; until then PyTorch's own runs on the `torch` backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import backward_through, double_backward_wanted, needs_graph
from fastgpt._core.dispatch import Backend, choose
from fastgpt._core.library import call
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, Entry, OpSpec
from fastgpt.reference import attention as reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: Backend = None,
) -> Tensor:
    """softmax(scale * q @ k^T + mask) @ v for every head.

    Args:
        q: [B, H, Tq, D], floating.
        k: [B, Hkv, Tk, D], v: [B, Hkv, Tk, Dv], in q's dtype; H a multiple of Hkv (grouped-query attention).
        causal: query t sees the keys <= t + Tk - Tq (the last query sees every key).
        scale: multiplies q @ k^T; 1 / sqrt(D) when None.
        mask: broadcastable to [B, H, Tq, Tk]: boolean (True = may look), or float in q's dtype or fp32, added;
            -inf hides a key.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        [B, H, Tq, Dv] in q's dtype, a view of [B, Tq, H, Dv] storage. A query that the mask or causality
        lets see nothing gives zeros and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    """
    args = _prepare(q, k, v, causal=causal, scale=scale, mask=mask)
    chosen = choose(SPEC, args, backend)
    if needs_graph(q, k, v, mask):
        return _Attention.apply(chosen, *args)
    return call("attention_fwd", chosen, *args)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        out, lse = call("attention_fwd", backend, q, k, v, causal, scale, mask)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.backend, ctx.causal, ctx.scale = backend, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse, mask = ctx.saved_tensors
        _, need_q, need_k, need_v, _, _, need_mask = ctx.needs_input_grad
        if double_backward_wanted():

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return reference.attention(q, k, v, causal=ctx.causal, scale=ctx.scale, mask=mask)

            dq, dk, dv, dmask = backward_through(attend, (q, k, v, mask), dout)
        else:
            dq, dk, dv, dmask = call(
                "attention_bwd", ctx.backend, dout, q, k, v, out, lse, ctx.causal, ctx.scale, mask, need_mask
            )
        return (
            None,
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            None,
            None,
            dmask if need_mask else None,
        )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, bool, float, Tensor | None]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        validate.floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected [B, H, T, D], got shape {tuple(tensor.shape)}")
    if torch.is_autocast_enabled(q.device.type) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        lower = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(lower), k.to(lower), v.to(lower)
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if heads and (not kv_heads or heads % kv_heads):
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    validate.shape("k", k, (batch, kv_heads, keys, width))
    validate.shape("v", v, (batch, kv_heads, keys, v.shape[-1]))
    for name, tensor in (("k", k), ("v", v)):
        validate.dtype(name, tensor, (q.dtype,), f"q is {q.dtype}")
        validate.same_device(name, tensor, "q", q)
    if mask is not None:
        validate.mask("mask", mask, "q", q, (batch, heads, queries, keys))
    scale = max(width, 1) ** -0.5 if scale is None else validate.number("scale", scale)
    return q, k, v, bool(causal), scale, mask


def _heads_inside(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    batch, heads, length, width = shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _heads_inside(q, (*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=statistics)


def _bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dmask = mask.new_empty(mask.shape) if need_dmask and mask is not None else None
    return _heads_inside(q, q.shape), _heads_inside(k, k.shape), _heads_inside(v, v.shape), dmask


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    options = case.options
    batch, heads, queries, keys, width = case.shape
    kv_heads = options.get("kv_heads", heads)
    inputs: dict[str, Any] = {
        "q": draw.normal((batch, heads, queries, width), dtype),
        "k": draw.normal((batch, kv_heads, keys, width), dtype),
        "v": draw.normal((batch, kv_heads, keys, options.get("v_width", width)), dtype, mean=0.2),
        "causal": options.get("causal", False),
    }
    if "scale" in options:
        inputs["scale"] = options["scale"]
    if options.get("mask") == "padding":
        inputs["mask"] = draw.bernoulli((batch, 1, 1, keys), 0.7)
    elif options.get("mask") in ("same", "fp32"):
        mask_dtype = torch.float32 if options["mask"] == "fp32" else dtype
        inputs["mask"] = draw.normal((heads, queries, keys), mask_dtype)
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products forward, five backward, over the pairs that causality leaves."""
    batch, heads, queries, keys, width = case.shape
    pairs = batch * heads * queries * keys
    if case.options.get("causal"):
        pairs = batch * heads * sum(min(max(q + 1 + keys - queries, 0), keys) for q in range(queries))
    moved = batch * heads * width * dtype.itemsize
    return Cost(
        moved * 2 * (queries + keys), moved * 4 * (queries + keys), 4 * pairs * width, 10 * pairs * width
    )


def _baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if causal and (
        mask is not None or queries != keys
    ):  # SDPA's is_causal is top-left, and takes no mask beside it
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        if mask is None or mask.dtype == torch.bool:
            mask = triangle if mask is None else triangle & mask
        else:
            mask = mask.masked_fill(~triangle, -torch.inf)
        causal = False
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


_CASES: tuple[Case, ...] = (
    Case((2, 3, 17, 17, 16)),
    Case((1, 2, 40, 40, 64), {"causal": True}),
    Case((1, 2, 320, 320, 64), {"causal": True}),
    Case((2, 2, 5, 33, 20), {"causal": True}),
    Case((1, 1, 33, 5, 8), {"causal": True}),
    Case((2, 4, 9, 12, 16), {"kv_heads": 2, "causal": True}),
    Case((2, 3, 20, 20, 16), {"mask": "padding"}),
    Case((2, 3, 20, 20, 16), {"mask": "padding", "causal": True}),
    Case((2, 3, 8, 30, 16), {"mask": "same", "scale": 0.3}),
    Case((2, 3, 20, 20, 16), {"mask": "fp32", "causal": True}),
    Case((1, 2, 1, 70, 32), {"causal": True}),
    Case((1, 2, 9, 9, 16), {"scale": -0.3}),
    Case((1, 2, 9, 9, 16), {"scale": 0.0}),
    Case((0, 2, 3, 3, 8)),
)
_BENCH = (Case((2, 12, 512, 512, 64), {"causal": True}),)

SPEC = register(
    OpSpec(
        name="attention",
        entries={
            "fwd": Entry(
                "(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? mask) -> (Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale,"
                " Tensor? mask, bool need_dmask) -> (Tensor, Tensor, Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=attention,
        prepare=_prepare,
        reference=reference.attention,
        condition=reference.condition,
        outputs=("out",),
        gradients=("q", "k", "v", "mask"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=_cost,
        baseline=_baseline,
        c=8.0,
    )
)
