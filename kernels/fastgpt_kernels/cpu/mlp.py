"""The feed-forward part of a block: two products of `linear`, the first with the GELU in its epilogue."""

from __future__ import annotations

from torch import Tensor

from fastgpt_kernels import products
from fastgpt_kernels.cpu.common import unsupported
from fastgpt_kernels.cpu.linear import OWN, linear_fwd


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    a, h = linear_fwd(x, w1, b1, activation, keep)
    return linear_fwd(a, w2, b2, None, False)[0], h


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
