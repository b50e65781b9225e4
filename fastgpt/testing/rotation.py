"""Sets of inputs that rotate, so that a call finds its inputs where a large model's call would: not in a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.testing.inputs import as_tuple
from fastgpt.testing.timing import Step

ROTATE_AT_MOST = 256 * 2**20  # bytes
TINY = 16 * 2**10  # bytes: up to here what takes time is the host's work, not memory


class Caches(NamedTuple):
    """Bytes. inner: the largest cache of one core (GPU: none); last: the last level."""

    inner: int
    last: int


def caches(device: torch.device) -> Caches:
    if device.type == "cuda":
        return Caches(0, torch.cuda.get_device_properties(device).L2_cache_size)
    levels: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            size = int((index / "size").read_text().strip().removesuffix("K")) * 1024
            levels[int((index / "level").read_text())] = size
    if not levels:
        return Caches(2 * 2**20, 64 * 2**20)  # not Linux: a large desktop's
    return Caches(levels.get(2, levels[min(levels)]), levels[max(levels)])


def how_many(input_bytes: int, cache: Caches) -> tuple[int, str]:
    """How many sets of inputs of that size to take in turn, and where a call then finds them.

    "cold": twice the last-level cache lies between two uses of a set; "beyond L2": more than twice the inner cache
    does, but some of it may still be in a last-level cache larger than we care to fill; else "warm". Tiny inputs
    stay where they are: a hundred thousand tensors in turn would measure the cost of finding them.
    """
    if input_bytes <= TINY:
        return 1, "warm"
    wanted = math.ceil(2 * cache.last / max(input_bytes, 1))
    affordable = max(ROTATE_AT_MOST // max(input_bytes, 1), 1)
    sets = min(max(wanted, 1), affordable)
    rotated = sets * input_bytes
    if rotated >= 2 * cache.last:
        return sets, "cold"
    return sets, "beyond L2" if rotated >= 2 * cache.inner > 0 else "warm"


def tensor_bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def copies(inputs: Mapping[str, Any], sets: int, gradients: Iterable[str]) -> list[dict[str, Any]]:
    """`sets` sets of the same values in memory of their own; floating `gradients` are leaves that require grad."""
    wanted = set(gradients)
    result = []
    for _ in range(sets):
        copy = {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        for key, value in copy.items():
            if key in wanted and isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
        result.append(copy)
    return result


def passes_of(
    function: Callable[..., Any],
    inputs: Sequence[Mapping[str, Any]],
    leaves: Sequence[str],
    output_grads: Sequence[Tensor],
) -> dict[str, Step]:
    """Forward, and forward with backward, as steps over the sets of `inputs`."""

    def forward(i: int) -> object:
        return function(**inputs[i])

    def both(i: int) -> object:
        outputs = as_tuple(function(**inputs[i]))
        return torch.autograd.grad(outputs, wanted[i], dys[i])

    wanted = [[one[name] for name in leaves] for one in inputs]
    dys = [[dy.clone() for dy in output_grads] for _ in inputs]
    return {"fwd": forward, "fwd+bwd": both} if leaves else {"fwd": forward}
