"""A linear layer: a few rows by csrc/cpu/few_rows.h, more by csrc/cpu/gemm.h with bias and GELU in its epilogue, or
by PyTorch's product (MKL, oneDNN) and csrc/cpu/gelu.cpp where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory, products
from fastgpt_kernels.cpu import gelu, gemm
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import rows_of

# Rows up to which the kernel that streams the weight is ahead of the products of many (benchmarks/NOTES.md). 16-bit
# weights are widened for it, where those multiply them in pairs.
MOST_FEW_ROWS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 16}


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    found = few_rows(x, weight, bias, activation, keep)
    if found is None:
        found = gemm.linear(x, weight, bias, activation, keep)
    return products.linear_fwd(OWN, x, weight, bias, activation, keep) if found is None else found


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    return products.linear_bwd(OWN, dy, x, weight, bias, h, activation, need_dx, need_dweight, need_dbias)


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(y, h) by the kernel that streams the weight once, or None where other products are faster."""
    n, k = weight.shape
    most = MOST_FEW_ROWS[x.dtype] * k
    if n == 0 or k == 0 or x.numel() > most or x.numel() == 0 or weight.stride(1) != 1:
        return None
    rows, x = x.numel() // k, x.contiguous()
    y = memory.empty((*x.shape[:-1], n), x.dtype, x.device)
    h = memory.empty_like(y) if keep and activation is not None else None
    bias = None if bias is None else bias.contiguous()
    kernels.linear_few_rows(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        0 if h is None else h.data_ptr(), rows, k, n, weight.stride(0), DTYPE_CODES[x.dtype],
        gemm.ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    return y, h


def column_sums(dy: Tensor) -> Tensor:
    """dbias [n] of dy [.., n]."""
    n = dy.shape[-1]
    dbias = memory.empty((n,), dy.dtype, dy.device)
    rows, stride = rows_of(dy, n)
    kernels.linear_dbias(
        rows.data_ptr(), dbias.data_ptr(), dy.numel() // n if n else 0, n, stride, DTYPE_CODES[dy.dtype],
        get_num_threads(),
    )  # fmt: skip
    return dbias


OWN = products.Kernels(gelu.gelu_fwd, gelu.gelu_bwd, column_sums, gemm.PRODUCTS)
