"""The output head and its loss by the faster product (`gemm.py`) and csrc/cpu/cross_entropy.cpp, block by block.

A block's logits become their own gradient, row by row in a core's cache, so that they pass through memory four times:
written, read and written again, and read by the products of dx and dweight.
"""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory, products
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.cpu.cross_entropy import cross_entropy_fwd
from fastgpt_kernels.cpu.gemm import PRODUCTS


def supports(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


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
        PRODUCTS, into_gradient, x, weight, targets, ignore_index, reduction, need_dx, need_dweight
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
        PRODUCTS,
        into_gradient,
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


def into_gradient(
    logits: Tensor, targets: Tensor, g: Tensor | None, lse: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`products.Head`: dlogits in the place of the logits."""
    targets, losses = targets.contiguous(), None
    if g is None:
        losses, lse, _ = cross_entropy_fwd(logits, targets, ignore_index, 0.0, "none")
        return losses, lse, None
    if lse is None:
        losses, lse = memory.fp32_rows(g, g.shape[0]), memory.fp32_rows(g, g.shape[0])
    kernels.cross_entropy_both(
        g.data_ptr(), logits.data_ptr(), targets.data_ptr(), 0 if losses is None else losses.data_ptr(),
        lse.data_ptr(), *logits.shape, DTYPE_CODES[logits.dtype], ignore_index, get_num_threads(),
    )  # fmt: skip
    return losses, lse, logits
