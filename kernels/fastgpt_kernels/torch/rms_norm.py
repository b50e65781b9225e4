"""RMSNorm by PyTorch's _fused_rms_norm, fed so that everything is computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def supports(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> str | None:
    """PyTorch's op takes every dtype combination that the public function lets through."""
    return None


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, stream, rstd)."""
    if residual is None:
        s, stream = x, None
    else:
        s = stream = torch.add(x.to(residual.dtype), residual).contiguous()
    # Low precision is widened first: a weight in another dtype than x gets no fused kernel.
    y, rstd = torch.ops.aten._fused_rms_norm(_wide(s).contiguous(), s.shape[-1:], _wide(weight), eps)
    return y.to(x.dtype), stream, rstd.flatten()


def rms_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight)."""
    rstd = rstd.view(*x.shape[:-1], 1)
    mask = [need_dx, need_dw and weight is not None]
    backward = torch.ops.aten._fused_rms_norm_backward if x.is_cuda else _backward
    ds, dw = backward(_wide(dy), _wide(x), x.shape[-1:], rstd, _wide(weight), mask)
    if mask[0] and dstream is not None:
        ds = ds + dstream
    return (
        ds.to(dy.dtype) if mask[0] else None,
        ds.to(x.dtype) if mask[0] and x.dtype != dy.dtype else None,
        dw.to(weight.dtype) if mask[1] and weight is not None else None,
    )


def _backward(dy: Tensor, x: Tensor, columns: torch.Size, rstd: Tensor, weight: Any, mask: list[bool]) -> Any:
    """On a CPU PyTorch has no fused backward: its autograd runs steps like these."""
    xhat = x * rstd
    ds = dw = None
    if mask[0]:
        wdy = dy if weight is None else dy * weight
        ds = torch.addcmul(wdy, xhat, (wdy * xhat).mean(-1, keepdim=True), value=-1).mul_(rstd)
    if mask[1]:
        dw = (dy * xhat).sum_to_size(columns)
    return ds, dw


def _wide(t: Any) -> Any:
    return t if t is None or t.dtype == torch.float64 else t.float()
