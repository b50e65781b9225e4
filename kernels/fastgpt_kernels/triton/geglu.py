"""Gated linear units in Triton: y = act(gate) * up, act being GELU (erf or tanh) or SiLU.

dgate = dy * up * act'(gate),  dup = dy * act(gate)

One kernel each way for every layout: a matrix in tiles whose rows are apart by a stride of each input's own. Where no
input has gaps, the matrix is all elements in rows of a fixed length, the last of them shorter.
"""

from __future__ import annotations

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
    configured,
    next_power_of_2,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.gelu import _gelu, _slope
from fastgpt_kernels.triton.launch import launch

FLAT = 1024  # the length of a row where rows mean nothing


def supports(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(gate)


def heuristic(kernel: str, n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """The tile of a matrix of n columns."""
    if arch == "interpreter":
        cols = min(next_power_of_2(n), 8192)
        rule = RowsConfig(BLOCK_ROWS=min(32768 // cols, 32), BLOCK_COLS=cols)
    else:
        cols = min(next_power_of_2(n), 1024)
        rule = RowsConfig(2 if arch.startswith("gfx") else 4, 1, BLOCK_ROWS=2048 // cols, BLOCK_COLS=cols)
    return configured(arch, kernel, _key(n, dtype), rule)


def tunables() -> Sequence[Tunable]:
    tiles = ((1, 1024), (2, 1024), (4, 1024), (8, 512), (16, 256))
    choices = [RowsConfig(warps, 1, *tile) for tile in tiles for warps in (4, 8)]
    return [
        Tunable(kernel, _key(FLAT, dtype), choices, _problem(kernel, dtype))
        for kernel in ("geglu_fwd", "geglu_bwd")
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _problem(kernel: str, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        dy, gate, up = (torch.randn(8192, 4096, dtype=dtype, device=device) for _ in range(3))
        if kernel == "geglu_fwd":
            return lambda: geglu_fwd(gate, up, "silu")
        return lambda: geglu_bwd(dy, gate, up, "silu", True, True)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    """Rows longer than a tile are all tiled alike."""
    return f"{DTYPE_NAMES[dtype]}-{min(next_power_of_2(n), FLAT)}"


def geglu_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    y = memory.empty_like(gate)
    (gate, up), strides, n = _as_rows(gate, up)
    if not y.numel():
        return y
    config = heuristic("geglu_fwd", n, y.dtype, arch_of(y.device))
    launch(
        _geglu_fwd_kernel, _grid(y.numel(), n, config), gate, up, y, y.numel() // n, y.numel() % n, n, *strides,
        ACTIVATION=activation, BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y


def geglu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup)."""
    dgate = memory.empty_like(gate) if need_dgate else None
    dup = memory.empty_like(up) if need_dup else None
    numel = gate.numel()
    (dy, gate, up), strides, n = _as_rows(dy, gate, up)
    if not numel or (dgate is None and dup is None):
        return dgate, dup
    config = heuristic("geglu_bwd", n, gate.dtype, arch_of(gate.device))
    launch(
        _geglu_bwd_kernel, _grid(numel, n, config), dy, gate, up, dgate, dup, numel // n, numel % n, n, *strides,
        ACTIVATION=activation, BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dgate, dup


def _as_rows(*inputs: Tensor) -> tuple[list[Tensor], list[int], int]:
    """The inputs as rows, their strides, and the length of a row."""
    n = inputs[0].shape[-1]
    tensors, strides = map(list, zip(*(rows_of(x, n) for x in inputs), strict=True))
    if all(stride == n for stride in strides):
        n, strides = FLAT, [FLAT] * len(inputs)
    return tensors, strides, n


def _grid(numel: int, n: int, config: RowsConfig) -> tuple[int]:
    return (cdiv(cdiv(numel, n), config.BLOCK_ROWS) * cdiv(n, config.BLOCK_COLS),)


@triton.jit(do_not_specialize=["rows", "rest"])
def _geglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, rows, rest, n, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, cols, inside, whole = _tile(rows, rest, n, BLOCK_ROWS, BLOCK_COLS)
    gate_at = gate_ptr + (row * gate_stride)[:, None] + cols[None, :]
    up_at = up_ptr + (row * up_stride)[:, None] + cols[None, :]
    y_at = y_ptr + (row * n)[:, None] + cols[None, :]
    if whole:  # without a mask: accesses are 16 bytes wide wherever rows allow it
        y = _activate(tl.load(gate_at).to(tl.float32), ACTIVATION)[0] * tl.load(up_at).to(tl.float32)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty))
    else:
        z = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
        y = _activate(z, ACTIVATION)[0] * up
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rest"])
def _geglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, rest, n, dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, cols, inside, whole = _tile(rows, rest, n, BLOCK_ROWS, BLOCK_COLS)
    dy_at = dy_ptr + (row * dy_stride)[:, None] + cols[None, :]
    gate_at = gate_ptr + (row * gate_stride)[:, None] + cols[None, :]
    up_at = up_ptr + (row * up_stride)[:, None] + cols[None, :]
    out = (row * n)[:, None] + cols[None, :]
    if whole:
        value, slope = _activate(tl.load(gate_at).to(tl.float32), ACTIVATION)
        dy = tl.load(dy_at).to(tl.float32)
        if dgate_ptr is not None:
            dgate = dy * tl.load(up_at).to(tl.float32) * slope
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty))
        if dup_ptr is not None:
            tl.store(dup_ptr + out, (dy * value).to(dup_ptr.dtype.element_ty))
    else:
        value, slope = _activate(tl.load(gate_at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        dy = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
        if dgate_ptr is not None:
            dgate = dy * tl.load(up_at, mask=inside, other=0.0).to(tl.float32) * slope
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        if dup_ptr is not None:
            tl.store(dup_ptr + out, (dy * value).to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(rows, rest, n, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """This program's rows and columns, which of its elements exist, and whether all do.

    There are `rows` rows of n elements, and then one of `rest`, fewer than n.
    """
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS
    first_col = (tl.program_id(0) % blocks) * BLOCK_COLS
    row, cols = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
    lengths = tl.where(row < rows, n, tl.where(row == rows, rest, 0))
    whole = (first_row + BLOCK_ROWS <= rows) & (first_col + BLOCK_COLS <= n)
    return row, cols, cols[None, :] < lengths[:, None], whole


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z) and its derivative."""
    if ACTIVATION == "silu":
        # sigma = 1 / (1 + exp(-z)) and sigma * (1 - sigma), without overflow.
        e = tl.exp(-tl.abs(z))
        s = 1.0 / (1.0 + e)
        sigma = tl.where(z < 0.0, e * s, s)
        value, slope = z * sigma, sigma + z * (e * s * s)
    else:
        value, slope = _gelu(z, ACTIVATION == "gelu_tanh"), _slope(z, ACTIVATION == "gelu_tanh")
    return value, slope
