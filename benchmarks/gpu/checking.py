"""The harness on the GPU backends: every case of an op on real device tensors, a row per dtype and case."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import contest
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.record import Recorder
from benchmarks.suites import Budget
from fastgpt import testing
from fastgpt._core import registry
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing.inputs import DTYPE_NAMES, dtypes_of

REHEARSED = Case((5, 33))


def run(backend: str, op: str, shard: str, machine: Gpu, recorder: Recorder, budget: Budget) -> None:
    """A finding per case and dtype, as soon as it is judged; shard "1of3": the second, fifth, ... of them."""
    torch.set_num_threads(1)  # many of these run side by side
    spec = registry.get(op)
    if backend not in machine.backends(op):
        module = registry.module(op, backend)
        why = module if isinstance(module, str) else "does not run here"
        recorder.not_run(f"{op} {backend}", why)
        if not machine.dry:  # a kernel that was written and cannot be used is no success
            found = {"op": op, "backend": backend, "dtype": "fp32", "case": spec.cases[0].name}
            recorder.finding(kind="check", **found, ok=False, failures=[why], repro=repro(found))
        return
    jobs = [(case, dtype) for case in spec.cases for dtype in dtypes_of(case)]
    first, _, shards = shard.partition("of")
    jobs = list(machine.sizes(jobs[int(first) :: int(shards)], [(REHEARSED, dtypes_of(REHEARSED)[1])]))
    for done, (case, dtype) in enumerate(jobs):
        if budget.left < 0.0:
            left = len(jobs) - done
            recorder.finding(
                kind="incomplete",
                what=f"{op} {backend}",
                missing=left,
                why=f"of {len(jobs)} cases: time is spent",
            )
            return
        _judge(spec, backend, case, DTYPE_NAMES[dtype], machine, recorder)


def _judge(spec: OpSpec, backend: str, case: Case, dtype: str, machine: Gpu, recorder: Recorder) -> None:
    began = time.perf_counter()
    found: dict[str, Any] = {"kind": "check", "op": spec.name, "backend": backend, "dtype": dtype}
    found["case"] = case.name
    try:
        report = testing.check(
            spec.name,
            backend=backend,
            dtypes=[dtype],
            cases=[case],
            device=str(machine.device),
            thorough=not machine.dry,
        )
    except Exception as error:
        recorder.finding(**found, ok=False, failures=[contest.reason(error)], repro=repro(found))
        contest.stop_if_broken(error)
        return
    found |= verdict(report)
    worst = max(report.rows, key=lambda row: row.kernel.ratio, default=None)
    if worst is not None:
        found |= {"result": worst.output, "error": worst.kernel.error, "bound": worst.kernel.bound}
        found["ratio"] = worst.kernel.ratio
    if not found["ok"]:
        found["repro"] = repro(found)
    recorder.finding(**found, seconds=round(time.perf_counter() - began, 2))
    for failure in report.failures:
        contest.stop_if_broken(RuntimeError(failure.detail))


def verdict(report: testing.Report) -> dict[str, Any]:
    """Whether it is proven: the GPU backends take every declared case, so that a refusal is a failure."""
    failures = [f"{failure.hazard}: {failure.detail}" for failure in report.failures]
    failures += [f"refused: {why}" for *_, why in report.skipped]
    if not report.rows and not failures:
        failures.append("nothing was judged")
    return {"ok": not failures, "failures": failures}


def repro(found: dict[str, Any]) -> str:
    """One line for a shell in the repository's root; it needs torch alone."""
    call = (
        f"check('{found['op']}', backend='{found['backend']}', dtypes=['{found['dtype']}'],"
        f" cases=['{found['case']}'], device='cuda')"
    )
    return f'python3 -c "from fastgpt.testing import check; print({call})"'
