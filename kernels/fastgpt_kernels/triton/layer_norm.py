"""LayerNorm in Triton.

    s = x + residual
    y = (s - mean(s)) * rstd * weight + bias,  rstd = 1 / sqrt(var(s) + eps)
    dx = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dstream,  wdy = weight * dy,  xhat = (s - mean) * rstd
    dweight = sum(dy * xhat),  dbias = sum(dy)

Forward a program takes a block of rows. Backward few programs walk all rows, each with its own partial sums of
dweight and dbias, which a second kernel adds up in a fixed order: x and dy are read once, and results repeat.
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


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def heuristic_fwd(n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    rule = rows_rule(n, arch, one_block=32768, tile=2048, warps=4)
    return configured(arch, "layer_norm_fwd", _key(n, dtype), rule)


def heuristic_bwd(n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """dtype: the wider one of x and dy.

    Five fp32 values an element (x, dy, weight, two sums) fill the registers sooner than forward does: rows of 8192
    columns in one block, or 16 fp32 elements a thread, spill on some architectures.
    """
    wide = dtype == torch.float32
    rule = rows_rule(n, arch, one_block=4096, tile=2048 if wide else 4096, warps=8)
    if wide and rule.BLOCK_COLS == 4096:
        rule = replace(rule, num_warps=2 * rule.num_warps)
    if n > rule.BLOCK_COLS and arch != "interpreter":
        # Four rows at a time, so that the partial sums, which then lie in memory, are touched once for the four.
        rule = replace(rule, BLOCK_ROWS=4, BLOCK_COLS=512, num_warps=4 if arch.startswith("gfx") else 8)
    return configured(arch, "layer_norm_bwd", _key(n, dtype), rule)


def candidates(kernel: str, n: int, dtype: torch.dtype) -> list[RowsConfig]:
    """What the tuner tries for rows of n columns."""
    heuristic = heuristic_fwd if kernel == "layer_norm_fwd" else heuristic_bwd
    return around(heuristic(n, dtype, ""), (1,) if kernel == "layer_norm_fwd" else (1, 2))


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), candidates(kernel, n, dtype), _problem(kernel, n, dtype))
        for kernel in ("layer_norm_fwd", "layer_norm_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n in (256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x, dy = (torch.randn(max(2**25 // n, 1), n, dtype=dtype, device=device) for _ in range(2))
        w, b = torch.randn(2, n, dtype=dtype, device=device)
        mean, rstd = torch.ones(2, x.shape[0], device=device)
        if kernel == "layer_norm_fwd":
            return lambda: layer_norm_fwd(x, w, b, None, 1e-5)
        return lambda: layer_norm_bwd(dy, None, x, w, b, mean, rstd, True, True, True)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}"


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, stream, mean, rstd)."""
    n = x.shape[-1]
    rows = x.numel() // n if n else x.shape[:-1].numel()
    arch = arch_of(x.device)
    config = heuristic_fwd(n, x.dtype, arch)
    y = memory.empty_like(x)
    mean = memory.empty(rows, torch.float32, x.device)
    rstd = memory.empty_like(mean)
    x, x_stride = rows_of(x, n)
    stream, residual_stride = None, 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, n)
        stream = memory.empty_like(residual)
    spare = config.BLOCK_COLS > 8192 or (x.dtype == torch.float32 and n > config.BLOCK_COLS)
    launch(
        _layer_norm_fwd_kernel, (cdiv(rows, config.BLOCK_ROWS),),
        x, residual, _adjacent(weight), _adjacent(bias), y, stream, mean, rstd,
        rows, n, x_stride, residual_stride, eps,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, ONE_BLOCK=n <= config.BLOCK_COLS,
        num_warps=config.num_warps,
        **(sixteen_warps(arch, config.num_warps) if spare else {}),
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
    """(dx, dresidual, dweight, dbias); x is the stream where there was a residual."""
    n, rows = x.shape[-1], mean.numel()
    arch = arch_of(dy.device)
    dtype = torch.promote_types(x.dtype, dy.dtype)
    config = heuristic_bwd(n, dtype, arch)
    dx = memory.empty_like(dy) if need_dx else None
    dresidual = memory.empty_like(x) if need_dx and x.dtype != dy.dtype else None
    dw = memory.empty_like(weight) if need_dw and weight is not None else None
    db = memory.empty_like(bias) if need_db and bias is not None else None
    dy, dy_stride = rows_of(dy, n)
    x, x_stride = rows_of(x, n)
    dstream_stride = 0
    if dstream is not None:
        dstream, dstream_stride = rows_of(dstream, n)
    sums = (dw is not None) + (db is not None)
    # As many programs as run at once with 16 warps on each processor: more would only add partial sums.
    at_once = processors(dy.device) * max(16 // config.num_warps, 1)
    parts = walkers(cdiv(rows, config.BLOCK_ROWS), at_once)
    partials = memory.empty((sums, parts, n), torch.float32, dy.device) if sums else None
    launch(
        _layer_norm_bwd_kernel, (parts,),
        dy, dstream if need_dx else None, x, _adjacent(weight), mean, rstd, dx, dresidual, partials,
        rows, n, dy_stride, dstream_stride, x_stride,
        NEED_DW=dw is not None, NEED_DB=db is not None, BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
        ONE_BLOCK=n <= config.BLOCK_COLS, STAGES=config.num_stages, num_warps=config.num_warps,
        **(sixteen_warps(arch, config.num_warps) if dtype == torch.float32 or n > config.BLOCK_COLS else {}),
    )  # fmt: skip
    if partials is not None:
        column_sums(partials, dw, db)
    return dx, dresidual, dw, db


def _adjacent(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, stream_ptr, mean_ptr, rstd_ptr,
    rows, n, x_stride, residual_stride, eps,
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
        cols_inside = cols < n
        inside = row_inside[:, None] & cols_inside[None, :]
        s = _stream_tile(x_ptr, residual_ptr, stream_ptr, cols, inside)
        mean = tl.sum(s, axis=1) / n
        centred = tl.where(inside, s - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / n + eps)
        _store_tile(s, mean, rstd, weight_ptr, bias_ptr, y_ptr, stream_ptr, cols, cols_inside, inside)
    else:
        # Welford's running mean and sum of squares in every lane, merged once at the end (Chan et al.).
        count = tl.zeros([BLOCK_COLS], tl.float32)
        lane_mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        lane_m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for begin in range(0, n, BLOCK_COLS):
            cols_inside = begin + cols < n
            inside = row_inside[:, None] & cols_inside[None, :]
            s = _stream_tile(x_ptr, residual_ptr, stream_ptr, begin + cols, inside)
            count += cols_inside.to(tl.float32)
            delta = tl.where(cols_inside[None, :], s - lane_mean, 0.0)
            lane_mean += delta / (begin // BLOCK_COLS + 1)
            lane_m2 += delta * (s - lane_mean)
        mean = tl.sum(lane_mean * count[None, :], axis=1) / n
        centred = lane_mean - mean[:, None]
        m2 = tl.sum(lane_m2 + count[None, :] * centred * centred, axis=1)
        rstd = 1.0 / tl.sqrt_rn(m2 / n + eps)
        for begin in range(0, n, BLOCK_COLS):
            cols_inside = begin + cols < n
            inside = row_inside[:, None] & cols_inside[None, :]
            s = _stream_tile(x_ptr, residual_ptr, stream_ptr, begin + cols, inside)
            _store_tile(
                s, mean, rstd, weight_ptr, bias_ptr, y_ptr, stream_ptr, begin + cols, cols_inside, inside
            )
    tl.store(mean_ptr + row, mean, mask=row_inside)
    tl.store(rstd_ptr + row, rstd, mask=row_inside)


@triton.jit
def _stream_tile(x_ptr, residual_ptr, stream_ptr, cols, inside):
    """s = x + residual, rounded to the stream's dtype, in fp32  # [rows, cols]"""
    s = tl.load(x_ptr + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        s = s.to(stream_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _store_tile(s, mean, rstd, weight_ptr, bias_ptr, y_ptr, stream_ptr, cols, cols_inside, inside):
    """The stream, and y = (s - mean) * rstd * weight + bias."""
    if stream_ptr is not None:
        tl.store(stream_ptr + cols[None, :], s.to(stream_ptr.dtype.element_ty), mask=inside)
    y = (s - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=cols_inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_kernel(
    dy_ptr, dstream_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    rows, n, dy_stride, dstream_stride, x_stride,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid, parts = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_COLS)
    cols_inside = cols < n
    if NEED_DW or NEED_DB:  # [dw or db, program, n]; db is the second where both are wanted
        dw_ptr = partials_ptr + pid.to(tl.int64) * n
        db_ptr = dw_ptr + (parts.to(tl.int64) * n if NEED_DW else 0)
    if ONE_BLOCK:
        w = _weight_tile(weight_ptr, cols, cols_inside)
        dw = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        db = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in tl.range(pid, tl.cdiv(rows, BLOCK_ROWS), parts, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_inside = row < rows
        mean = tl.load(mean_ptr + row, mask=row_inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row_inside, other=0.0)[:, None]
        dy_at, x_at = (row * dy_stride)[:, None], (row * x_stride)[:, None]
        dstream_at, out_at = (row * dstream_stride)[:, None], (row * n)[:, None]
        if ONE_BLOCK:
            inside = row_inside[:, None] & cols_inside[None, :]
            dy = tl.load(dy_ptr + dy_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + x_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            xhat = (x - mean) * rstd
            if dx_ptr is not None:
                wdy = dy * w
                c1 = tl.sum(wdy, axis=1)[:, None] / n
                c2 = tl.sum(wdy * xhat, axis=1)[:, None] / n
                ds = rstd * (wdy - c1 - xhat * c2)
                _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, cols, inside)
            dw += dy * xhat
            db += dy
        else:
            c1 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            c2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            c1_lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            c2_lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            if dx_ptr is not None:
                for begin in range(0, n, BLOCK_COLS):
                    at = begin + cols
                    inside = row_inside[:, None] & (at < n)[None, :]
                    dy = tl.load(dy_ptr + dy_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                    x = tl.load(x_ptr + x_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                    wdy = dy * _weight_tile(weight_ptr, at, at < n)
                    c1, c1_lost = add_compensated(c1, c1_lost, wdy)
                    c2, c2_lost = add_compensated(c2, c2_lost, wdy * (x - mean) * rstd)
            c1_mean = tl.sum(c1, axis=1)[:, None] / n
            c2_mean = tl.sum(c2, axis=1)[:, None] / n
            for begin in range(0, n, BLOCK_COLS):
                at = begin + cols
                inside = row_inside[:, None] & (at < n)[None, :]
                dy = tl.load(dy_ptr + dy_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + x_at + at[None, :], mask=inside, other=0.0).to(tl.float32)
                xhat = (x - mean) * rstd
                if dx_ptr is not None:
                    wdy = dy * _weight_tile(weight_ptr, at, at < n)
                    ds = rstd * (wdy - c1_mean - xhat * c2_mean)
                    _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, at, inside)
                if NEED_DW:
                    _add_to(dw_ptr + at, tl.sum(dy * xhat, axis=0), at < n, tile != pid)
                if NEED_DB:
                    _add_to(db_ptr + at, tl.sum(dy, axis=0), at < n, tile != pid)
            tl.debug_barrier()  # the next rows' sums are read by other threads than wrote these
    if ONE_BLOCK:
        if NEED_DW:
            tl.store(dw_ptr + cols, tl.sum(dw, axis=0), mask=cols_inside)
        if NEED_DB:
            tl.store(db_ptr + cols, tl.sum(db, axis=0), mask=cols_inside)


@triton.jit
def _weight_tile(weight_ptr, cols, cols_inside):
    if weight_ptr is None:
        w = 1.0
    else:
        w = tl.load(weight_ptr + cols, mask=cols_inside, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def _store_ds(ds, dstream_ptr, dx_ptr, dresidual_ptr, dstream_at, out_at, cols, inside):
    """ds + dstream as dx, and as dresidual where that has a dtype of its own."""
    if dstream_ptr is not None:
        ds += tl.load(dstream_ptr + dstream_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + out_at + cols[None, :], ds.to(dx_ptr.dtype.element_ty), mask=inside)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + out_at + cols[None, :], ds.to(dresidual_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_to(at, value, inside, again):
    """Adds to memory that only this program uses; which holds nothing yet if not `again`."""
    tl.store(at, value + tl.load(at, mask=inside & again, other=0.0), mask=inside)
