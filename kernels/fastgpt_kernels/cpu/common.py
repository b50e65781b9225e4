"""What the launchers share: the compiled module, dtype codes, and row strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import load_cpu

kernels = load_cpu()

# enum Dtype in csrc/cpu/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor) -> str | None:
    """The reason why no CPU kernel takes x, or None."""
    if x.dtype in DTYPE_CODES and x.is_cpu:
        return None
    if not x.is_cpu:
        return f"needs a CPU tensor, got one on {x.device}"
    return f"needs float32, bfloat16 or float16, got {x.dtype}"


def rows_of(x: Tensor, n: int) -> tuple[Tensor, int]:
    """x as rows of n adjacent elements and the stride between rows; copied only if its layout has no such form."""
    if x.is_contiguous():
        return x, n
    shape, stride = x.shape, x.stride()
    if stride[-1] == 1 or n == 1:
        step, expected = n, None
        for size, at in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
            if size == 1:
                continue
            if expected is None:
                step = at
            elif at != expected:
                break
            expected = at * size
        else:
            return x, step
    return x.contiguous(), n
