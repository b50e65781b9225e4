"""The one place where Triton kernels are launched: on a GPU, in the interpreter, or into a record.

Launchers call `launch` and nothing else. Within `recording(arch)` no kernel runs: what would have been launched is
written down, so that exactly the shipped configurations can be compiled offline, on any machine, and so that a test
can prove that a new batch or sequence length asks for no new compilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt_kernels.triton import interpreter

INTERPRETING: bool = triton.knobs.runtime.interpret
if INTERPRETING:
    interpreter.fix_bfloat16()
    interpreter.hasten()


class Launch(NamedTuple):
    """One recorded launch. arguments: by parameter name, tensors and None included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class _Record(NamedTuple):
    arch: str
    launches: list[Launch]


_record: _Record | None = None


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    **named: Any,
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument; nothing if the grid is empty."""
    if 0 in grid:
        return
    if _record is not None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | named
        if missing := set(names) - set(arguments):
            raise TypeError(f"{kernel.fn.__name__}: missing {', '.join(sorted(missing))}")
        _record.launches.append(Launch(kernel, tuple(grid), arguments, num_warps, num_stages))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[tuple(grid)](*args, num_warps=num_warps, num_stages=num_stages, **named)
    else:
        kernel[tuple(grid)](*args, num_warps=num_warps, num_stages=num_stages, **named)


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Within the block launches are recorded as for a device of `arch` ("sm_90", "gfx942"); not thread-safe.

    Tensors may be on the meta device: neither memory nor a GPU is needed.
    """
    global _record
    previous, _record = _record, _Record(arch, [])
    try:
        yield _record.launches
    finally:
        _record = previous


def recorded_arch() -> str | None:
    """The arch of the recording under way, or None."""
    return None if _record is None else _record.arch
