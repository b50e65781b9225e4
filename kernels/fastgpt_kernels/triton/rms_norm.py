"""RMSNorm in Triton.

    s = x + residual
    y = s * rstd * weight,  rstd = 1 / sqrt(mean(s^2) + eps)
    dx = rstd * (wdy - xhat * mean(wdy * xhat)) + dstream,  wdy = weight * dy,  xhat = s * rstd
    dweight = sum(dy * xhat)

Forward a program takes a block of rows. Backward few programs walk all rows, each with its own partial sums of
dweight, which a second kernel adds up in a fixed order: x and dy are read once, and results repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.rows import rows_of
from fastgpt_kernels.triton.common import (
    DTYPE_NAMES,
    RowsConfig,
    Tunable,
    add_compensated,
    around,
    cdiv,
    column_sums,
    configured,
    next_power_of_2,
    processors,
    rows_rule,
    sixteen_warps,
    unsupported,
    walkers,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch


def supports(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def heuristic_fwd(n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    # 32768 columns in one block spill where there is a residual.
    rule = rows_rule(n, arch, one_block=16384, tile=2048, warps=4)
    return configured(arch, "rms_norm_fwd", _key(n, dtype), rule)


def heuristic_bwd(n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """dtype: the wider one of x and dy.

    Four fp32 values an element (x, dy, weight, the sum) fill the registers sooner than forward does.
    """
    wide = dtype == torch.float32
    rule = rows_rule(n, arch, one_block=4096, tile=2048 if wide else 4096, warps=8)
    if wide and rule.BLOCK_COLS == 4096:
        rule = replace(rule, num_warps=2 * rule.num_warps)
    if n > rule.BLOCK_COLS and arch != "interpreter":
        # Four rows at a time, so that the partial sums, which then lie in memory, are touched once for the four.
        rule = replace(rule, BLOCK_ROWS=4, BLOCK_COLS=512, num_warps=4 if arch.startswith("gfx") else 8)
    return configured(arch, "rms_norm_bwd", _key(n, dtype), rule)


def candidates(kernel: str, n: int, dtype: torch.dtype) -> list[RowsConfig]:
    """What the tuner tries for rows of n columns."""
    heuristic = heuristic_fwd if kernel == "rms_norm_fwd" else heuristic_bwd
    return around(heuristic(n, dtype, ""), (1,) if kernel == "rms_norm_fwd" else (1, 2))


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), candidates(kernel, n, dtype), _problem(kernel, n, dtype))
        for kernel in ("rms_norm_fwd", "rms_norm_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n in (512, 1024, 2048, 4096, 8192, 16384, 65536)
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x, dy = (torch.randn(max(2**25 // n, 1), n, dtype=dtype, device=device) for _ in range(2))
        w = torch.randn(n, dtype=dtype, device=device)
        rstd = torch.ones(x.shape[0], device=device)
        if kernel == "rms_norm_fwd":
            return lambda: rms_norm_fwd(x, w, None, 1e-6)
        return lambda: rms_norm_bwd(dy, None, x, w, rstd, True, True)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}"


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, stream, rstd)."""
    n = x.shape[-1]
    rows = x.numel() // n if n else x.shape[:-1].numel()
    arch = arch_of(x.device)
    config = heuristic_fwd(n, x.dtype, arch)
    y = memory.empty_like(x)
    rstd = memory.empty(rows, torch.float32, x.device)
    x, x_stride = rows_of(x, n)
    stream, residual_stride = None, 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, n)
        stream = memory.empty_like(residual)
    launch(
        _rms_norm_fwd_kernel, (cdiv(rows, config.BLOCK_ROWS),),
        x, residual, _adjacent(weight), y, stream, rstd, rows, n, x_stride, residual_stride, eps,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, ONE_BLOCK=n <= config.BLOCK_COLS,
        num_warps=config.num_warps, **(sixteen_warps(arch, config.num_warps) if n > config.BLOCK_COLS else {}),
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
    """(dx, dresidual, dweight); x is the stream where there was a residual."""
    n, rows = x.shape[-1], rstd.numel()
    arch = arch_of(dy.device)
    dtype = torch.promote_types(x.dtype, dy.dtype)
    config = heuristic_bwd(n, dtype, arch)
    dx = memory.empty_like(dy) if need_dx else None
    dresidual = memory.empty_like(x) if need_dx and x.dtype != dy.dtype else None
    dw = memory.empty_like(weight) if need_dw and weight is not None else None
    dy, dy_stride = rows_of(dy, n)
    x, x_stride = rows_of(x, n)
    dstream_stride = 0
    if dstream is not None:
        dstream, dstream_stride = rows_of(dstream, n)
    # As many programs as run at once with 16 warps on each processor: more would only add partial sums.
    at_once = processors(dy.device) * max(16 // config.num_warps, 1)
    parts = walkers(cdiv(rows, config.BLOCK_ROWS), at_once)
    partials = None if dw is None else memory.empty((1, parts, n), torch.float32, dy.device)
    launch(
        _rms_norm_bwd_kernel, (parts,),
        dy, dstream if need_dx else None, x, _adjacent(weight), rstd, dx, dresidual, partials,
        rows, n, dy_stride, dstream_stride, x_stride,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, ONE_BLOCK=n <= config.BLOCK_COLS,
        STAGES=config.num_stages, num_warps=config.num_warps,
        **(sixteen_warps(arch, config.num_warps) if dtype == torch.float32 or n > config.BLOCK_COLS else {}),
    )  # fmt: skip
    if partials is not None:
        column_sums(partials, dw)
    return dx, dresidual, dw


def _adjacent(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rstd_ptr, rows, n, x_stride, residual_stride, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < rows
    cols = tl.arange(0, BLOCK_COLS)
    x_ptr += (row * x_stride)[:, None]  # from here on [rows, 1] pointers
    y_ptr += (row * n)[:, None]
    if residual_ptr is not None:
        residual_ptr += (row * residual_stride)[:, None]
        stream_ptr += (row * n)[:, None]
    if ONE_BLOCK:
        s = _stream_tile(x_ptr, residual_ptr, stream_ptr, row_inside, cols, n)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, axis=1) / n + eps)
        _store_tile(s, rstd, weight_ptr, y_ptr, stream_ptr, row_inside, cols, n)
    else:
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for begin in range(0, n, BLOCK_COLS):
            s = _stream_tile(x_ptr, residual_ptr, stream_ptr, row_inside, begin + cols, n)
            squares += s * s
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / n + eps)
        for begin in range(0, n, BLOCK_COLS):
            s = _stream_tile(x_ptr, residual_ptr, stream_ptr, row_inside, begin + cols, n)
            _store_tile(s, rstd, weight_ptr, y_ptr, stream_ptr, row_inside, begin + cols, n)
    tl.store(rstd_ptr + row, rstd, mask=row_inside)


@triton.jit
def _stream_tile(x_ptr, residual_ptr, stream_ptr, row_inside, cols, n):
    """s = x + residual, rounded to the stream's dtype, in fp32  # [rows, cols], 0 outside"""
    inside = row_inside[:, None] & (cols < n)[None, :]
    s = tl.load(x_ptr + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        s = s.to(stream_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _store_tile(s, rstd, weight_ptr, y_ptr, stream_ptr, row_inside, cols, n):
    """The stream, and y = s * rstd * weight."""
    inside = row_inside[:, None] & (cols < n)[None, :]
    if stream_ptr is not None:
        tl.store(stream_ptr + cols[None, :], s.to(stream_ptr.dtype.element_ty), mask=inside)
    y = s * rstd[:, None] * _weight_tile(weight_ptr, cols, n)
    tl.store(y_ptr + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_tile(weight_ptr, cols, n):
    if weight_ptr is None:
        w = 1.0
    else:
        w = tl.load(weight_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_bwd_kernel(
    dy_ptr, dstream_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    rows, n, dy_stride, dstream_stride, x_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid, parts = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_COLS)
    if partials_ptr is not None:  # [program, n]
        dw_ptr = partials_ptr + pid.to(tl.int64) * n
    if ONE_BLOCK:
        w = _weight_tile(weight_ptr, cols, n)
        dw = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(pid, tl.cdiv(rows, BLOCK_ROWS), parts, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_inside = row < rows
        rstd = tl.load(rstd_ptr + row, mask=row_inside, other=0.0)[:, None]
        dy_at, x_at = dy_ptr + (row * dy_stride)[:, None], x_ptr + (row * x_stride)[:, None]
        dstream_at, out_at = (row * dstream_stride)[:, None], (row * n)[:, None]
        if ONE_BLOCK:
            inside = row_inside[:, None] & (cols < n)[None, :]
            dy = tl.load(dy_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            xhat = tl.load(x_at + cols[None, :], mask=inside, other=0.0).to(tl.float32) * rstd
            if dx_ptr is not None:
                wdy = dy * w
                c = tl.sum(wdy * xhat, axis=1)[:, None] / n
                ds = rstd * (wdy - xhat * c)
                _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, cols, inside)
            dw += dy * xhat
        else:
            c_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            c_lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            if dx_ptr is not None:
                for begin in range(0, n, BLOCK_COLS):
                    at = begin + cols
                    inside = row_inside[:, None] & (at < n)[None, :]
                    dy = tl.load(dy_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                    xhat = tl.load(x_at + at[None, :], mask=inside, other=0.0).to(tl.float32) * rstd
                    wdy = dy * _weight_tile(weight_ptr, at, n)
                    c_sum, c_lost = add_compensated(c_sum, c_lost, wdy * xhat)
            c = tl.sum(c_sum, axis=1)[:, None] / n
            for begin in range(0, n, BLOCK_COLS):
                at = begin + cols
                inside = row_inside[:, None] & (at < n)[None, :]
                dy = tl.load(dy_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                xhat = tl.load(x_at + at[None, :], mask=inside, other=0.0).to(tl.float32) * rstd
                if dx_ptr is not None:
                    ds = rstd * (dy * _weight_tile(weight_ptr, at, n) - xhat * c)
                    _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, at, inside)
                if partials_ptr is not None:
                    # Memory that only this program uses; it holds nothing yet at the program's first rows.
                    before = tl.load(dw_ptr + at, mask=(at < n) & (tile != pid), other=0.0)
                    tl.store(dw_ptr + at, before + tl.sum(dy * xhat, axis=0), mask=at < n)
            tl.debug_barrier()  # the next rows' sums are read by other threads than wrote these
    if ONE_BLOCK and partials_ptr is not None:
        tl.store(dw_ptr + cols, tl.sum(dw, axis=0), mask=cols < n)


@triton.jit
def _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, cols, inside):
    """ds + dstream as dx, and as dresidual where that has a dtype of its own."""
    if dstream_ptr is not None:
        ds += tl.load(dstream_ptr + dstream_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + out_at + cols[None, :], ds.to(dx_ptr.dtype.element_ty), mask=inside)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + out_at + cols[None, :], ds.to(dresidual_ptr.dtype.element_ty), mask=inside)
