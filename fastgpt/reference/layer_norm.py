"""LayerNorm, by definition.

    s = x + residual                                    # without a residual, s = x
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

mean and (biased) variance over the last dimension, n columns. Ba, Kiros, Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Any:
    """y, and with a residual (y, s). s is rounded to the residual's dtype before it is normalised."""
    if residual is None:
        return _normalise(x, weight, bias, eps).to(x.dtype)
    stream = (upcast(x) + upcast(residual)).to(residual.dtype)
    return _normalise(stream, weight, bias, eps).to(x.dtype), stream


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, s and the gradients; first order in the rounding of every step.

    They hold for inputs whose s is exact in its dtype: with a residual, the op restarts from the s that it returned.
    """
    x, weight, bias, residual = (inputs.get(name) for name in ("x", "weight", "bias", "residual"))
    assert x is not None
    one = torch.ones((), dtype=x.dtype, device=x.device)
    w = one if weight is None else weight.abs()
    s = x if residual is None else x + residual
    s_abs = x.abs() if residual is None else x.abs() + residual.abs()
    mean, rstd = _statistics(s, inputs.get("eps", 1e-5))
    xhat = (s - mean) * rstd
    xhat_abs = (s_abs + s_abs.mean(-1, keepdim=True)) * rstd  # what an error in xhat is relative to
    found = {"y": Condition(xhat_abs * w + (0 if bias is None else bias.abs()))}
    if residual is not None:
        found["stream"] = Condition(s_abs)
    dy = grads.get("y")
    dstream = grads.get("stream")
    if dy is None:
        dy = torch.zeros_like(x)
    wdy = dy.abs() * w
    wdy_mean = wdy.mean(-1, keepdim=True)
    c2 = (dy * xhat * (one if weight is None else weight)).mean(-1, keepdim=True).abs()
    c2_abs = (wdy * xhat_abs).mean(-1, keepdim=True)
    dx = rstd * (wdy + wdy_mean + xhat_abs * c2 + xhat.abs() * c2_abs)
    if dstream is not None:  # added in fp32; the sum is rounded once
        dx = dx + dstream.abs()
    found["dx"] = found["dresidual"] = Condition(dx)
    columns = x.shape[-1:]
    found["dweight"] = Condition((dy.abs() * xhat_abs).sum_to_size(columns))
    found["dbias"] = Condition(dy.abs().sum_to_size(columns))
    return found


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> None:
    """The definition takes everything."""
    return


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, stream, mean, rstd), statistics of shape [rows]."""
    stream = None if residual is None else (upcast(x) + upcast(residual)).to(residual.dtype)
    s = x if stream is None else stream
    mean, rstd = _statistics(upcast(s), eps)
    y = _normalise(s, weight, bias, eps).to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return y, stream, mean.flatten(), rstd.flatten()


def layer_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight, dbias) with wdy = weight * dy, xhat = (x - mean) * rstd.

    dx = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dstream,  dweight = sum(dy * xhat),  dbias = sum(dy)
    """
    columns = x.shape[-1:]
    g = upcast(dy)
    xhat = (upcast(x) - mean.view(*x.shape[:-1], 1)) * rstd.view(*x.shape[:-1], 1)
    dx = dresidual = dweight = dbias = None
    if need_dx:
        wdy = g if weight is None else g * upcast(weight)
        c1, c2 = wdy.mean(-1, keepdim=True), (wdy * xhat).mean(-1, keepdim=True)
        ds = rstd.view(*x.shape[:-1], 1) * (wdy - c1 - xhat * c2)
        if dstream is not None:
            ds = ds + upcast(dstream)
        dx = ds.to(dy.dtype)
        if x.dtype != dy.dtype:
            dresidual = ds.to(x.dtype)
    if need_dw and weight is not None:
        dweight = (g * xhat).sum_to_size(columns).to(weight.dtype, copy=True)
    if need_db and bias is not None:
        dbias = g.sum_to_size(columns).to(bias.dtype, copy=True)
    return dx, dresidual, dweight, dbias


def _statistics(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = s.mean(-1, keepdim=True)
    return mean, ((s - mean).square().mean(-1, keepdim=True) + eps).rsqrt()


def _normalise(s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    s = upcast(s)
    mean, rstd = _statistics(s, eps)
    y = (s - mean) * rstd
    if weight is not None:
        y = y * upcast(weight)
    return y if bias is None else y + upcast(bias)
