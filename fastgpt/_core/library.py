"""torch.library registration made from the SPEC, and the switch between it and a direct call.

Every entry of every backend is an op of its own (`fastgpt::layer_norm_fwd_cpu`), so that the backend can be read
off a trace. In plain eager mode (`guard.py` knows when) the registered op is bypassed: the dispatcher costs more than
a small kernel. A call that `plan.py` remembers was found to be plain on the way, and goes to `_DIRECT` at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from fastgpt._core.guard import plain_eager
from fastgpt._core.spec import OpSpec

_LIBRARY = torch.library.Library("fastgpt", "DEF")
_DIRECT: dict[str, Callable[..., Any]] = {}
_REGISTERED: dict[str, Callable[..., Any]] = {}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # by device type


def define(spec: OpSpec, backend: str, module: ModuleType, devices: Sequence[str]) -> None:
    """Register every entry of `spec` as implemented by `module` for `devices`, or for all where none is named."""
    for suffix, entry in spec.entries.items():
        name = f"{spec.name}_{suffix}_{backend}"
        function = getattr(module, f"{spec.name}_{suffix}")
        _LIBRARY.define(name + entry.schema)
        keys = [_DISPATCH_KEYS[device] for device in devices] or ["CompositeExplicitAutograd"]
        for key in keys:
            _LIBRARY.impl(name, _without_none(function), key)
        torch.library.register_fake(f"fastgpt::{name}", _without_none(entry.fake), lib=_LIBRARY)
        _DIRECT[name] = function
        _REGISTERED[name] = getattr(torch.ops.fastgpt, name).default


def call(entry: str, backend: str, *args: Any) -> Any:
    """Run `entry` ("layer_norm_fwd") of `backend`."""
    name = f"{entry}_{backend}"
    run = _DIRECT[name] if plain_eager(args) else _REGISTERED[name]
    if not is_compiling() and _is_any_autocast_enabled():
        # Its rules were applied before, and backward runs in the dtypes of forward: a product in a kernel is its own.
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args)
    return run(*args)


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with None in a tuple of results replaced: a schema knows no absent results, only empty ones."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        results = function(*args)
        if not isinstance(results, tuple):
            return results
        return tuple(args[0].new_empty(0) if result is None else result for result in results)

    return run
