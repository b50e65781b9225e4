"""What the launchers share: the compiled module, and dtype codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import load_cpu

kernels = load_cpu()

# enum Dtype in csrc/common/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor) -> str | None:
    """The reason why no CPU kernel takes x, or None."""
    if x.dtype in DTYPE_CODES and x.is_cpu:
        return None
    if not x.is_cpu:
        return f"needs a CPU tensor, got one on {x.device}"
    return f"needs float32, bfloat16 or float16, got {x.dtype}"
