"""GELU by PyTorch's aten::gelu; with a bias in fp32, so that x + bias is not rounded before the function."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """PyTorch's op takes everything that the public function lets through."""
    return None


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """y."""
    return _contiguous(torch.nn.functional.gelu(_sum(x, bias), approximate=approximate), x.dtype)


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias)."""
    z = _sum(x, bias)
    dz = torch.ops.aten.gelu_backward(dy.to(z.dtype), z, approximate=approximate)
    dbias = None
    if need_dbias and bias is not None:
        dbias = dz.sum_to_size(bias.shape).to(x.dtype, copy=True)
    return _contiguous(dz, x.dtype) if need_dx else None, dbias


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    return x + bias if x.dtype == torch.float64 else x.float() + bias.float()


def _contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous()
