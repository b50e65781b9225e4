"""A linear layer by PyTorch's product and its GELU."""

from __future__ import annotations

from torch import Tensor

from fastgpt_kernels import products
from fastgpt_kernels.torch import gelu

OWN = products.Kernels(gelu.gelu_fwd, gelu.gelu_bwd, products.column_sums)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """PyTorch's product takes everything that the public function lets through."""
    return None


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    return products.linear_fwd(OWN, x, weight, bias, activation, keep)


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    return products.linear_bwd(OWN, dy, x, weight, bias, h, activation, need_dx, need_dweight, need_dbias)
