"""Cross-entropy by csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import rows_of

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # enum Reduction in cross_entropy.cpp


def supports(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> str | None:
    """None, or the reason why not."""
    return unsupported(logits)


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, lse, count): lse of the targets' shape; count, of the targets that count, for the mean."""
    cols = logits.shape[-1]
    logits, stride = rows_of(logits, cols)
    targets = targets.contiguous()
    device = logits.device
    lse = memory.empty(targets.shape, torch.float32, device)
    loss = memory.empty((), torch.float32, device) if reduction != "none" else memory.empty_like(lse)
    count = memory.empty((), torch.float32, device) if reduction == "mean" else None
    kernels.cross_entropy_fwd(
        logits.data_ptr(), targets.data_ptr(), loss.data_ptr(), lse.data_ptr(),
        0 if count is None else count.data_ptr(), targets.numel(), cols, stride, DTYPE_CODES[logits.dtype],
        ignore_index, label_smoothing, _REDUCTIONS[reduction], get_num_threads(),
    )  # fmt: skip
    return loss, lse, count


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """dlogits."""
    cols = logits.shape[-1]
    dlogits = memory.empty_like(logits)
    logits, stride = rows_of(logits, cols)
    dloss, targets, lse = dloss.contiguous(), targets.contiguous(), lse.contiguous()
    kernels.cross_entropy_bwd(
        dloss.data_ptr(), logits.data_ptr(), targets.data_ptr(), lse.data_ptr(),
        0 if count is None else count.data_ptr(), dlogits.data_ptr(), targets.numel(), cols, stride,
        DTYPE_CODES[logits.dtype], ignore_index, label_smoothing, _REDUCTIONS[reduction], get_num_threads(),
    )  # fmt: skip
    return dlogits
