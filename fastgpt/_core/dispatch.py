"""Which backend runs a call: chosen, explained, or refused with the reason."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastgpt._core import registry
from fastgpt._core.spec import ANY_DEVICE, BACKENDS, OpSpec

# One backend, or several to be tried in that order and no other.
Backend = str | Sequence[str] | None

STRICT = {"": False, "0": False, "1": True}.get(os.environ.get("FASTGPT_STRICT", ""))
_ENVIRONMENT: tuple[str, ...] = tuple(
    name.strip() for name in os.environ.get("FASTGPT_BACKEND", "").split(",") if name.strip()
)
_warned: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """No backend that may be used for this call can run it."""


class _Override(threading.local):
    names: tuple[str, ...] = ()


_override = _Override()


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Within the block and this thread, run every op on `names`: the first that supports a call, else an error.

    A `backend=` argument beats it; it beats FASTGPT_BACKEND.

    Raises:
        ValueError: a name that is no backend.
    """
    check_backend(names)
    previous, _override.names = _override.names, names
    try:
        yield
    finally:
        _override.names = previous


def check_environment() -> None:
    """ValueError if FASTGPT_BACKEND or FASTGPT_STRICT holds what it cannot hold."""
    _asked(None)
    if STRICT is None:
        raise ValueError(f"FASTGPT_STRICT: expected 0 or 1, got {os.environ['FASTGPT_STRICT']!r}")


def choose(spec: OpSpec, args: tuple[Any, ...], backend: Backend = None) -> str:
    """The backend for a call of `spec` with prepared arguments.

    An explicit choice runs or raises; the automatic one takes the first that supports the call.

    Raises:
        ValueError: an unknown backend. BackendError: the backend asked for, or every backend, refuses.
    """
    asked = _asked(backend)
    if not asked:
        first = spec.rule(*args) if spec.rule is not None else None
        if first is not None and refusal(spec, first, args) is None:
            return first
        for name, supports in registry.usable(spec.name, args[0]):
            if supports(*args) is None:
                if name == "reference":
                    _note_reference(spec, args)
                return name
    else:
        reasons = []
        for name in asked:
            reason = refusal(spec, name, args)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise BackendError(f"{spec.name}: the backend asked for cannot run this call ({'; '.join(reasons)})")
    raise BackendError(f"{spec.name}: no backend supports this call\n{explanation(spec, args)}")


def order(spec: OpSpec, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends for this call, best first."""
    names = spec.orders.get(args[0].device.type, ANY_DEVICE)
    first = spec.rule(*args) if spec.rule is not None else None
    if first is None:
        return names
    return (first, *(name for name in names if name != first))


def refusal(spec: OpSpec, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot run this call, or None if it can."""
    module = registry.module(spec.name, backend)
    if isinstance(module, str):
        return module
    if not registry.runs_on(backend, args[0].device.type):
        return f"does not run on {args[0].device.type} tensors"
    return module.supports(*args)


def explanation(spec: OpSpec, args: tuple[Any, ...], backend: Backend = None) -> str:
    """A line per backend: chosen, able but not first, or why not."""
    asked = _asked(backend)
    tried = asked or order(spec, args)
    forbidden = STRICT and not asked  # a strict automatic choice never takes the reference
    able = (name for name in tried if not (forbidden and name == "reference"))
    chosen = next((name for name in able if refusal(spec, name, args) is None), None)
    lines = [f"{spec.name} on {args[0].device}" + (f", asked for: {', '.join(asked)}" if asked else "")]
    for name in (*tried, *(name for name in BACKENDS if name not in tried)):
        reason = refusal(spec, name, args)
        if name == chosen:
            verdict = "chosen"
        elif reason is not None:
            verdict = f"no: {reason}"
        elif forbidden and name == "reference":
            verdict = "no: FASTGPT_STRICT=1 forbids it"
        else:
            verdict = "could, but comes later" if name in tried else "could, but was not asked for"
        lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


def explain(op: str, *args: Any, backend: Backend = None, **kwargs: Any) -> None:
    """Print which backend a call of `op` with these arguments takes, and why not the others.

    >>> fastgpt.explain("layer_norm", torch.zeros(4, 64))
    """
    spec = registry.get(op)
    print(explanation(spec, spec.prepare(*args, **kwargs), backend))


def backends() -> dict[str, dict[str, str | None]]:
    """For every op and backend: None if it can be used here, else the reason why not."""
    table: dict[str, dict[str, str | None]] = {}
    for spec in registry.ops():
        modules = {name: registry.module(spec.name, name) for name in BACKENDS}
        table[spec.name] = {
            name: found if isinstance(found, str) else None for name, found in modules.items()
        }
    return table


def check_backend(backend: Backend, source: str = "backend") -> tuple[str, ...]:
    """The names in `backend`, none for None; ValueError, naming the `source`, unless each is a backend."""
    if backend is None:
        return ()
    names = (backend,) if isinstance(backend, str) else backend
    if not isinstance(names, (tuple, list)) or not names:
        raise ValueError(f"{source}: expected one or several of {', '.join(BACKENDS)}, got {backend!r}")
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return tuple(names)


def asked_around() -> bool:
    """Whether the context or the environment asks for a backend."""
    return bool(_override.names or _ENVIRONMENT)


def _asked(backend: Backend) -> tuple[str, ...]:
    if backend is not None:
        return check_backend(backend)
    if _override.names:
        return _override.names
    return check_backend(_ENVIRONMENT, "FASTGPT_BACKEND") if _ENVIRONMENT else ()


def _note_reference(spec: OpSpec, args: tuple[Any, ...]) -> None:
    """The slow path is never taken silently: an error under FASTGPT_STRICT=1, else a warning per op and reason."""
    if torch.compiler.is_compiling() and not STRICT:
        return
    check_environment()
    names = [name for name in order(spec, args) if name != "reference"]
    why = "; ".join(f"{name}: {refusal(spec, name, args)}" for name in names)
    message = f"{spec.name} runs on the slow reference path ({why})"
    if STRICT:
        raise BackendError(f"{message}; FASTGPT_STRICT=1 forbids it")
    if (spec.name, why) not in _warned:
        _warned.add((spec.name, why))
        warnings.warn(message, RuntimeWarning, stacklevel=5)
