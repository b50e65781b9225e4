"""LayerNorm by PyTorch's native_layer_norm, fed so that statistics are fp32 in every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> str | None:
    """PyTorch's op takes every dtype combination that the public function lets through."""
    return None


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, stream, mean, rstd)."""
    if residual is None:
        s, stream = x, None
    else:
        s = stream = torch.add(x.to(residual.dtype), residual).contiguous()
    # Low precision is widened first: native_layer_norm rounds its statistics to the input's dtype.
    y, mean, rstd = torch.native_layer_norm(_wide(s), s.shape[-1:], _wide(weight), _wide(bias), eps)
    return y.to(x.dtype), stream, mean.flatten(), rstd.flatten()


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
    """(dx, dresidual, dweight, dbias)."""
    lead = (*x.shape[:-1], 1)
    mask = [need_dx, need_dw and weight is not None, False]
    ds, dw, _ = torch.ops.aten.native_layer_norm_backward(
        _wide(dy), _wide(x), x.shape[-1:], mean.view(lead), rstd.view(lead), _wide(weight), _wide(bias), mask
    )
    # native_layer_norm_backward sums dbias one row after the other; sum() in a tree, which keeps small errors small.
    db = _wide(dy).sum_to_size(x.shape[-1:]) if need_db and bias is not None else None
    if mask[0] and dstream is not None:
        ds = ds + dstream
    return (
        ds.to(dy.dtype) if mask[0] else None,
        ds.to(x.dtype) if mask[0] and x.dtype != dy.dtype else None,
        dw.to(weight.dtype) if mask[1] and weight is not None else None,
        db.to(bias.dtype, copy=True) if db is not None and bias is not None else None,
    )


def _wide(t: Any) -> Any:
    return t if t is None or t.dtype == torch.float64 else t.float()
