"""What the Triton launchers share: what they take, how a launch is configured, sums over programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.triton.device import tuned
from fastgpt_kernels.triton.launch import INTERPRETING, launch, recorded_arch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as in the tables' keys


def unsupported(x: Tensor) -> str | None:
    """The reason why no Triton kernel takes x, or None."""
    if x.dtype not in DTYPE_NAMES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    if x.is_cuda or (INTERPRETING and x.is_cpu) or recorded_arch() is not None:
        return None
    return f"needs a GPU tensor (or TRITON_INTERPRET=1), got one on {x.device}"


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched; each family of kernels adds the sizes of its blocks, all of them integers."""

    num_warps: int = 4
    num_stages: int = 1


C = TypeVar("C", bound=LaunchConfig)
_forced: dict[str, LaunchConfig] = {}


@contextmanager
def forced(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Within the block `kernel` ("softmax_fwd") is launched with `config` (for the tuner; not thread-safe)."""
    previous = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if previous is None:
            del _forced[kernel]
        else:
            _forced[kernel] = previous


def being_proven(kernel: str) -> bool:
    """Whether a kernel that has to be chosen runs anyway: in the interpreter, recorded, or forced by the tuner."""
    return INTERPRETING or recorded_arch() is not None or kernel in _forced


def configured(arch: str, kernel: str, key: str, rule: C) -> C:
    """What a heuristic returns: the forced configuration, else the recorded one of `arch`, else its `rule`."""
    if _forced and kernel in _forced:
        config = _forced[kernel]
        assert isinstance(config, type(rule)), f"{kernel}: expected a {type(rule).__name__}, got {config}"
        return config
    return _recorded(arch, kernel, key, rule)


@functools.cache
def _recorded(arch: str, kernel: str, key: str, rule: Any) -> Any:
    found: Mapping[str, int] | None = tuned(arch, kernel, key)
    return rule if found is None else replace(rule, **found)


@dataclass(frozen=True)
class RowsConfig(LaunchConfig):
    """A block of rows of a matrix. Rows longer than BLOCK_COLS are walked in several passes."""

    BLOCK_ROWS: int = 1
    BLOCK_COLS: int = 1024


def rows_rule(n: int, arch: str, *, one_block: int, tile: int, warps: int) -> RowsConfig:
    """At least `tile` elements and `warps` warps a program; a row of up to `one_block` columns stays whole.

    16 elements a thread keep enough bytes in flight to hide the memory's latency. In the interpreter, where every
    step of a program costs the same time, blocks are large, but of few rows: numpy adds them one after another.
    """
    cols = next_power_of_2(n)
    if arch == "interpreter":
        cols = min(cols, 16384)
        return RowsConfig(BLOCK_ROWS=min(16384 // cols, 32), BLOCK_COLS=cols)
    if cols > one_block:
        cols = min(one_block, 8192)
    num_warps = min(max(cols // 512, warps), 32 if cols > 16384 else 16)
    if arch.startswith("gfx"):
        num_warps = max(num_warps // 2, 1)  # wavefronts have 64 threads
    return RowsConfig(num_warps, 1, BLOCK_ROWS=min(max(tile // cols, 1), 128), BLOCK_COLS=cols)


def around(rule: RowsConfig, stages: Sequence[int]) -> list[RowsConfig]:
    """What the tuner tries beside a rule: half and twice its warps and its rows."""
    warps = {max(rule.num_warps // 2, 1), rule.num_warps, min(rule.num_warps * 2, 32)}
    rows = {max(rule.BLOCK_ROWS // 2, 1), rule.BLOCK_ROWS, rule.BLOCK_ROWS * 2}
    return [
        replace(rule, num_warps=w, BLOCK_ROWS=r, num_stages=s)
        for w in sorted(warps)
        for r in sorted(rows)
        for s in stages
    ]


def sixteen_warps(arch: str, num_warps: int) -> dict[str, int]:
    """The option that lets NVIDIA's assembler use so many registers that 16 warps still run at once on a processor.

    By itself it spills a few of them so that one more program might run beside.
    """
    return {"maxnreg": 65536 // (32 * max(num_warps, 16))} if arch.startswith("sm_") else {}


class Tunable(NamedTuple):
    """One entry of a table: every op module lists its own, `python -m benchmarks tune` times and records them."""

    kernel: str  # "softmax_fwd"
    key: str  # "bf16-1024", as the kernel's heuristic looks it up
    candidates: Sequence[LaunchConfig]
    run: Callable[[torch.device], Callable[[], object]]  # allocates the inputs; the call launches the kernel

    def forced(self, config: LaunchConfig) -> AbstractContextManager[None]:
        return forced(self.kernel, config)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units); a fixed number where no GPU is."""
    if recorded_arch() is not None:
        return 128
    return 2 if INTERPRETING else _processors(device.index or 0)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


LONGEST_SUM = 32  # terms that a lane adds plainly; the rounding of a longer sum passes the error bound


def walkers(tiles: int, at_once: int) -> int:
    """How many programs walk `tiles` tiles of rows, each with a partial sum of its own in every lane.

    As many as run at once, or whole multiples of that, as long as no lane adds more than LONGEST_SUM terms.
    """
    return min(tiles, at_once * cdiv(tiles, at_once * LONGEST_SUM))


@triton.jit
def add_compensated(total, lost, value):
    """(total + value, what its rounding lost), after Kahan: the error does not grow with the number of terms."""
    value -= lost
    longer = total + value
    lost = tl.where(tl.abs(longer) < float("inf"), (longer - total) - value, 0.0)  # infinity stays infinity
    return longer, lost


@dataclass(frozen=True)
class ColumnSumsConfig(LaunchConfig):
    num_warps: int = 8
    BLOCK_PARTS: int = 64
    BLOCK_COLS: int = 32


def column_sums(partials: Tensor, first: Tensor | None, second: Tensor | None = None) -> None:
    """Sums partials [1 or 2, parts, n] (fp32) over the parts, in a fixed order, into `first` and `second` [n].

    Where `first` is None, `second` is the sum of partials[0].
    """
    _, parts, n = partials.shape
    config = ColumnSumsConfig(BLOCK_PARTS=2, BLOCK_COLS=16384) if INTERPRETING else ColumnSumsConfig()
    blocks = cdiv(n, config.BLOCK_COLS)
    outputs = [out for out in (first, second) if out is not None]
    launch(
        _column_sums_kernel, (blocks * len(outputs),), partials, outputs[0], outputs[-1], parts, n,
        BLOCK_PARTS=config.BLOCK_PARTS, BLOCK_COLS=config.BLOCK_COLS, num_warps=config.num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "n"])
def _column_sums_kernel(
    partials_ptr, first_ptr, second_ptr, parts, n, BLOCK_PARTS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    blocks = tl.cdiv(n, BLOCK_COLS)
    which = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < n
    acc = tl.zeros([BLOCK_PARTS, BLOCK_COLS], tl.float32)
    lost = tl.zeros([BLOCK_PARTS, BLOCK_COLS], tl.float32)
    for begin in range(0, parts, BLOCK_PARTS):
        part = begin + tl.arange(0, BLOCK_PARTS)
        at = (which.to(tl.int64) * parts + part)[:, None] * n + cols[None, :]
        value = tl.load(partials_ptr + at, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
        acc, lost = add_compensated(acc, lost, value)
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(first_ptr + cols, total.to(first_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(second_ptr + cols, total.to(second_ptr.dtype.element_ty), mask=inside)
