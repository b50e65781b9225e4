"""The output head and its loss by PyTorch's products and log-sum-exp, block by block of the logits."""

from __future__ import annotations

from torch import Tensor

from fastgpt_kernels import products
from fastgpt_kernels.torch.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

_HEAD = products.head_of(cross_entropy_fwd, cross_entropy_bwd)


def supports(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> str | None:
    """PyTorch takes everything that the public function lets through."""
    return None


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, lse, count, dx, dweight)."""
    return products.linear_cross_entropy_fwd(
        products.LIBRARY, _HEAD, x, weight, targets, ignore_index, reduction, need_dx, need_dweight
    )


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight)."""
    return products.linear_cross_entropy_bwd(
        products.LIBRARY,
        _HEAD,
        dloss,
        x,
        weight,
        targets,
        lse,
        count,
        dx,
        dweight,
        ignore_index,
        reduction,
        need_dx,
        need_dweight,
    )
