"""What the launchers share: the compiled module, dtype codes, the stream, and how rows are cut into parts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import EMULATE_CUDA, load_cuda

kernels = load_cuda()

# enum Dtype in csrc/common/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor) -> str | None:
    """The reason why no CUDA kernel takes x, or None."""
    if not (x.is_cpu if EMULATE_CUDA else x.is_cuda):
        return f"needs a {'CPU' if EMULATE_CUDA else 'CUDA'} tensor, got one on {x.device}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if x.dtype not in DTYPE_CODES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    return None


def place_of(x: Tensor) -> tuple[int, int]:
    """torch's current stream on x's device, and the device's index: the last two arguments of every kernel."""
    if EMULATE_CUDA:
        return 0, 0
    return torch.cuda.current_stream(x.device).cuda_stream, x.get_device()


def num_parts(rows: int, n: int, rows_each: int) -> int:
    """Parts of at least `rows_each` rows whose column sums are added in a second stage.

    A function of the shape alone, so that results are the same on every device: about a million partial sums, but
    enough parts to fill a large GPU.
    """
    wanted = min(1024, max(128, 2**20 // max(1, n)))
    return max(1, min(wanted, -(-rows // rows_each)))
