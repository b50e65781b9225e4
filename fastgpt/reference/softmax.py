"""The attention softmax over the last dimension, by definition.

    s = scale * x + mask                            # a float mask is added, a boolean one excludes where False
    y_j = exp(s_j - max s) / sum_k exp(s_k - max s)
    dropout: y_j * keep_j / (1 - p)

x is [..., Tq, Tk]. Causal hides the keys k > q + Tk - Tq from query q (bottom-right: the last query sees every
key). What boolean mask or causality excludes is never looked at; a row with everything excluded is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.philox import keep_mask


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y in x's dtype. rng: int64 (seed, offset), needed when dropout_p > 0."""
    y = _probabilities(x, scale, mask, causal)
    if dropout_p > 0.0:
        assert rng is not None
        y = torch.where(keep_mask(x.shape, dropout_p, rng), y / (1.0 - dropout_p), 0.0)
    return y.to(x.dtype)


def visible(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Boolean, broadcastable to x: what neither a boolean mask nor causality excludes; None if nothing is."""
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if causal:
        queries, keys = x.shape[-2:]
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        seen = triangle if seen is None else seen & triangle
    return seen


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, dx and dmask: a score's rounding is relative to |scale * x| + |mask| and to |s - max s|."""
    x, mask = inputs["x"], inputs.get("mask")
    scale, causal = inputs.get("scale", 1.0), inputs.get("causal", False)
    dropout_p, rng = inputs.get("dropout_p", 0.0), inputs.get("rng")
    float_mask = mask if mask is not None and mask.dtype != torch.bool else None
    s = scale * x if float_mask is None else scale * x + float_mask
    s_abs = (scale * x).abs() if float_mask is None else (scale * x).abs() + float_mask.abs()
    seen = visible(x, mask, causal)
    if seen is not None:
        s, s_abs = s.masked_fill(~seen, -torch.inf), s_abs.masked_fill(~seen, 0.0)
    s_abs = s_abs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    p = _probabilities(x, scale, mask, causal)
    top = s.amax(-1, keepdim=True) if x.shape[-1] else s.sum(-1, keepdim=True)
    depth = (top - s).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    p_error = p * (1.0 + s_abs + depth + (p * (s_abs + depth)).sum(-1, keepdim=True))
    keep = torch.ones_like(p)
    if dropout_p > 0.0:
        assert rng is not None
        keep = keep_mask(x.shape, dropout_p, rng).to(p.dtype) / (1.0 - dropout_p)
    found = {"y": Condition(p_error * keep)}
    dy = grads.get("y")
    if dy is None:
        return found
    # ds = p * (g - sum(p * g)): rounding of every term, and the error of p through both places it stands in.
    g = dy * keep
    inner = (p * g).sum(-1, keepdim=True)
    inner_abs = (p * g.abs()).sum(-1, keepdim=True)
    ds = (
        p * (g.abs() + inner_abs)
        + p_error * (g - inner).abs()
        + p * (p_error * g.abs()).sum(-1, keepdim=True)
    )
    # The saved p was rounded to the working dtype.
    rounded = p * (g - inner).abs() + p * inner_abs
    underflow = (g - inner).abs() + p * g.abs().sum(-1, keepdim=True)
    found["dx"] = Condition(abs(scale) * ds, abs(scale) * rounded, abs(scale) * underflow)
    if float_mask is not None:
        shape = float_mask.shape
        found["dmask"] = Condition._make(part.sum_to_size(shape) for part in (ds, rounded, underflow))
    return found


def supports(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> None:
    """The definition takes everything."""
    return


def softmax_fwd(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y, p): p, the probabilities before dropout, only with dropout."""
    p = _probabilities(x, scale, mask, causal)
    if dropout_p == 0.0:
        return p.to(x.dtype), None
    assert rng is not None
    y = torch.where(keep_mask(x.shape, dropout_p, rng), p / (1.0 - dropout_p), 0.0)
    return y.to(x.dtype), p.to(x.dtype, copy=True)


def softmax_bwd(
    dy: Tensor,
    p: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dmask): ds = p * (g - sum(p * g)) with g = dy * keep / (1 - dropout_p); dx = scale * ds."""
    g, p_wide = upcast(dy), upcast(p)
    if dropout_p > 0.0:
        assert rng is not None
        g = torch.where(keep_mask(dy.shape, dropout_p, rng), g / (1.0 - dropout_p), 0.0)
    seen = visible(dy, None, causal)
    if seen is not None:  # a hidden element's dy is not looked at
        g = g.masked_fill(~seen, 0.0)
    ds = p_wide * (g - (p_wide * g).sum(-1, keepdim=True))
    dmask = None
    if need_dmask and mask is not None:
        dmask = ds.sum_to_size(mask.shape).to(mask.dtype, copy=True)
    return (scale * ds).to(dy.dtype) if need_dx else None, dmask


def _probabilities(x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    s = upcast(x) * scale
    if mask is not None and mask.dtype != torch.bool:
        s = s + upcast(mask)
    seen = visible(x, mask, causal)
    if seen is None:
        return torch.softmax(s, -1)
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1)
    nothing_seen = ~seen.any(-1, keepdim=True)
    return p.masked_fill(~seen | nothing_seen, 0.0)
