"""The same call a thousand times under memory pressure: every bit must come out the same, forward and backward.

A second stream copies large buffers all the while, and before each call the allocator's free memory is dirtied, so
that what a kernel leaves unwritten, or reads before it is written, comes out differently.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contest
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.record import Recorder
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing.inputs import as_tuple, dtypes_of, leaf_names

REPEATS, FORM_REPEATS = 1000, 100  # of the benchmark's cases, of the small ones
DIRT_MIB = (1, 3, 16, 64)
CHURN_MIB = 512


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    jobs = [
        (spec, case, repeats, backend)
        for spec, case, repeats in machine.sizes(cases(), rehearsed())
        for backend in machine.backends(spec.name)
    ]
    for done, (spec, case, repeats, backend) in enumerate(jobs):
        if budget.left < 1.0 and not machine.dry:
            left = len(jobs) - done
            recorder.finding(
                kind="incomplete", what="races", missing=left, why=f"of {len(jobs)} cases: time is spent"
            )
            return
        try:
            _repeat(spec, case, backend, repeats, machine, recorder)
        except Exception as error:
            recorder.finding(
                kind="race",
                op=spec.name,
                case=case.name,
                backend=backend,
                ok=False,
                why=contest.reason(error),
            )
            contest.stop_if_broken(error)


Job = tuple[OpSpec, Case, int]  # and how often


def cases() -> list[Job]:
    """One case of each form, then the benchmark's; the ops in turn."""
    by_op = [
        [(spec, case, FORM_REPEATS) for case in contest.one_of_each(spec)]
        + [(spec, case, REPEATS) for case in spec.bench_cases]
        for spec in registry.ops()
    ]
    return [job for layer in itertools.zip_longest(*by_op) for job in layer if job is not None]


def rehearsed() -> list[Job]:
    """A small one of each op."""
    return [
        (spec, next(case for case in contest.one_of_each(spec) if not case.mixed), 1)
        for spec in registry.ops()
    ]


def _repeat(spec: OpSpec, case: Case, backend: str, repeats: int, machine: Gpu, recorder: Recorder) -> None:
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes_of(case) else dtypes_of(case)[0]
    draw = machine.draw(1)
    inputs = spec.make_inputs(case, dtype, draw)
    leaves = leaf_names(spec, inputs)
    function = partial(spec.function, backend=backend)
    with torch.no_grad():
        outputs = as_tuple(function(**inputs))
    grads = {
        name: draw.normal(y.shape, y.dtype, mean=0.1) for name, y in zip(spec.outputs, outputs, strict=False)
    }
    expected = contest.once(function, inputs, leaves, grads, spec)
    differing = {name: torch.zeros((), dtype=torch.int64, device=machine.device) for name in expected}
    churn = Churn(machine)
    for _ in range(repeats):
        churn.step()
        got = contest.once(function, inputs, leaves, grads, spec)
        for name, value in got.items():
            differing[name] += _bits(value).ne(_bits(expected[name])).any()
    churn.stop()
    torch.cuda.synchronize()
    found = {name: int(count) for name, count in differing.items()}
    recorder.finding(
        kind="race", op=spec.name, case=case.name, backend=backend, repeats=repeats, differing=found,
        ok=not any(found.values()),
    )  # fmt: skip


def _bits(value: Tensor) -> Tensor:
    """Compared as integers: NaN too, and the sign of zero."""
    kinds: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.view(kinds[value.element_size()])


class Churn:
    """Copies on a stream of their own, and dirt in the memory that the next call is given."""

    def __init__(self, machine: Gpu) -> None:
        self.device = machine.device
        n = machine.sizes((CHURN_MIB,), (1,))[0] * 2**20
        self.source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=self.device)
        self.target = torch.empty_like(self.source)
        self.dirt = machine.sizes(DIRT_MIB, (1,))
        self.stream, self.steps = torch.cuda.Stream(), 0

    def step(self) -> None:
        for mib in self.dirt:  # freed at once, for the call that follows
            torch.full(
                (mib * 2**20,), 0xFF if self.steps % 2 else 0x3A, dtype=torch.uint8, device=self.device
            )
        if self.steps % 4 == 0:
            with torch.cuda.stream(self.stream):
                self.target.copy_(self.source)
        self.steps += 1

    def stop(self) -> None:
        self.stream.synchronize()
