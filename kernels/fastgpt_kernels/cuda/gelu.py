"""GELU by csrc/cuda/gelu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.cuda.common import DTYPE_CODES, kernels, num_parts, place_of, unsupported
from fastgpt_kernels.rows import address_of

# enum Approximate in csrc/cuda/gelu.cu
_APPROXIMATE = {"none": 0, "tanh": 1}


def supports(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    x = x.contiguous()
    y = memory.empty_like(x)
    bias, bias_at = address_of(bias)
    rows, n = _rows(x, bias)
    kernels.gelu_fwd(
        x.data_ptr(), bias_at, y.data_ptr(), rows, n, DTYPE_CODES[x.dtype], _APPROXIMATE[approximate], *place_of(x)
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias)."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = dbias = None
    dx_at = dbias_at = partials_at = parts = 0
    if need_dx:
        dx = memory.empty_like(x)
        dx_at = dx.data_ptr()
    bias, bias_at = address_of(bias)
    rows, n = _rows(x, bias)
    if bias is not None and need_dbias:
        dbias = memory.empty_like(bias)
        parts = num_parts(rows, n, rows_each=32)
        partials = memory.empty(parts * n, torch.float32, x.device)
        dbias_at, partials_at = dbias.data_ptr(), partials.data_ptr()
    kernels.gelu_bwd(
        dy.data_ptr(), x.data_ptr(), bias_at, dx_at, dbias_at, partials_at, rows, n, parts, DTYPE_CODES[x.dtype],
        _APPROXIMATE[approximate], *place_of(x),
    )  # fmt: skip
    return dx, dbias


def _rows(x: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Rows and columns; without a bias they mean nothing."""
    if bias is None:
        return 1, x.numel()
    n = bias.numel()
    return x.numel() // n if n else 0, n
