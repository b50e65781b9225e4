"""What a launch is chosen for: the architecture, and the tuned configurations recorded for it.

A table is a readable JSON file in `tables/`, one per architecture ("sm_90.json"), written by
`python -m benchmarks tune`; where it has no entry, or for an unknown device, the kernel's own rule decides.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt_kernels.triton.launch import INTERPRETING, recorded_arch

TABLES = Path(__file__).parent / "tables"


def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" in Triton's interpreter."""
    recorded = recorded_arch()
    if recorded is not None:
        return recorded
    return "interpreter" if INTERPRETING else _arch(device.index or 0)


@functools.cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def table(arch: str) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """kernel -> key -> configuration: `{"attention_fwd": {"bf16-128-causal": {"BLOCK_M": 128, ...}}}`."""
    path = TABLES / f"{arch}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found["configurations"]


def tuned(arch: str, kernel: str, key: str) -> Mapping[str, int] | None:
    """The recorded configuration of `kernel` ("attention_fwd") for `key`, or None."""
    return table(arch).get(kernel, {}).get(key)
