"""The output head and its loss by PyTorch's products (MKL, oneDNN) and csrc/cpu/cross_entropy.cpp, block by block.

A block's logits become their own gradient, row by row in a core's cache, so that they pass through memory four times:
written, read and written again, and read by the products of dx and dweight.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory, products
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.cpu.cross_entropy import cross_entropy_fwd


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
    losses, lse = (memory.empty(targets.shape, torch.float32, x.device) for _ in range(2))
    count = (targets != ignore_index).sum().float() if reduction == "mean" else None
    flat, flat_losses, flat_lse = targets.reshape(-1), losses.view(-1), lse.view(-1)
    g = products.each_row(torch.ones(()), targets, count, reduction)

    def step(logits: Tensor, rows: slice) -> Tensor | None:
        if need_dx or need_dweight:
            return into_gradient(logits, g[rows], flat[rows], flat_losses[rows], flat_lse[rows], ignore_index)
        loss, lse_rows, _ = cross_entropy_fwd(logits, flat[rows], ignore_index, 0.0, "none")
        flat_losses[rows], flat_lse[rows] = loss, lse_rows
        return None

    dx, dweight = products.sweep(x, weight, step, need_dx, need_dweight)
    return products.reduced(losses, count, reduction), lse, count, dx, dweight


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
    if dx is not None or dweight is not None:
        return products.scaled(dx, dloss, need_dx), products.scaled(dweight, dloss, need_dweight)
    flat, flat_lse, g = (
        targets.reshape(-1),
        lse.reshape(-1),
        products.each_row(dloss, targets, count, reduction),
    )

    def step(logits: Tensor, rows: slice) -> Tensor:
        return into_gradient(logits, g[rows], flat[rows], None, flat_lse[rows], ignore_index)

    return products.sweep(x, weight, step, need_dx, need_dweight)


def into_gradient(
    logits: Tensor, g: Tensor, targets: Tensor, losses: Tensor | None, lse: Tensor, ignore_index: int
) -> Tensor:
    """dlogits in the place of the logits; losses and lse are written where losses are asked for."""
    targets = targets.contiguous()
    kernels.cross_entropy_both(
        g.data_ptr(), logits.data_ptr(), targets.data_ptr(), 0 if losses is None else losses.data_ptr(),
        lse.data_ptr(), *logits.shape, DTYPE_CODES[logits.dtype], ignore_index, get_num_threads(),
    )  # fmt: skip
    return logits
