"""Self-attention straight from a packed projection: no copies of q, k, v, and one tensor for their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.dispatch import Backend
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, OpSpec
from fastgpt.ops import attention_cases
from fastgpt.ops.attention import SPEC as ATTENTION
from fastgpt.ops.attention import attend, prepare_options
from fastgpt.reference import attention_qkv as reference
from fastgpt.reference.attention import Window


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
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
    """`attention` of the q, k and v that lie side by side in the last dimension of one tensor.

    Args:
        qkv: [B, T, 3 * H * D], floating: all heads of q, then those of k, then those of v, as a packed projection
            gives them. Read in place; its gradient is written in place into one tensor.
        num_heads: H.
        causal, scale, mask, alibi_slopes, window, softcap, kv_lengths, dropout_p, rng, return_lse, backend:
            as in `attention`.

    Returns:
        out [B, H, T, D], a view of [B, T, H, D] storage; with return_lse (out, lse).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rng = validate.drawn_rng(qkv, dropout_p, rng)
    if isinstance(qkv, Tensor) and qkv.is_floating_point():
        (qkv,) = validate.autocast(qkv)
    options = causal, scale, mask, alibi_slopes, window, softcap, kv_lengths, dropout_p, rng, return_lse
    out, lse = attend(planned(SPEC, backend, (qkv, num_heads, *options)), qkv, num_heads)
    return (out, lse) if return_lse else out


def _prepare(
    qkv: Tensor,
    num_heads: int,
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
    validate.floating("qkv", qkv)
    validate.positive("num_heads", num_heads)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv: expected [B, T, 3 * {num_heads} * D], got shape {tuple(qkv.shape)}")
    (qkv,) = validate.autocast(qkv)
    q, k, v = reference.split(qkv, num_heads)
    options = prepare_options(
        q, (qkv.shape[0], num_heads, qkv.shape[1], qkv.shape[1]), causal=causal, scale=scale, mask=mask,
        alibi_slopes=alibi_slopes, window=window, softcap=softcap, kv_lengths=kv_lengths, dropout_p=dropout_p,
        rng=rng,
    )  # fmt: skip
    return q, k, v, *options, 0, 0, return_lse


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Of a case whose shape is (B, T, H, D)."""
    batch, length, heads, width = case.shape
    return {
        "qkv": draw.normal((batch, length, 3 * heads * width), dtype, mean=0.1),
        "num_heads": heads,
        **attention_cases.make_options(case, (batch, heads, length, length), dtype, draw),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    batch, length, heads, width = case.shape
    return attention_cases.cost(Case((batch, heads, length, length, width), case.options), dtype)


def _baseline(qkv: Tensor, num_heads: int, **options: Any) -> Any:
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return attention_cases.baseline(q, k, v, **options)


_CASES: tuple[Case, ...] = (
    Case((2, 17, 3, 16)),
    Case((1, 70, 2, 20), {"causal": True}),
    Case((2, 20, 2, 16), {"mask": "fp32", "over": "b11k", "causal": True}),
    Case((2, 33, 2, 7), {"causal": True, "return_lse": True, "dropout": 0.2, "window": 9}),
    Case((3, 20, 2, 16), {"lengths": True, "alibi": "bh", "softcap": 3.0}),
    Case((2, 0, 2, 8)),
    Case((0, 4, 2, 8)),
)

SPEC = register(
    OpSpec(
        name="attention_qkv",
        kernels="attention",
        entries=ATTENTION.entries,
        function=attention_qkv,
        prepare=_prepare,
        reference=reference.attention_qkv,
        condition=reference.condition,
        outputs=("out", "lse"),
        gradients=("qkv", "mask"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=(),
        cost=_cost,
        baseline=_baseline,
        c=ATTENTION.c,
    )
)
