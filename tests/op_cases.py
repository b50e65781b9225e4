"""What the generated tests run over: the registry's ops and cases, the backends and SIMD levels of this machine.

FASTGPT_TEST_DEVICE=cuda runs them on tensors of a GPU, over the backends that run there (`make gpu`).
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import fastgpt_kernels
import torch

import fastgpt.ops  # noqa: F401  (registers the ops)
from fastgpt import testing
from fastgpt._core import library, registry
from fastgpt._core.spec import BACKENDS, Case, OpSpec
from fastgpt.testing import inputs
from fastgpt.testing.inputs import DTYPE_NAMES, Problem, dtypes_of

DEVICE = os.environ.get("FASTGPT_TEST_DEVICE", "cpu")
check = functools.partial(testing.check, device=DEVICE)
problem = functools.partial(inputs.problem, device=DEVICE)

OPS = [spec.name for spec in registry.ops()]


class Variant(NamedTuple):
    """A backend, and the SIMD level for those that have one."""

    backend: str
    level: str | None = None

    @property
    def name(self) -> str:
        """ "cpu" is the best level that this machine has, "cpu_avx2" another."""
        return self.backend if self.level is None else f"{self.backend}_{self.level}"

    @property
    def emulated(self) -> bool:
        """Whether a GPU's kernels run on this CPU, a thousand times slower."""
        return registry.EMULATED.get(self.backend, False)

    def left_out(self, dtype: torch.dtype, case: Case) -> bool:
        """Whether `make test` leaves a case to `make test-all`.

        The two 16-bit dtypes of an emulated kernel share their source: every second case is proven in the one, every
        other in the other.
        """
        halves = [half for half in dtypes_of(case) if half.itemsize == 2]
        chosen = zlib.crc32(case.name.encode()) % 2
        return self.emulated and len(halves) == 2 and dtype == halves[chosen]

    @property
    def thorough(self) -> bool:
        """Whether every case meets every hazard here: kernels of our own, not emulated, at their best level.

        The lower levels are the same sources compiled once more: there, and where PyTorch does the work, the hazards
        take turns, but for `make test-all`.
        """
        return self.level is None and not self.emulated and self.backend not in ("torch", "reference")

    def enter(self) -> None:
        if self.level is not None:
            fastgpt_kernels.load_cpu().set_isa(self.level)


def variants(op: str) -> list[Variant]:
    """Everything on this machine that runs `op` on the tensors under test."""
    found = []
    for backend in backends(op):
        found.append(Variant(backend))
        if backend == "cpu":
            found += [Variant("cpu", level) for level in fastgpt_kernels.load_cpu().isas()[:-1]]
    return found


def backends(op: str) -> list[str]:
    """The backends that have a module for `op` and run on the tensors under test."""
    modules = {name: registry.module(op, name) for name in BACKENDS}
    return [
        name for name in BACKENDS if isinstance(modules[name], ModuleType) and registry.runs_on(name, DEVICE)
    ]


def matrix() -> Iterator[tuple[str, OpSpec, Variant, torch.dtype, Case]]:
    """(test id, ...) for everything; the variants of a case come one after the other, to share its problem."""
    for spec in registry.ops():
        for case in spec.cases:
            for dtype in dtypes_of(case):
                for variant in variants(spec.name):
                    name = f"{spec.name}-{variant.name}-{DTYPE_NAMES[dtype]}-{case.name}"
                    yield name, spec, variant, dtype, case


def forms(op: str) -> list[Case]:
    """The smallest non-empty case for every set of options that an op declares."""
    found: dict[tuple[Any, ...], Case] = {}
    for case in registry.get(op).cases:
        key = tuple(
            (name, value if isinstance(value, (bool, str)) else None) for name, value in case.options.items()
        )
        size = math.prod(case.shape)
        if size > 1 and (key not in found or size < math.prod(found[key].shape)):
            found[key] = case
    return list(found.values())


def forms_on(op: str, backend: str) -> list[Case]:
    """The forms that proofs of a backend's road go through: on an emulated one, which is slow, every third.

    (Its numbers are proven on every case, by `matrix`.)
    """
    return forms(op)[:: 3 if registry.EMULATED.get(backend, False) else 1]


def form_ids() -> list[tuple[str, Case]]:
    return [(op, case) for op in OPS for case in forms(op)]


def one_dtype(case: Case) -> bool:
    """Whether all floating inputs of the case have one dtype, so that it exists in fp64."""
    return not case.mixed and case.options.get("mask") != "fp32"


def form_problem(op: str, case: Case, dtype: torch.dtype | None = None) -> Problem:
    """The problem of a form, by default in the first dtype that it has."""
    return problem(registry.get(op), case, dtypes_of(case)[0] if dtype is None else dtype)


def supported(spec: OpSpec, backend: str, inputs: dict[str, Any]) -> bool:
    module = registry.module(spec.name, backend)
    return isinstance(module, ModuleType) and module.supports(*spec.prepare(**inputs)) is None


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """(entry name, arguments) of every kernel called directly within the block."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    originals = dict(library._DIRECT)

    def spy(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append((name, args))
            return function(*args)

        return run

    library._DIRECT.update({name: spy(name, function) for name, function in originals.items()})
    try:
        yield calls
    finally:
        library._DIRECT.update(originals)
