"""LayerNorm by csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import address_of, rows_of


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, stream, mean, rstd)."""
    shape, code = x.shape, DTYPE_CODES[x.dtype]
    n = shape[-1]
    rows = x.numel() // n if n else shape[:-1].numel()
    x_rows, x_stride = rows_of(x, n)
    y = memory.empty_like(x)
    mean = memory.fp32_rows(x, rows)
    rstd = memory.fp32_rows(x, rows)
    stream = None
    residual_at = stream_at = residual_stride = residual_code = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, n)
        stream = memory.empty_like(residual)
        residual_at, stream_at = residual.data_ptr(), stream.data_ptr()
        residual_code = DTYPE_CODES[residual.dtype]
    weight_at = bias_at = parameter_code = 0
    if weight is not None:
        weight = weight.contiguous()
        weight_at, parameter_code = weight.data_ptr(), DTYPE_CODES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        bias_at, parameter_code = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    kernels.layer_norm_fwd(
        x_rows.data_ptr(), residual_at, weight_at, bias_at, y.data_ptr(), stream_at, mean.data_ptr(), rstd.data_ptr(),
        rows, n, x_stride, residual_stride, code, residual_code, parameter_code, eps, get_num_threads(),
    )  # fmt: skip
    return y, stream, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dw, db); x is the stream where there was a residual."""
    n = x.shape[-1]
    rows = mean.numel()
    dtype = dy.dtype
    dx = dresidual = dw = db = None
    dx_at = dresidual_at = dstream_at = dw_at = db_at = 0
    dy, dy_stride = rows_of(dy, n)
    x, x_stride = rows_of(x, n)
    if need_dx:
        dx = memory.empty_like(dy)
        dx_at = dx.data_ptr()
        if x.dtype != dtype:
            dresidual = memory.empty_like(x)
            dresidual_at = dresidual.data_ptr()
        if dstream is not None:
            dstream = dstream.contiguous()
            dstream_at = dstream.data_ptr()
    if need_dw and weight is not None:
        dw = memory.empty_like(weight)
        dw_at = dw.data_ptr()
    if need_db and bias is not None:
        db = memory.empty_like(bias)
        db_at = db.data_ptr()
    parameter = weight if weight is not None else bias
    weight, weight_at = address_of(weight)
    kernels.layer_norm_bwd(
        dy.data_ptr(), dstream_at, x.data_ptr(), weight_at, mean.data_ptr(), rstd.data_ptr(), dx_at, dresidual_at,
        dw_at, db_at, rows, n, dy_stride, x_stride, DTYPE_CODES[dtype], DTYPE_CODES[x.dtype],
        0 if parameter is None else DTYPE_CODES[parameter.dtype], get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dw, db
