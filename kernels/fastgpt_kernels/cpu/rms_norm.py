"""RMSNorm by csrc/cpu/rms_norm.cpp."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import address_of, rows_of


def supports(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, stream, rstd)."""
    n = x.shape[-1]
    rows = x.numel() // n if n else x.shape[:-1].numel()
    dtype = x.dtype
    x_rows, x_stride = rows_of(x, n)
    y = memory.empty_like(x)
    rstd = memory.fp32_rows(x, rows)
    stream = None
    residual_at = stream_at = residual_stride = residual_code = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, n)
        stream = memory.empty_like(residual)
        residual_at, stream_at = residual.data_ptr(), stream.data_ptr()
        residual_code = DTYPE_CODES[residual.dtype]
    weight, weight_at = address_of(weight)
    kernels.rms_norm_fwd(
        x_rows.data_ptr(), residual_at, weight_at, y.data_ptr(), stream_at, rstd.data_ptr(), rows, n, x_stride,
        residual_stride, DTYPE_CODES[dtype], residual_code, 0 if weight is None else DTYPE_CODES[weight.dtype], eps,
        get_num_threads(),
    )  # fmt: skip
    return y, stream, rstd


def rms_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dw); x is the stream where there was a residual."""
    n = x.shape[-1]
    rows = rstd.numel()
    dtype = dy.dtype
    dx = dresidual = dw = None
    dx_at = dresidual_at = dstream_at = dw_at = 0
    dy, dy_stride = rows_of(dy, n)
    x, x_stride = rows_of(x, n)
    if need_dx:
        dx = memory.empty_like(dy)
        dx_at = dx.data_ptr()
        if x.dtype != dtype:
            dresidual = memory.empty_like(x)
            dresidual_at = dresidual.data_ptr()
        dstream, dstream_at = address_of(dstream)
    if need_dw and weight is not None:
        dw = memory.empty_like(weight)
        dw_at = dw.data_ptr()
    weight, weight_at = address_of(weight)
    kernels.rms_norm_bwd(
        dy.data_ptr(), dstream_at, x.data_ptr(), weight_at, rstd.data_ptr(), dx_at, dresidual_at, dw_at, rows, n,
        dy_stride, x_stride, DTYPE_CODES[dtype], DTYPE_CODES[x.dtype],
        0 if weight is None else DTYPE_CODES[weight.dtype], get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dw
