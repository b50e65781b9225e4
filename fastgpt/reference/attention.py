"""Scaled dot-product attention, by definition. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    out = softmax(scale * q @ k^T + mask) @ v,    lse = log sum exp of the scores

q [B, H, Tq, D], k and v [B, Hkv, Tk, D]; H a multiple of Hkv: each key head serves H / Hkv query heads in a row.
Boolean masks and causality as in `softmax`. A float mask's -inf hides a key as well (as in PyTorch's
scaled_dot_product_attention), so that a row of nothing but -inf gives zeros here, where `softmax` gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.softmax import condition as softmax_condition
from fastgpt.reference.softmax import softmax, visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """out [B, H, Tq, Dv] in q's dtype; scale is 1 / sqrt(D) by default."""
    return _attend(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, mask)[0].to(q.dtype)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of out and the gradients. Probabilities, out and ds are rounded before the next product."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask, causal = inputs.get("mask"), inputs.get("causal", False)
    scale = q.shape[-1] ** -0.5 if inputs.get("scale") is None else inputs["scale"]
    kv_heads = k.shape[1]
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    s, seen = _scores(q, k, scale, mask, causal)
    # |q| @ |k|^T stands for the condition of a score: what its own rounding is relative to.
    scores_abs = abs(scale) * (q.abs() @ k.abs().mT)
    if mask is not None and mask.dtype != torch.bool:
        scores_abs = scores_abs + mask.abs().nan_to_num(posinf=0.0)
    p = softmax(s, mask=seen)
    p_error = softmax_condition({"x": s, "mask": seen}, {})["y"].amplitude
    p_error = p_error + p * (scores_abs + (p * scores_abs).sum(-1, keepdim=True))
    kept = (p > 0).to(p.dtype)  # where a probability too small for its dtype may be lost
    out_rounded = p @ v.abs()
    found = {"out": Condition(p_error @ v.abs() + out_rounded, out_rounded, kept @ v.abs())}
    dout = grads.get("out")
    if dout is None:
        return found
    dp, dp_abs = dout @ v.mT, dout.abs() @ v.abs().mT
    inner = (dout * (p @ v)).sum(-1, keepdim=True)
    inner_rounded = (dout.abs() * out_rounded).sum(-1, keepdim=True)
    ds = p * (dp - inner)
    ds_error = p_error * (dp - inner).abs() + p * (
        dp_abs + inner_rounded + (p_error * dp_abs).sum(-1, keepdim=True)
    )
    ds_rounded = ds.abs() + p * inner_rounded
    ds_underflow = kept * (1.0 + dp_abs + inner_rounded)
    dout_abs = dout.abs()
    ds_parts = (ds_error, ds_rounded, ds_underflow)
    found["dq"] = Condition._make(abs(scale) * (part @ k.abs()) for part in ds_parts)
    dk = [abs(scale) * (part.mT @ q.abs()) for part in ds_parts]
    dv = [part.mT @ dout_abs for part in (p_error + p, p, kept)]
    for name, parts in (("dk", dk), ("dv", dv)):
        amplitude, rounded, underflow = (_sum_over_groups(part, kv_heads) for part in parts)
        if kv_heads != q.shape[1]:
            rounded = 2.0 * rounded  # each query head's share is rounded before the shares are summed
        found[name] = Condition(amplitude, rounded, underflow)
    if mask is not None and mask.dtype != torch.bool:
        found["dmask"] = Condition._make(part.sum_to_size(mask.shape) for part in ds_parts)
    return found


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> None:
    """The definition takes everything."""
    return


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse [B, H, Tq], natural logarithm, -inf on rows that see nothing."""
    out, lse = _attend(q, k, v, causal, scale, mask)
    return _heads_inside(out.to(q.dtype)), lse


def attention_bwd(
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
    """(dq, dk, dv, dmask), from ds = p * (dp - sum(p * dp)) with dp = dout @ v^T.

    dq = scale * ds @ k,  dk = scale * ds^T @ q,  dv = p^T @ dout
    """
    q_wide, g = upcast(q), upcast(dout)
    k_wide, v_wide = _per_query_head(upcast(k), q), _per_query_head(upcast(v), q)
    s, seen = _scores(q_wide, k_wide, scale, mask, causal)
    p = softmax(s, mask=seen)
    dp = g @ v_wide.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if seen is not None:  # a NaN in what is seen stays there
        ds = ds.masked_fill(~seen, 0.0)
    dq = scale * (ds @ k_wide)
    dk = _sum_over_groups(scale * (ds.mT @ q_wide), k.shape[1])
    dv = _sum_over_groups(p.mT @ g, k.shape[1])
    dmask = None
    if need_dmask and mask is not None:
        dmask = ds.sum_to_size(mask.shape).to(mask.dtype, copy=True)
    return _heads_inside(dq.to(q.dtype)), _heads_inside(dk.to(k.dtype)), _heads_inside(dv.to(v.dtype)), dmask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    k, v = _per_query_head(upcast(k), q), _per_query_head(upcast(v), q)
    s, seen = _scores(upcast(q), k, scale, mask, causal)
    lse = torch.logsumexp(s if seen is None else s.masked_fill(~seen, -torch.inf), -1)
    return softmax(s, mask=seen) @ v, lse


def _scores(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """The scores with a float mask added, and what may be seen of them (None: everything)."""
    s = scale * (q @ k.mT)
    if mask is None or mask.dtype == torch.bool:
        return s, visible(s, mask, causal)
    return s + upcast(mask), visible(s, mask > -torch.inf, causal)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // max(kv.shape[1], 1)
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def _sum_over_groups(grad: Tensor, kv_heads: int) -> Tensor:
    if grad.shape[1] == kv_heads:
        return grad
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def _heads_inside(out: Tensor) -> Tensor:
    """A [B, H, T, D] view of new [B, T, H, D] storage: what the output projection reads without a copy."""
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
