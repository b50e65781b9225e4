"""Memory that shows misuse: outputs that start as NaN, guard bytes around outputs and inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastgpt_kernels.memory import allocate_with
from torch import Tensor

MARGIN = 256  # guard bytes on either side; a multiple of the alignment that torch gives
_GUARD = 0xA5
_POISON = 0xFF  # NaN in every floating dtype

_deterministic: Any = torch.utils.deterministic  # a module whose attributes are settings

LAYOUTS = ("plain", "shifted", "spaced", "strided", "transposed")


class OutputGuards:
    """The buffers of all outputs allocated so far."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of NaN with guard bytes around it."""
        size = math.prod(shape) * dtype.itemsize
        buffer = torch.full((size + 2 * MARGIN,), _GUARD, dtype=torch.uint8, device=device)
        buffer[MARGIN : MARGIN + size] = _POISON
        self._buffers.append((buffer, size))
        return buffer[MARGIN : MARGIN + size].view(dtype).view(tuple(shape)).detach()

    def overwritten(self) -> bool:
        """Whether a guard byte has changed since the last call; forgets the buffers."""
        found = any(
            bool((buffer[:MARGIN] != _GUARD).any() or (buffer[MARGIN + size :] != _GUARD).any())
            for buffer, size in self._buffers
        )
        self._buffers.clear()
        return found


@contextmanager
def poisoned() -> Iterator[OutputGuards]:
    """Within the block outputs start as NaN: those of our kernels, with guard bytes, and any `torch.empty`."""
    guards = OutputGuards()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        with allocate_with(guards.allocate):
            yield guards
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


class Placed:
    """A copy of a tensor inside a larger buffer of NaN, in one of LAYOUTS.

    shifted: starts one element off any alignment. spaced: three elements of NaN between rows (and shifted).
    strided: every other element. transposed: the last two dimensions swapped in memory.
    """

    def __init__(self, value: Tensor, layout: str = "plain") -> None:
        margin = MARGIN // value.element_size()
        strides = _strides(value.shape, layout)
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
        offset = margin + (layout != "plain")
        fill = torch.nan if value.is_floating_point() else True if value.dtype == torch.bool else -1
        self.buffer = torch.full(
            (offset + max(span, 0) + margin,), fill, dtype=value.dtype, device=value.device
        )
        self.tensor = self.buffer.as_strided(value.shape, strides, offset).detach()
        self.write(value)

    def write(self, value: Tensor) -> None:
        """New values in the same place."""
        with torch.no_grad():
            self.tensor.copy_(value)
        self.values, self._before = value, self.buffer.clone()

    def misuse(self) -> str | None:
        """What was done to it, or None."""
        if same_bits(self.buffer, self._before):
            return None
        return "written outside of it" if same_bits(self.tensor, self.values) else "changed"


def place_expanded(value: Tensor) -> Tensor:
    """An expanded tensor with its zero strides kept, amid as much NaN as reading it as contiguous would reach."""
    core = value.as_strided(
        [1 if stride == 0 else size for size, stride in zip(value.shape, value.stride(), strict=True)],
        value.stride(),
        value.storage_offset(),
    ).contiguous()
    reach = value.numel() + 1
    buffer = torch.full((core.numel() + 2 * reach,), torch.nan, dtype=value.dtype, device=value.device)
    inner = buffer[reach : reach + core.numel()].view(core.shape)
    inner.copy_(core)
    return inner.expand(value.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A byte view needs one contiguous dimension.
    one, other = (
        t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b)
    )
    return torch.equal(one, other)


def _strides(shape: torch.Size, layout: str) -> list[int]:
    strides = [math.prod(max(size, 1) for size in shape[d + 1 :]) for d in range(len(shape))]
    if layout == "spaced" and len(shape) > 1:
        row, spaced = max(shape[-1], 1), max(shape[-1], 1) + 3
        return [*(stride // row * spaced for stride in strides[:-1]), 1]
    if layout == "strided" or (layout in ("spaced", "transposed") and len(shape) == 1):
        return [2 * stride for stride in strides]
    if layout == "transposed" and len(shape) > 1:  # a scalar has nothing to swap
        strides[-2:] = [1, max(shape[-2], 1)]
    return strides
