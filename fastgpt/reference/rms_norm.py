"""RMSNorm, by definition.

    s = x + residual                                    # without a residual, s = x
    y = s / sqrt(mean(s^2) + eps) * weight

the mean over the last dimension, n columns. Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Any:
    """y, and with a residual (y, s). s is rounded to the residual's dtype before it is normalised."""
    if residual is None:
        return _normalise(x, weight, eps).to(x.dtype)
    stream = (upcast(x) + upcast(residual)).to(residual.dtype)
    return _normalise(stream, weight, eps).to(x.dtype), stream


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, s and the gradients. Nothing in y cancels: its error is relative to y itself.

    They hold for inputs whose s is exact in its dtype: with a residual, the op restarts from the s that it returned.
    """
    x, weight, residual = (inputs.get(name) for name in ("x", "weight", "residual"))
    assert x is not None
    one = torch.ones((), dtype=x.dtype, device=x.device)
    w = one if weight is None else weight.abs()
    s = x if residual is None else x + residual
    rstd = _rstd(s, inputs.get("eps", 1e-6))
    xhat_abs = s.abs() * rstd
    found = {"y": Condition(xhat_abs * w)}
    if residual is not None:
        found["stream"] = Condition(x.abs() + residual.abs())
    dy = grads.get("y")
    dstream = grads.get("stream")
    if dy is None:
        dy = torch.zeros_like(x)
    wdy = dy.abs() * w
    dx = rstd * (wdy + xhat_abs * (wdy * xhat_abs).mean(-1, keepdim=True))
    if dstream is not None:  # added in fp32; the sum is rounded once
        dx = dx + dstream.abs()
    found["dx"] = found["dresidual"] = Condition(dx)
    found["dweight"] = Condition((dy.abs() * xhat_abs).sum_to_size(x.shape[-1:]))
    return found


def supports(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> None:
    """The definition takes everything."""
    return


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, stream, rstd), rstd of shape [rows]."""
    stream = None if residual is None else (upcast(x) + upcast(residual)).to(residual.dtype)
    s = x if stream is None else stream
    y = _normalise(s, weight, eps).to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return y, stream, _rstd(upcast(s), eps).flatten()


def rms_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight) with wdy = weight * dy, xhat = x * rstd.

    dx = rstd * (wdy - xhat * mean(wdy * xhat)) + dstream,  dweight = sum(dy * xhat)
    """
    rstd = rstd.view(*x.shape[:-1], 1)
    g = upcast(dy)
    xhat = upcast(x) * rstd
    dx = dresidual = dweight = None
    if need_dx:
        wdy = g if weight is None else g * upcast(weight)
        ds = rstd * (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True))
        if dstream is not None:
            ds = ds + upcast(dstream)
        dx = ds.to(dy.dtype)
        if x.dtype != dy.dtype:
            dresidual = ds.to(x.dtype)
    if need_dw and weight is not None:
        dweight = (g * xhat).sum_to_size(x.shape[-1:]).to(weight.dtype, copy=True)
    return dx, dresidual, dweight


def _rstd(s: Tensor, eps: float) -> Tensor:
    return (s.square().mean(-1, keepdim=True) + eps).rsqrt()


def _normalise(s: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    s = upcast(s)
    y = s * _rstd(s, eps)
    return y if weight is None else y * upcast(weight)
