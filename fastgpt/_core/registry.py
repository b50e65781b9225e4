"""All ops by name, and for each op and backend its module or the reason why there is none."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastgpt._core.spec import ANY_DEVICE, BACKENDS, OpSpec

_SPECS: dict[str, OpSpec] = {}
_MODULES: dict[tuple[str, str], ModuleType | str] = {}
_USABLE: dict[tuple[str, str], tuple[tuple[str, Callable[..., str | None]], ...]] = {}

# The GPU backends also run without one, slowly, on CPU tensors: to be proven, and only where they are asked for.
EMULATED = {
    "triton": os.environ.get("TRITON_INTERPRET") == "1",  # Triton's own interpreter
    "cuda": os.environ.get("FASTGPT_CUDA_EMULATION") == "1",  # the CUDA sources compiled for the host
}
_DEVICES = {"cpu": ("cpu",)} | {
    name: ("cuda", "cpu") if emulated else ("cuda",) for name, emulated in EMULATED.items()
}
_noted: set[str] = set()


def register(spec: OpSpec) -> OpSpec:
    """Make an op known, with every backend that has a module for it. A duplicate name raises."""
    if spec.name in _SPECS:
        raise ValueError(f"op {spec.name!r} is registered already")
    from fastgpt._core import library

    for backend in BACKENDS:
        if spec.kernels:
            _MODULES[spec.name, backend] = _MODULES[spec.kernels, backend]
            continue
        module = _MODULES[spec.name, backend] = _load(spec.name, backend)
        if isinstance(module, ModuleType):
            library.define(spec, backend, module, _DEVICES.get(backend, ()))
    _SPECS[spec.name] = spec
    for device, names in (*spec.orders.items(), ("", ANY_DEVICE)):
        found = ((name, _MODULES[spec.name, name]) for name in names if runs_on(name, device))
        _USABLE[spec.name, device] = tuple(
            (name, module.supports) for name, module in found if isinstance(module, ModuleType)
        )
    return spec


def ops() -> tuple[OpSpec, ...]:
    """All registered ops, in the order of their registration."""
    return tuple(_SPECS.values())


def get(name: str) -> OpSpec:
    """The op called `name`; ValueError naming those that exist."""
    try:
        return _SPECS[name]
    except KeyError:
        raise ValueError(f"op: expected one of {', '.join(_SPECS)}, got {name!r}") from None


def usable(op: str, x: Tensor) -> tuple[tuple[str, Callable[..., str | None]], ...]:
    """(backend, its `supports`) for every backend that can be used for `op` on x's device, best first."""
    found = _USABLE.get((op, "cpu" if x.is_cpu else x.device.type))  # making the string costs 0.3 µs
    return _USABLE[op, ""] if found is None else found


def runs_on(backend: str, device: str) -> bool:
    """Whether `backend` has anything to do with tensors on `device`."""
    return device in _DEVICES.get(backend, (device,))


def module(op: str, backend: str) -> ModuleType | str:
    """The module that implements `op` on `backend`, or the reason why there is none."""
    return _MODULES[op, backend]


def is_written(op: str, backend: str) -> bool:
    """Whether the sources have a module for `op` on `backend`, usable on this machine or not."""
    return backend == "reference" or _exists(f"fastgpt_kernels.{backend}.{_SPECS[op].stem}")


def _load(op: str, backend: str) -> ModuleType | str:
    if backend == "reference":
        return importlib.import_module(f"fastgpt.reference.{op}")
    name = f"fastgpt_kernels.{backend}.{op}"
    if not _exists(name):
        return f"no {backend} kernel for {op} yet"
    if backend in EMULATED and not (torch.cuda.is_available() or EMULATED[backend]):
        return "no GPU here"
    try:
        return importlib.import_module(name)
    except ImportError as error:  # a compiled module that is missing or stale says so
        _note_unavailable(backend, str(error))
        return str(error)


def _note_unavailable(backend: str, reason: str) -> None:
    """A backend that should be here and is not is never passed over silently: one warning each."""
    if backend not in _noted:
        _noted.add(backend)
        warnings.warn(
            f"fastgpt: the {backend} kernels cannot be used: {reason}", RuntimeWarning, stacklevel=2
        )


def _exists(name: str) -> bool:
    package = name.rpartition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(name) is not None
