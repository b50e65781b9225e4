"""Cross-entropy of logits with integer targets in Triton.

    lse = log sum_j exp(x_j),  loss = (1 - s) (lse - x_t) + s / V sum_j (lse - x_j)
    dx_j = g (exp(x_j - lse) - s / V - (1 - s) [j = t]),  g = dloss, / count for the mean

Forward a program walks a row, or a few short ones, once, with a running maximum and sum in every lane (Milakov,
Gimelshein, "Online normalizer calculation for softmax", 2018); a second kernel of one program adds up the rows in
a fixed order. Backward is elementwise, in tiles. Rows whose target is ignored are not read, and a target that is no
class reads nothing: it gives NaN.
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
    add_compensated,
    cdiv,
    configured,
    next_power_of_2,
    rows_rule,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch

_SUM_BLOCK = 2048  # losses that the one program of the sum adds at a time


def supports(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> str | None:
    """None, or the reason why not."""
    reason = unsupported(logits)
    if reason is None and logits.shape[:-1].numel() >= 2**31:
        return "needs fewer than 2**31 rows"
    return reason


def heuristic(kernel: str, n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """kernel: "cross_entropy_fwd" (rows are walked) or "cross_entropy_bwd" (one tile a program)."""
    if kernel == "cross_entropy_fwd":
        rule = rows_rule(n, arch, one_block=4096, tile=2048, warps=8)
    else:  # 16 elements a thread, with 64-bit addresses each where rows are of odd lengths, would spill
        rule = rows_rule(n, arch, one_block=2048, tile=2048, warps=8)
    return configured(arch, kernel, _key(n, dtype), rule)


def candidates(kernel: str) -> list[RowsConfig]:
    """What the tuner tries, for any width."""
    tiles = ((1, 1024), (2, 1024), (1, 2048), (1, 4096), (1, 8192))
    return [RowsConfig(warps, 1, *tile) for tile in tiles for warps in (4, 8, 16)]


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), candidates(kernel), _problem(kernel, n, dtype))
        for kernel in ("cross_entropy_fwd", "cross_entropy_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n in (768, 32768, 65536, 131072)
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x = torch.randn(max(2**26 // n, 1), n, dtype=dtype, device=device)
        targets = torch.randint(0, n, x.shape[:1], device=device)
        dloss, lse = torch.ones((), device=device), torch.full(x.shape[:1], 12.0, device=device)
        if kernel == "cross_entropy_fwd":
            return lambda: cross_entropy_fwd(x, targets, -100, 0.0, "mean")
        return lambda: cross_entropy_bwd(dloss, x, targets, lse, None, -100, 0.0, "sum")

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}"


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, lse, count): lse of the targets' shape; count, of the targets that count, for the mean."""
    n, rows, device = logits.shape[-1], targets.numel(), logits.device
    config = heuristic("cross_entropy_fwd", n, logits.dtype, arch_of(device))
    logits, stride = rows_of(logits, n)
    targets = targets.contiguous()
    lse = memory.empty(targets.shape, torch.float32, device)
    losses = memory.empty_like(lse)
    launch(
        _cross_entropy_fwd_kernel, (cdiv(rows, config.BLOCK_ROWS),),
        logits, targets, losses, lse, rows, n, stride, ignore_index, label_smoothing, label_smoothing / max(n, 1),
        SMOOTH=label_smoothing > 0.0, BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
        num_warps=config.num_warps,
    )  # fmt: skip
    if reduction == "none":
        return losses, lse, None
    loss = memory.empty((), torch.float32, device)
    count = memory.empty_like(loss) if reduction == "mean" else None
    launch(
        _cross_entropy_sum_kernel, (1,), losses, targets, loss, count, rows, ignore_index,
        BLOCK=_SUM_BLOCK, num_warps=8,
    )  # fmt: skip
    return loss, lse, count


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """dlogits."""
    n, rows = logits.shape[-1], targets.numel()
    config = heuristic("cross_entropy_bwd", n, logits.dtype, arch_of(logits.device))
    dlogits = memory.empty_like(logits)
    logits, stride = rows_of(logits, n)
    launch(
        _cross_entropy_bwd_kernel, (cdiv(rows, config.BLOCK_ROWS) * cdiv(n, config.BLOCK_COLS),),
        dloss.contiguous(), logits, targets.contiguous(), lse.contiguous(), count if reduction == "mean" else None,
        dlogits, rows, n, stride, ignore_index, label_smoothing, label_smoothing / max(n, 1),
        PER_ROW=reduction == "none", BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dlogits


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr, target_ptr, loss_ptr, lse_ptr, rows, n, x_stride, ignore_index, smoothing, spread,
    SMOOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    row_inside = row < rows
    target = tl.load(target_ptr + row, mask=row_inside, other=0)
    counts = row_inside & (target != ignore_index)
    x_ptr += row.to(tl.int64) * x_stride
    lane_max = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    lane_total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for begin in range(0, tl.max(tl.where(counts, n, 0), axis=0), BLOCK_COLS):
        at = begin + cols
        seen = counts[:, None] & (at < n)[None, :]
        x = tl.load(x_ptr[:, None] + at[None, :], mask=seen, other=float("-inf")).to(tl.float32)
        # One exponential, of -|x - max|, rescales the sum or is added to it. NaN goes to the sum: the maximum
        # never is one, whatever the hardware's would do.
        rise = tl.where(x == float("-inf"), x, x - lane_max)
        e = tl.exp(-tl.abs(rise))
        lane_sum = tl.where(rise > 0, lane_sum * e + 1.0, lane_sum + e)
        lane_max = tl.where(rise > 0, x, lane_max)
        if SMOOTH:
            lane_total += tl.where(seen, x, 0.0)
    top = tl.max(lane_max, axis=1)
    # A row of nothing but -inf: exp(-inf + inf) makes it NaN, as in log_softmax.
    lse = top + tl.log(tl.sum(lane_sum * tl.exp(lane_max - top[:, None]), axis=1))
    is_class = (target >= 0) & (target < n)
    x_target = tl.load(x_ptr + target, mask=counts & is_class, other=0.0).to(tl.float32)
    loss = lse - x_target
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + (smoothing * lse - spread * tl.sum(lane_total, axis=1))
    loss = tl.where(is_class, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0), mask=row_inside)
    tl.store(lse_ptr + row, tl.where(counts, lse, 0.0), mask=row_inside)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_sum_kernel(
    losses_ptr, target_ptr, loss_ptr, count_ptr, rows, ignore_index, BLOCK: tl.constexpr
):
    """The sum of the losses; with count_ptr their mean, and how many targets count."""
    acc = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < rows
        acc, lost = add_compensated(acc, lost, tl.load(losses_ptr + row, mask=inside, other=0.0))
        if count_ptr is not None:
            target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
            counted += (target != ignore_index).to(tl.int32)
    loss = tl.sum(acc, axis=0)
    if count_ptr is not None:
        count = tl.sum(counted, axis=0).to(tl.float32)
        tl.store(count_ptr, count)
        loss = loss / count
    tl.store(loss_ptr, loss)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr, x_ptr, target_ptr, lse_ptr, count_ptr, dx_ptr, rows, n, x_stride, ignore_index, smoothing, spread,
    PER_ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_COLS)
    row = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_inside = row < rows
    target = tl.load(target_ptr + row, mask=row_inside, other=0)
    counts = row_inside & (target != ignore_index)
    if PER_ROW:
        g = tl.load(dloss_ptr + row, mask=counts, other=0.0)
    else:
        g = tl.zeros([BLOCK_ROWS], tl.float32) + tl.load(dloss_ptr)
    if count_ptr is not None:
        g /= tl.load(count_ptr)
    g = tl.where((target >= 0) & (target < n), g, float("nan"))
    lse = tl.load(lse_ptr + row, mask=counts, other=0.0)
    row_at, inside = row.to(tl.int64), row_inside[:, None] & (cols < n)[None, :]
    seen = counts[:, None] & (cols < n)[None, :]
    x = tl.load(x_ptr + (row_at * x_stride)[:, None] + cols[None, :], mask=seen, other=0.0).to(tl.float32)
    wanted = tl.where(cols[None, :] == target[:, None], spread + (1.0 - smoothing), spread)
    dx = tl.where(seen, g[:, None] * (tl.exp(x - lse[:, None]) - wanted), 0.0)
    tl.store(dx_ptr + (row_at * n)[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
