"""What `fastgpt check` does: the table of every kernel against its bound, and how to repeat each miss."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastgpt.ops  # noqa: F401  (registers the ops)
from fastgpt._core import registry
from fastgpt._core.spec import BACKENDS, OpSpec
from fastgpt.testing.check import check
from fastgpt.testing.inputs import DTYPES
from fastgpt.testing.report import HAZARDS, Report, repro, table


def run_check(
    op: str | None = None,
    backend: str | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    case: str | None = None,
    device: str = "cpu",
) -> int:
    """Print the table and every failure with a line that repeats it; 1 if anything failed, else 0.

    Args:
        op, backend, dtype, case: only these; None for all there are.
        implementation: "module:function", checked instead of fastgpt's own (needs op); the module may lie in the
            current directory.
        device: of the tensors.

    Raises:
        ValueError: a name that does not exist.
    """
    specs = registry.ops() if op is None else (registry.get(op),)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if case is not None:
        specs = tuple(spec for spec in specs if any(known.name == case for known in spec.cases))
        if not specs:
            raise ValueError(f"case: no case {case!r}" + (f" of {op}" if op else ""))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are small: threads cost more than they give
    try:
        reports = list(_run(specs, backend, dtype, implementation, case, device))
    finally:
        torch.set_num_threads(threads)
    print("\n".join(table(reports)))
    failed = False
    for report in reports:
        if report.skipped:
            print(f"{report.op} by {report.implementation}: {len(report.skipped)} cases not taken,"
                  f" e.g. {' '.join(report.skipped[0])}")  # fmt: skip
        if not report.rows and not report.failures:
            failed = True
            print(f"{report.op} by {report.implementation}: nothing was checked")
        failed |= bool(report.failures)
        for failure in (failure for failures in report.telling.values() for failure in failures):
            print(f"FAILED {failure.case} {failure.dtype}: {failure.hazard} ({HAZARDS[failure.hazard]})")
            print(f"       {failure.detail}")
            if failure.meaning:
                print(f"       {failure.meaning}")
            print(f"       {repro(report, failure, implementation, device)}")
        for said in (*(f"{hazard}: {found}" for hazard in report.telling if (found := report.pattern(hazard))),
                     *([report.following] if report.following else [])):  # fmt: skip
            print(f"{report.op} by {report.implementation}: {said}")
    return int(failed)


def _run(
    specs: tuple[OpSpec, ...],
    backend: str | None,
    dtype: str | None,
    implementation: str | None,
    case: str | None,
    device: str,
) -> Iterator[Report]:
    dtypes = None if dtype is None else [dtype]
    cases = None if case is None else [case]
    kind = device.partition(":")[0]
    if implementation is not None:
        if len(specs) != 1:
            raise ValueError("implementation: expected an op to check it as (--op)")
        if backend is not None:
            raise ValueError("backend: expected none beside an implementation of your own")
        yield check(specs[0].name, load(implementation), dtypes=dtypes, cases=cases, device=device)
        return
    for spec in specs:
        for name in BACKENDS if backend is None else (backend,):
            missing = registry.module(spec.name, name)
            if not isinstance(missing, str) and registry.runs_on(name, kind):
                yield check(spec.name, backend=name, dtypes=dtypes, cases=cases, device=device)
            elif backend is not None:
                why = missing if isinstance(missing, str) else f"does not run on {kind} tensors"
                raise ValueError(f"backend: {name} cannot run {spec.name}: {why}")


def load(path: str) -> Callable[..., Any]:
    """The function named "module:function"; ValueError saying what is wrong with the name."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"implementation: expected module:function, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            raise ValueError(f"implementation: no module {module_name!r} here or on the path") from None
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"implementation: {module_name} cannot be imported: {said}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"implementation: {module_name} has no function {function_name!r}")
    return function
