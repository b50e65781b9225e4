"""The condition of attention: what the rounding errors of its results are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.attention import (
    Options,
    band,
    keep_factors,
    keys_and_values,
    probabilities,
    scores,
    sum_over_groups,
)
from fastgpt.reference.common import Condition
from fastgpt.reference.softmax import condition as softmax_condition


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of out, lse and the gradients for the keyword arguments of `attention`."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    scale = q.shape[-1] ** -0.5 if inputs.get("scale") is None else inputs["scale"]
    options = Options(
        inputs.get("mask"),
        inputs.get("alibi_slopes"),
        inputs.get("kv_lengths"),
        inputs.get("rng"),
        scale,
        *band(inputs.get("window"), inputs.get("causal", False)),
        inputs.get("softcap", 0.0),
        inputs.get("dropout_p", 0.0),
        0,
        q.shape[2],
        k.shape[2],
    )
    return dense(q, k, v, options, grads.get("out"), grads.get("lse"))


def dense(
    q: Tensor, k: Tensor, v: Tensor, o: Options, dout: Tensor | None, dlse: Tensor | None
) -> dict[str, Condition]:
    """Of one dense call. Probabilities, out and ds are rounded before the next product."""
    kv_heads = k.shape[1]
    k, v = keys_and_values(q, k, v, o)
    found = scores(q, k, o)
    s, seen = found.s, found.seen
    # |q| @ |k|^T stands for the condition of a score: what its own rounding is relative to.
    raw_abs = abs(o.scale) * (q.abs() @ k.abs().mT)
    tanh = found.capped / o.softcap if o.softcap > 0.0 else torch.zeros_like(s)
    slope = 1.0 - tanh**2
    scores_abs = raw_abs * slope
    if o.softcap > 0.0:
        scores_abs = scores_abs + found.capped.abs()
    if o.alibi_slopes is not None:
        scores_abs = scores_abs + o.alibi_slopes.abs()[..., None, None] * found.distance.abs()
    if o.mask is not None and o.mask.dtype != torch.bool:
        scores_abs = scores_abs + o.mask.abs().nan_to_num(posinf=0.0)
    p = probabilities(found)
    p_error = softmax_condition({"x": s, "mask": seen}, {})["y"].amplitude
    p_error = p_error + p * (scores_abs + (p * scores_abs).sum(-1, keepdim=True))
    factors = keep_factors(p.shape, o)
    keep = torch.ones_like(p) if factors is None else factors.to(p.dtype)
    kept = keep * (p > 0)  # where a probability too small for its dtype may be lost
    out_rounded = (p * keep) @ v.abs()
    finite = s.nan_to_num(neginf=0.0, posinf=0.0)
    finite = finite if seen is None else finite.masked_fill(~seen, 0.0)
    top = finite.abs().amax(-1) if s.shape[-1] else finite.sum(-1)
    result = {
        "out": Condition((p_error * keep) @ v.abs() + out_rounded, out_rounded, kept @ v.abs()),
        "lse": Condition(1.0 + top + (p * (scores_abs + finite.abs())).sum(-1)),
    }
    if dout is None:
        return result
    dout_abs = dout.abs()
    dp, dp_abs = (dout @ v.mT) * keep, (dout_abs @ v.abs().mT) * keep
    inner = (dout * ((p * keep) @ v)).sum(-1, keepdim=True)
    inner_rounded = (dout_abs * out_rounded).sum(-1, keepdim=True)
    inner_abs = inner_rounded
    if dlse is not None:
        inner = inner - dlse[..., None]
        inner_abs = inner_abs + dlse.abs()[..., None]
    ds = p * (dp - inner)
    ds_error = p_error * (dp - inner).abs() + p * (
        dp_abs + inner_abs + (p_error * dp_abs).sum(-1, keepdim=True)
    )
    ds_rounded = ds.abs() + p * inner_rounded
    ds_underflow = (p > 0) * (1.0 + dp_abs + inner_abs)
    ds_parts = (ds_error, ds_rounded, ds_underflow)
    # Through the softcap: the slope has an error of its own.
    slope_error = 1.0 + tanh**2 + 2.0 * tanh.abs() * (tanh.abs() + slope * raw_abs / (o.softcap or 1.0))
    dr_error = ds_error * slope + (ds.abs() * slope_error if o.softcap > 0.0 else 0.0)
    dr_parts = (dr_error, ds_rounded * slope, ds_underflow)
    result["dq"] = Condition._make(abs(o.scale) * (part @ k.abs()) for part in dr_parts)
    dk = [abs(o.scale) * (part.mT @ q.abs()) for part in dr_parts]
    dv = [part.mT @ dout_abs for part in ((p_error + p) * keep, p * keep, kept)]
    for name, parts in (("dk", dk), ("dv", dv)):
        amplitude, rounded, underflow = (sum_over_groups(part, kv_heads) for part in parts)
        if kv_heads != q.shape[1]:
            rounded = 2.0 * rounded  # each query head's share may be rounded before the shares are summed
        result[name] = Condition(amplitude, rounded, underflow)
    if o.mask is not None and o.mask.dtype != torch.bool:
        result["dmask"] = Condition._make(part.sum_to_size(o.mask.shape) for part in ds_parts)
    return result
