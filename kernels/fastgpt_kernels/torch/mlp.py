"""The feed-forward part of a block by PyTorch's products and its GELU."""

from __future__ import annotations

from torch import Tensor

from fastgpt_kernels import products
from fastgpt_kernels.torch.linear import OWN


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> str | None:
    """PyTorch's product takes everything that the public function lets through."""
    return None


def mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    return products.mlp_fwd(OWN, x, w1, b1, w2, b2, activation, keep)


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor,
    activation: str,
    need_dx: bool,
    need_dw1: bool,
    need_db1: bool,
    need_dw2: bool,
    need_db2: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dw1, db1, dw2, db2)."""
    return products.mlp_bwd(
        OWN, dy, x, w1, b1, w2, h, activation, need_dx, need_dw1, need_db1, need_dw2, need_db2
    )
