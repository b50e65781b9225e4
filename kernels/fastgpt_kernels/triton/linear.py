"""A linear layer in Triton: a product whose epilogue adds the bias and applies the activation.

y = act(x @ weight.T + bias); h = x @ weight.T is stored beside it where backward will need it

Backward's products are PyTorch's library's, which has no epilogue to save there; gelu' and dbias are `gelu`'s own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory, products
from fastgpt_kernels.rows import rows_of
from fastgpt_kernels.triton import gelu
from fastgpt_kernels.triton.common import (
    DTYPE_NAMES,
    LaunchConfig,
    Tunable,
    being_proven,
    cdiv,
    configured,
    next_power_of_2,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.gelu import _gelu
from fastgpt_kernels.triton.launch import launch

OWN = products.Kernels(gelu.gelu_fwd, gelu.gelu_bwd, products.column_sums)
_TANH = {"gelu": False, "gelu_tanh": True}

# Where this product, its epilogue included, was measured ahead of cuBLAS and a GELU after it: nowhere yet, so that
# it runs where it is proven and tuned, and the library's elsewhere.
FASTER: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProductConfig(LaunchConfig):
    """A tile of y, and how much of k is taken at once; GROUP rows of tiles share what they read of the weight."""

    num_warps: int = 8
    num_stages: int = 3
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    GROUP: int = 8


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """None, or the reason why not."""
    return unsupported(x)


def heuristic(n: int, k: int, dtype: torch.dtype, arch: str) -> ProductConfig:
    """The tile for a weight [n, k]."""
    if arch == "interpreter":
        rule = ProductConfig(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    elif dtype == torch.float32:
        rule = ProductConfig(8, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32)
    elif arch.startswith("gfx"):
        rule = ProductConfig(4, 2, BLOCK_K=32)
    else:
        rule = ProductConfig()  # with 4 warps the GELU of a tile spills on sm_90
    return configured(arch, "linear_fwd", _key(n, k, dtype), rule)


def _key(n: int, k: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}x{next_power_of_2(k)}"


def candidates(dtype: torch.dtype) -> list[ProductConfig]:
    """What the tuner tries."""
    wide = 32 if dtype == torch.float32 else 64
    return [
        ProductConfig(warps, stages, m, n, wide)
        for m, n in ((128, 128), (128, 256), (64, 128), (128, 64))
        for warps in (4, 8)
        for stages in (3, 4)
    ]


def tunables() -> Sequence[Tunable]:
    return [
        Tunable("linear_fwd", _key(n, k, dtype), candidates(dtype), _problem(n, k, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for n, k in ((3072, 768), (768, 3072), (6400, 1600), (4096, 4096))
    ]


def _problem(n: int, k: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x, weight = (torch.randn(rows, k, dtype=dtype, device=device) for rows in (8192, n))
        bias = torch.randn(n, dtype=dtype, device=device)
        return lambda: linear_fwd(x, weight, bias, "gelu_tanh", True)

    return make


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    arch = arch_of(x.device)
    if not (arch in FASTER or being_proven("linear_fwd")):
        return products.linear_fwd(OWN, x, weight, bias, activation, keep)
    n, k = weight.shape
    y = memory.empty((*x.shape[:-1], n), x.dtype, x.device)
    h = memory.empty_like(y) if keep and activation is not None else None
    rows = y.numel() // n if n else 0
    x, x_stride = rows_of(x, k)
    config = heuristic(n, k, x.dtype, arch)
    launch(
        _linear_fwd_kernel, (cdiv(rows, config.BLOCK_M) * cdiv(n, config.BLOCK_N),),
        x, weight, None if bias is None else bias.contiguous(), y, h, rows, n, k, x_stride, *weight.stride(),
        ACTIVE=activation is not None, TANH=_TANH.get(activation or "gelu", False), BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, GROUP=config.GROUP,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, h


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    return products.linear_bwd(OWN, dy, x, weight, bias, h, activation, need_dx, need_dweight, need_dbias)


@triton.jit(do_not_specialize=["rows"])
def _linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, rows, n, k, x_stride, weight_stride, weight_step,
    ACTIVE: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    tall = tl.minimum(tiles_m - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    row = (first + within % tall).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (within // tall).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_inside, cols_inside = row < rows, col < n
    step = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (row * x_stride)[:, None] + step[None, :]
    weight_at = weight_ptr + (col * weight_stride)[None, :] + (step.to(tl.int64) * weight_step)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, k, BLOCK_K):
        left = k - begin
        x_tile = tl.load(x_at, mask=rows_inside[:, None] & (step < left)[None, :], other=0.0)
        weight_tile = tl.load(weight_at, mask=cols_inside[None, :] & (step < left)[:, None], other=0.0)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K * weight_step
    inside = rows_inside[:, None] & cols_inside[None, :]
    at = (row * n)[:, None] + col[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + at, acc.to(h_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=cols_inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVE:
        acc = _gelu(acc, TANH)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
