"""GELU by csrc/cpu/gelu.cpp."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported

# enum Approximate in csrc/cpu/math.h
_APPROXIMATE = {"none": 0, "tanh": 1}


def supports(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    x = x.contiguous()
    y = memory.empty_like(x)
    rows, n, bias_at = x.numel(), 1, 0
    if bias is not None:
        bias = bias.contiguous()
        n, bias_at = bias.numel(), bias.data_ptr()
        rows = rows // n if n else 0
    kernels.gelu_fwd(
        x.data_ptr(), bias_at, y.data_ptr(), rows, n, DTYPE_CODES[x.dtype], _APPROXIMATE[approximate],
        get_num_threads(),
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias)."""
    x, dy = x.contiguous(), dy.contiguous()
    rows, n, bias_at, dx_at, dbias_at = x.numel(), 1, 0, 0, 0
    dx = dbias = None
    if need_dx:
        dx = memory.empty_like(x)
        dx_at = dx.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        n, bias_at = bias.numel(), bias.data_ptr()
        rows = rows // n if n else 0
        if need_dbias:
            dbias = memory.empty_like(bias)
            dbias_at = dbias.data_ptr()
    kernels.gelu_bwd(
        dy.data_ptr(), x.data_ptr(), bias_at, dx_at, dbias_at, rows, n, DTYPE_CODES[x.dtype],
        _APPROXIMATE[approximate], get_num_threads(),
    )  # fmt: skip
    return dx, dbias
