"""Triton kernels that must not be shipped, each for one reason: `test_offline.py` expects that they are found out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul(x_ptr, y_ptr, z_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Nothing is wrong with it but, for some M, N, K, warps and stages, what it takes of the machine."""
    rows, cols, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in tl.range(0, steps):
        a = tl.load(x_ptr + step * M * K + rows * K + inner[None, :])
        b = tl.load(y_ptr + step * K * N + inner[:, None] * N + cols)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(z_ptr + rows * N + cols, acc)


@triton.jit
def upcast_matmul(x_ptr, y_ptr, z_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """bf16 in, and a product of fp32: the matrix unit is idle."""
    rows, cols, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in tl.range(0, steps):
        a = tl.load(x_ptr + step * M * K + rows * K + inner[None, :])
        b = tl.load(y_ptr + step * K * N + inner[:, None] * N + cols)
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    tl.store(z_ptr + rows * N + cols, acc)


@triton.jit
def tf32_matmul(x_ptr, y_ptr, z_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """fp32 in, and Triton's default precision, which drops 13 bits of every factor."""
    rows, cols, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in tl.range(0, steps):
        a = tl.load(x_ptr + step * M * K + rows * K + inner[None, :])
        b = tl.load(y_ptr + step * K * N + inner[:, None] * N + cols)
        acc = tl.dot(a, b, acc)
    tl.store(z_ptr + rows * N + cols, acc)


@triton.jit
def hoards_registers(x_ptr, y_ptr, steps, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Keeps a tile in registers over a loop that needs a second one."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    kept = tl.load(x_ptr + at)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in tl.range(0, steps):
        total += tl.exp(tl.load(x_ptr + step * ROWS * COLS + at)) * kept
    tl.store(y_ptr + at, total + kept)


@triton.jit
def does_not_compile(x_ptr, N: tl.constexpr):
    """The shapes do not match."""
    tl.store(x_ptr + tl.arange(0, N), tl.arange(0, 2 * N) + tl.arange(0, N))


@triton.jit
def specialises(x_ptr, y_ptr, rows, n):
    """The number of rows is 1, or divisible by 16, or neither: three kernels."""
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, n, 128):
        at = begin + tl.arange(0, 128)
        value = tl.load(x_ptr + row * n + at, mask=at < n, other=0.0)
        tl.store(y_ptr + row * n + at, value / rows, mask=at < n)


@triton.jit(do_not_specialize=["rows"])
def does_not_specialise(x_ptr, y_ptr, rows, n):
    """As `specialises`, and right."""
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, n, 128):
        at = begin + tl.arange(0, 128)
        value = tl.load(x_ptr + row * n + at, mask=at < n, other=0.0)
        tl.store(y_ptr + row * n + at, value / rows, mask=at < n)
