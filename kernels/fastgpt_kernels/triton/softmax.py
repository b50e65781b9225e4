"""Softmax with scale, mask, causality and dropout in Triton.

    s = scale * x + mask,  p = exp(s - max s) / sum exp(s - max s),  y = p * keep / (1 - dropout_p)
    ds = p * (g - sum(p * g)),  g = dy * keep / (1 - dropout_p),  dx = scale * ds,  dmask = sum of ds where shared

One kernel forward, in two forms: a row in one block, or a longer row in two passes, the first of which keeps a
running maximum and sum in every lane (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018).
Neither relies on what the hardware's maximum does with NaN: it comes back through exp(s - max) and the sum.
log2(e) is not folded into the scale: a finite minimum as a mask's value would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.masks import mask_dims, shared_dims, unsupported_mask
from fastgpt_kernels.rows import rows_of
from fastgpt_kernels.triton import philox
from fastgpt_kernels.triton.common import (
    DTYPE_NAMES,
    RowsConfig,
    Tunable,
    cdiv,
    column_sums,
    configured,
    next_power_of_2,
    processors,
    rows_rule,
    sixteen_warps,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch
from fastgpt_kernels.triton.softmax_bwd import _softmax_bwd_kernel, _softmax_dmask_kernel
from fastgpt_kernels.triton.softmax_fwd import _softmax_fwd_kernel


def supports(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> str | None:
    """None, or the reason why not."""
    reason = unsupported(x)
    if reason is None and x.shape[:-1].numel() >= 2**31:
        return "needs fewer than 2**31 rows"
    if reason is None and mask is not None:
        return unsupported_mask(x, mask)
    return reason


def heuristic(kernel: str, n: int, dtype: torch.dtype, arch: str, dropping: bool = False) -> RowsConfig:
    """kernel: "softmax_fwd", "softmax_bwd" or "softmax_dmask" (a tile of rows that share a row of the mask)."""
    one_block = 16384 if kernel == "softmax_bwd" else 32768
    # Beside Philox's registers 8 elements a thread are all that fit, of several rows 4.
    tile, warps = (1024, 8) if dropping else (2048, 4)
    rule = rows_rule(n, arch, one_block=one_block, tile=tile, warps=warps)
    if kernel == "softmax_dmask" and arch != "interpreter":
        cols = min(rule.BLOCK_COLS, 512)
        rule = RowsConfig(
            4 if arch.startswith("gfx") else 8, 1, BLOCK_ROWS=min(2048 // cols, 32), BLOCK_COLS=cols
        )
    elif dropping and arch != "interpreter" and rule.BLOCK_COLS > 4096:
        rule = replace(rule, num_warps=8 if arch.startswith("gfx") else 16, BLOCK_COLS=4096)
    return configured(arch, kernel, _key(n, dtype) + ("-dropout" if dropping else ""), rule)


def candidates(kernel: str, n: int) -> list[RowsConfig]:
    """What the tuner tries for rows of n columns."""
    rule = heuristic(kernel, n, torch.bfloat16, "")
    warps = {max(rule.num_warps // 2, 1), rule.num_warps, min(rule.num_warps * 2, 32)}
    rows = {max(rule.BLOCK_ROWS // 2, 1), rule.BLOCK_ROWS, rule.BLOCK_ROWS * 2}
    return [replace(rule, num_warps=w, BLOCK_ROWS=r) for w in sorted(warps) for r in sorted(rows)]


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), candidates(kernel, n), _problem(kernel, n, dtype))
        for kernel in ("softmax_fwd", "softmax_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x, dy = (torch.randn(max(2**25 // n, 1), n, dtype=dtype, device=device) for _ in range(2))
        p = torch.softmax(x, -1)
        if kernel == "softmax_fwd":
            return lambda: softmax_fwd(x, 1.0, None, False, 0.0, None)
        return lambda: softmax_bwd(dy, p, 1.0, None, False, 0.0, None, True, False)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}"


def softmax_fwd(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y, p): p, the probabilities before dropout, only with dropout."""
    shape, n = x.shape, x.shape[-1]
    y = memory.empty_like(x)
    p = memory.empty_like(x) if dropout_p > 0.0 else None
    if x.numel() == 0:
        return y, p
    rows = x.numel() // n
    config = heuristic("softmax_fwd", n, x.dtype, arch_of(x.device), dropout_p > 0.0)
    x, x_stride = rows_of(x, n)
    launch(
        _softmax_fwd_kernel, (cdiv(rows, config.BLOCK_ROWS),),
        x, y, p, rows, n, x_stride, shape[-2] if causal else 1, scale,
        **_mask_arguments(shape, mask), **_dropout_arguments(dropout_p, rng), CAUSAL=causal,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, ONE_BLOCK=n <= config.BLOCK_COLS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y, p


def softmax_bwd(
    dy: Tensor,
    p: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dmask); the mask is given only for its shape and dtype."""
    shape, n = p.shape, p.shape[-1]
    dx = memory.empty_like(p) if need_dx else None
    dmask = memory.empty_like(mask) if need_dmask and mask is not None else None
    if p.numel() == 0:
        return dx, None if dmask is None else dmask.zero_()
    rows, arch = p.numel() // n, arch_of(p.device)
    dy, dy_stride = rows_of(dy, n)
    p = p.contiguous()
    inner = None if dmask is None else memory.empty(rows, torch.float32, p.device)
    queries = shape[-2] if causal else 1
    config = heuristic("softmax_bwd", n, p.dtype, arch, dropout_p > 0.0)
    common = {**_dropout_arguments(dropout_p, rng), "CAUSAL": causal}
    # Philox takes as many registers as all the rest.
    spare = sixteen_warps(arch, config.num_warps) if dropout_p > 0.0 else {}
    launch(
        _softmax_bwd_kernel, (cdiv(rows, config.BLOCK_ROWS),),
        dy, p, dx, inner, rows, n, dy_stride, queries, scale, **common,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, ONE_BLOCK=n <= config.BLOCK_COLS,
        num_warps=config.num_warps, **spare,
    )  # fmt: skip
    if dmask is None or inner is None:
        return dx, None

    sizes, shared = shared_dims(shape, dmask.shape)
    members = math.prod(size for d, size in enumerate(sizes) if shared >> d & 1)
    mask_cols = dmask.shape[-1] if dmask.dim() else 1
    one_column = mask_cols == 1
    config = heuristic("softmax_dmask", n, p.dtype, arch)
    blocks = (rows // members) * (1 if one_column else cdiv(n, config.BLOCK_COLS))
    # Rows that share a row of the mask are split over programs as far as those of the mask leave processors idle.
    splits = min(cdiv(members, config.BLOCK_ROWS), cdiv(4 * processors(p.device), blocks))
    partials = memory.empty((1, splits, dmask.numel()), torch.float32, p.device) if splits > 1 else None
    launch(
        _softmax_dmask_kernel, (blocks * splits,),
        dy, p, inner, dmask, inner if partials is None else partials, members, splits, n, dy_stride, queries,
        *sizes[1:], **common, SHARED=shared, DIMS=_dims(sizes), ONE_COLUMN=one_column,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, num_warps=config.num_warps,
    )  # fmt: skip
    if partials is not None:
        column_sums(partials, dmask.view(-1))
    return dx, dmask


def _dims(sizes: Sequence[int]) -> int:
    """How many of the four dimensions of the rows are more than padding in front."""
    return next((len(sizes) - d for d, size in enumerate(sizes) if size > 1), 1)


def _mask_arguments(shape: torch.Size, mask: Tensor | None) -> dict[str, Any]:
    if mask is None:
        sizes, strides, column_stride = [1] * 4, [0] * 4, 0
    else:
        sizes, strides, column_stride = mask_dims(shape, mask)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    arguments: dict[str, Any] = {"mask_ptr": mask, "mask_col_stride": column_stride}
    arguments |= {f"size{d}": sizes[d] for d in (1, 2, 3)} | {f"stride{d}": strides[d] for d in range(4)}
    return arguments | {"DIMS": _dims(sizes), "ALIGNED": all(stride % 16 == 0 for stride in strides)}


def _dropout_arguments(dropout_p: float, rng: Tensor | None) -> dict[str, Any]:
    if dropout_p == 0.0:
        return {"rng_ptr": None, "threshold": 0, "keep_scale": 1.0}
    assert rng is not None
    keep_scale = 1.0 / (1.0 - dropout_p)
    return {"rng_ptr": rng.contiguous(), "threshold": philox.threshold(dropout_p), "keep_scale": keep_scale}
