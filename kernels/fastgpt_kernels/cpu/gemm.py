"""Matrix products by csrc/cpu/gemm.h, and where they are faster than PyTorch's (MKL, oneDNN)."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory, products
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}  # enum Activation in gemm.h
_LEAST_ROWS, _LEAST_COLUMNS, _LEAST_PRODUCTS = 4, 512, 2**22
_LEAST_SUMMED = {torch.float32: 8, torch.float16: 8, torch.bfloat16: 128}
_AMD = kernels.is_amd()


def faster(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether our own product [m, k] x [k, n] is, by measurement on AMD's Zen 3 and Zen 4 (benchmarks/NOTES.md).

    In fp32 and fp16 with AVX2 or better; in bf16 where it is multiplied in pairs. Not for small products, whose host
    time counts, nor for few columns, which leave a thread without work, nor for sums of few products, where packing
    takes longer.
    """
    if not _AMD or n < _LEAST_COLUMNS or m < _LEAST_ROWS or m * n * k < _LEAST_PRODUCTS:
        return False
    if k < _LEAST_SUMMED[dtype]:
        return False
    level = kernels.isa()
    return level == "avx512_bf16" if dtype == torch.bfloat16 else level != "generic"


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(y, h) as `linear_fwd`; None where the library's product is faster."""
    n, k = weight.shape
    if not (faster(x.dtype, x.numel() // max(k, 1), n, k) and _takes(weight)):
        return None
    rows = products.as_rows(x)
    rows = rows if _takes(rows) else rows.contiguous()
    y = memory.empty((*x.shape[:-1], n), x.dtype, x.device)
    h = memory.empty_like(y) if keep and activation is not None else None
    _gemm(rows, weight.t(), y.view(-1, n), None if bias is None else bias.contiguous(), activation, h)
    return y, h


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`products.mm`, the faster way."""
    if not (faster(a.dtype, a.shape[0], b.shape[1], a.shape[1]) and _takes(a) and _takes(b)):
        return products.mm(a, b, out)
    out = memory.empty((a.shape[0], b.shape[1]), a.dtype, a.device) if out is None else out
    _gemm(a, b, out)
    return out


def add_mm(to: Tensor, a: Tensor, b: Tensor) -> None:
    """`products.add_mm`, the faster way."""
    if faster(a.dtype, a.shape[0], b.shape[1], a.shape[1]) and _takes(a) and _takes(b):
        _gemm(a, b, to, add=True)
    else:
        products.add_mm(to, a, b)


def _takes(a: Tensor) -> bool:
    return 1 in a.stride()


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    kept: Tensor | None = None,
    add: bool = False,
) -> None:
    """c [m, n] = act(a [m, k] @ b [k, n] + bias), or c += a @ b; rows of c are adjacent numbers."""
    (m, k), n = a.shape, b.shape[1]
    if (
        0 in (m, n, k)
        or b.shape[0] != k
        or c.shape != (m, n)
        or not a.dtype == b.dtype == c.dtype
        or (n > 1 and c.stride(1) != 1)
    ):
        got = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (a, b, c))
        raise ValueError(f"gemm: expected [m, k], [k, n] and [m, n] of one dtype, none empty, got {got}")
    along_a, along_b = a.stride(1) != 1, b.stride(1) == 1
    kernels.gemm(
        a.data_ptr(), a.stride(1 if along_a else 0), along_a, b.data_ptr(), b.stride(0 if along_b else 1), along_b,
        0 if bias is None else bias.data_ptr(), c.data_ptr(), c.stride(0), 0 if kept is None else kept.data_ptr(),
        m, n, k, add, DTYPE_CODES[a.dtype], ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip


PRODUCTS = products.Products(mm, add_mm)
