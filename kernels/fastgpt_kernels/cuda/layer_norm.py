"""LayerNorm by csrc/cuda/layer_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.cuda.common import DTYPE_CODES, kernels, num_parts, place_of, unsupported
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
    n = x.shape[-1]
    rows = x.numel() // n if n else x.shape[:-1].numel()
    x_rows, x_stride = rows_of(x, n)
    y = memory.empty_like(x)
    mean = memory.empty(rows, torch.float32, x.device)
    rstd = memory.empty_like(mean)
    stream = None
    residual_at = stream_at = residual_stride = residual_code = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, n)
        stream = memory.empty_like(residual)
        residual_at, stream_at = residual.data_ptr(), stream.data_ptr()
        residual_code = DTYPE_CODES[residual.dtype]
    weight, weight_at = address_of(weight)
    bias, bias_at = address_of(bias)
    kernels.layer_norm_fwd(
        x_rows.data_ptr(), residual_at, weight_at, bias_at, y.data_ptr(), stream_at, mean.data_ptr(), rstd.data_ptr(),
        rows, n, x_stride, residual_stride, DTYPE_CODES[x.dtype], residual_code, _parameter_code(weight, bias), eps,
        *place_of(x),
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
    dx = dresidual = dw = db = partials = None
    dx_at = dresidual_at = dstream_at = dw_at = db_at = partials_at = parts = 0
    dy, dy_stride = rows_of(dy, n)
    x, x_stride = rows_of(x, n)
    if need_dx:
        dx = memory.empty_like(dy)
        dx_at = dx.data_ptr()
        if x.dtype != dy.dtype:
            dresidual = memory.empty_like(x)
            dresidual_at = dresidual.data_ptr()
        dstream, dstream_at = address_of(dstream)
    if need_dw and weight is not None:
        dw = memory.empty_like(weight)
        dw_at = dw.data_ptr()
    if need_db and bias is not None:
        db = memory.empty_like(bias)
        db_at = db.data_ptr()
    if dw is not None or db is not None:
        parts = num_parts(
            rows, n, rows_each=8 if n <= 512 else 4
        )  # up to 512 a block takes eight rows at a time
        partials = memory.empty(parts * 2 * n, torch.float32, x.device)
        partials_at = partials.data_ptr()
    code = _parameter_code(weight, bias)
    weight, weight_at = address_of(weight)
    kernels.layer_norm_bwd(
        dy.data_ptr(), dstream_at, x.data_ptr(), weight_at, mean.data_ptr(), rstd.data_ptr(), dx_at, dresidual_at,
        dw_at, db_at, partials_at, rows, n, dy_stride, x_stride, parts, DTYPE_CODES[dy.dtype], DTYPE_CODES[x.dtype],
        code, *place_of(x),
    )  # fmt: skip
    return dx, dresidual, dw, db


def _parameter_code(weight: Tensor | None, bias: Tensor | None) -> int:
    parameter = weight if weight is not None else bias
    return 0 if parameter is None else DTYPE_CODES[parameter.dtype]
