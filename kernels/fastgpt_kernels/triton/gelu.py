"""GELU of x + bias in Triton; z = x + bias.

"none":  y = z * Phi(z),  Phi(z) = (1 + erf(z / sqrt(2))) / 2
"tanh":  y = z * (1 + tanh(w)) / 2 = z * sigmoid(2 w),  w = sqrt(2 / pi) * (z + 0.044715 * z**3)

With a bias, or strided, x is a matrix walked in tiles, so that no element's column costs a division. Without, it is
one long row. dbias is summed as in layer_norm: a partial sum per program, then all of them in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    cdiv,
    column_sums,
    configured,
    next_power_of_2,
    processors,
    unsupported,
    walkers,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
_INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_CUBIC = tl.constexpr(0.044715)


def supports(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def heuristic(kernel: str, n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """The tile of a matrix of n columns; BLOCK_COLS elements of a flat x, for which n = 0."""
    if arch == "interpreter":
        cols = min(next_power_of_2(n), 8192) if n else 32768
        rule = RowsConfig(BLOCK_ROWS=min(32768 // cols, 32) if n else 1, BLOCK_COLS=cols)
    else:
        cols = min(next_power_of_2(n), 1024) if n else 2048
        rule = RowsConfig(2 if arch.startswith("gfx") else 4, 1, BLOCK_ROWS=2048 // cols, BLOCK_COLS=cols)
    return configured(arch, kernel, _key(n, dtype), rule)


def candidates() -> list[RowsConfig]:
    """What the tuner tries, for any width."""
    tiles = ((1, 1024), (2, 1024), (4, 1024), (1, 2048), (2, 2048), (8, 512))
    return [RowsConfig(warps, 1, *tile) for tile in tiles for warps in (4, 8)]


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), choices, _problem(kernel, n, dtype))
        for kernel in ("gelu_fwd", "gelu_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n, choices in (
            (0, [RowsConfig(warps, 1, 1, size) for warps in (4, 8) for size in (1024, 2048, 4096)]),
            *((n, candidates()) for n in (1024, 3072, 4096, 6400, 16384)),
        )
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x, dy = (torch.randn(2**25 // (n or 4096), n or 4096, dtype=dtype, device=device) for _ in range(2))
        bias = torch.randn(n, dtype=dtype, device=device) if n else None
        if kernel == "gelu_fwd":
            return lambda: gelu_fwd(x, bias, "tanh")
        return lambda: gelu_bwd(dy, x, bias, "tanh", True, bias is not None)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n) if n else 'flat'}"


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    y = memory.empty_like(x)
    flat = bias is None and x.is_contiguous()
    n = 0 if flat else x.shape[-1]
    config = heuristic("gelu_fwd", n, x.dtype, arch_of(x.device))
    if flat:
        launch(
            _gelu_fwd_flat_kernel, (cdiv(x.numel(), config.BLOCK_COLS),), x, y, x.numel(),
            TANH=approximate == "tanh", BLOCK=config.BLOCK_COLS, num_warps=config.num_warps,
        )  # fmt: skip
    elif n:
        rows = x.numel() // n
        x, x_stride = rows_of(x, n)
        grid = (cdiv(rows, config.BLOCK_ROWS) * cdiv(n, config.BLOCK_COLS),)
        launch(
            _gelu_fwd_kernel, grid, x, None if bias is None else bias.contiguous(), y, rows, n, x_stride,
            TANH=approximate == "tanh", BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
            num_warps=config.num_warps,
        )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias)."""
    need_dbias = need_dbias and bias is not None
    dx = memory.empty_like(x) if need_dx else None
    dbias = memory.empty_like(bias) if need_dbias and bias is not None else None
    flat = bias is None and x.is_contiguous() and dy.is_contiguous()
    n = 0 if flat else x.shape[-1]
    config = heuristic("gelu_bwd", n, x.dtype, arch_of(x.device))
    if flat and dx is not None:
        launch(
            _gelu_bwd_flat_kernel, (cdiv(x.numel(), config.BLOCK_COLS),), dy, x, dx, x.numel(),
            TANH=approximate == "tanh", BLOCK=config.BLOCK_COLS, num_warps=config.num_warps,
        )  # fmt: skip
    elif n:
        rows, blocks = x.numel() // n, cdiv(n, config.BLOCK_COLS)
        dy, dy_stride = rows_of(dy, n)
        x, x_stride = rows_of(x, n)
        parts, partials = cdiv(rows, config.BLOCK_ROWS), None
        if dbias is not None:  # few programs, so that there is little to add up
            parts = walkers(parts, cdiv(processors(x.device) * max(32 // config.num_warps, 1), blocks))
            partials = memory.empty((1, parts, n), torch.float32, x.device)
        launch(
            _gelu_bwd_kernel, (parts * blocks,),
            dy, x, None if bias is None else bias.contiguous(), dx, partials, rows, parts, n, dy_stride, x_stride,
            TANH=approximate == "tanh", BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
            num_warps=config.num_warps,
        )  # fmt: skip
        if partials is not None:
            column_sums(partials, dbias)
    return dx, dbias


@triton.jit(do_not_specialize=["numel"])
def _gelu_fwd_flat_kernel(x_ptr, y_ptr, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= numel:  # without a mask: accesses are 16 bytes wide whatever numel is
        y = _gelu(tl.load(x_ptr + at).to(tl.float32), TANH)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))
    else:
        y = _gelu(tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32), TANH)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit(do_not_specialize=["rows"])
def _gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, rows, n, x_stride,
    TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (cols < n)[None, :]
    z = tl.load(x_ptr + (row * x_stride)[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    y = _gelu(z, TANH).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (row * n)[:, None] + cols[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["numel"])
def _gelu_bwd_flat_kernel(dy_ptr, x_ptr, dx_ptr, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= numel:
        dx = tl.load(dy_ptr + at).to(tl.float32) * _slope(tl.load(x_ptr + at).to(tl.float32), TANH)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty))
    else:
        inside = at < numel
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * _slope(z, TANH)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def _gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partials_ptr, rows, parts, n, dy_stride, x_stride,
    TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    part = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    cols_inside = cols < n
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols_inside, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for begin in range(part * BLOCK_ROWS, rows, parts * BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & cols_inside[None, :]
        dy = tl.load(dy_ptr + (row * dy_stride)[:, None] + cols[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        z = tl.load(x_ptr + (row * x_stride)[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += bias
        dz = dy * _slope(z, TANH)
        if dx_ptr is not None:
            tl.store(dx_ptr + (row * n)[:, None] + cols[None, :], dz.to(dx_ptr.dtype.element_ty), mask=inside)
        if partials_ptr is not None:
            dbias += tl.where(inside, dz, 0.0)  # where a bias is infinite, rows outside would add NaN
    if partials_ptr is not None:
        tl.store(partials_ptr + part.to(tl.int64) * n + cols, tl.sum(dbias, axis=0), mask=cols_inside)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        y = z * _sigmoid_of_2w(z)[0]
    else:
        y = z * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)))
    return y


@triton.jit
def _slope(z, TANH: tl.constexpr):
    """d gelu / dz."""
    if TANH:
        gate, bell = _sigmoid_of_2w(z)
        slope = gate + z * bell * (2.0 * _SQRT_2_OVER_PI) * (1.0 + 3.0 * _CUBIC * z * z)
    else:
        bell = tl.exp(-0.5 * z * z) * _INV_SQRT_2PI
        slope = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * bell
    return slope


@triton.jit
def _sigmoid_of_2w(z):
    """g = sigmoid(2 w) = (1 + tanh(w)) / 2 and g * (1 - g): without tanh's cancellation, and without overflow."""
    w = _SQRT_2_OVER_PI * (z + _CUBIC * z * z * z)
    e = tl.exp(-2.0 * tl.abs(w))
    s = 1.0 / (1.0 + e)
    return tl.where(w < 0.0, e * s, s), e * s * s
