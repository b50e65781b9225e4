"""The memory-bound ops from 256 to 128K columns, and at the small shape where nobody may be slower than eager.

A tensor has 32K rows, as in published figures, up to 1 GiB in bf16. Every row of every result is judged, in chunks
against the fp64 reference; gradients that sum over rows are summed over the chunks, and so are their bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contest
from benchmarks.gpu.contest import Contest, Results
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.record import Recorder
from benchmarks.results import COMPILED, EAGER
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing.bounds import compare
from fastgpt.testing.inputs import DTYPES, Problem, as_tuple

COLUMNS = (4096, 1024, 16384, 768, 2048, 8192, 256, 512, 32768, 65536, 131072)  # the most valuable first
COMPILED_COLUMNS = (4096, 1024, 16384)  # torch.compile takes seconds a case; --full: all
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("softmax", {}),
    ("softmax", {"causal": True, "scale": 0.125}),
    ("layer_norm", {}),
    ("layer_norm", {"residual": True}),
    ("gelu", {"bias": True, "approximate": "tanh"}),
    ("rms_norm", {}),
    ("geglu", {"approximate": "tanh"}),
    ("swiglu", {}),
)
ROWS, ELEMENTS = 32768, 2**29
SMALL = (1024, 768)
CHUNK = 2**25  # elements whose exact results, some twenty tensors in fp64, are held at once


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    recorder.limits(machine.limits(), "start")
    dtypes = machine.sizes(("bf16", "fp32") if full else ("bf16",), ("bf16",))
    columns = machine.sizes(COLUMNS, (48,))
    jobs = [
        (op, case(op, options, n), dtype, full or n in COMPILED_COLUMNS)
        for dtype in dtypes
        for n in columns
        for op, options in FORMS
    ]
    _run(jobs, machine, recorder, budget)
    recorder.limits(machine.limits(), "end")


def run_small(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    recorder.limits(machine.limits(), "start")
    rows, n = machine.sizes((SMALL,), ((6, 40),))[0]
    jobs = []
    for dtype in machine.sizes(("bf16", "fp32"), ("fp32",)):
        for op, options in FORMS:
            shape = (1, rows, n) if options.get("causal") else (rows, n)
            jobs.append((op, Case(shape, options), dtype, full))
    _run(jobs, machine, recorder, budget)


def case(op: str, options: dict[str, Any], columns: int) -> Case:
    """A square of queries and keys as far as the rows go, when causal."""
    elements = ELEMENTS if columns > 64 else 8 * columns
    rows = max(min(ROWS, elements // columns), 1)
    if not options.get("causal"):
        return Case((rows, columns), options)
    queries = min(columns, rows)
    return Case((rows // queries, queries, columns), options)


def _run(jobs: list[tuple[str, Case, str, bool]], machine: Gpu, recorder: Recorder, budget: Budget) -> None:
    for done, (op, one, dtype, compiled) in enumerate(jobs):
        name = f"{op} {one.name} {dtype}"
        if budget.left < 2.0 and not machine.dry:
            recorder.not_run(name, "this part's time is spent")
            continue
        seconds = 0.0 if machine.dry else min(max(0.4 * budget.left / (len(jobs) - done), 0.2), 1.5)
        try:
            recorder.rows(case_rows(op, one, dtype, machine, seconds, compiled))
        except torch.OutOfMemoryError as error:
            recorder.not_run(name, contest.reason(error))
            torch.cuda.empty_cache()


def case_rows(op: str, one: Case, dtype_name: str, machine: Gpu, seconds: float, compiled: bool) -> list[Any]:
    spec, dtype = registry.get(op), DTYPES[dtype_name]
    draw = machine.draw(0)
    inputs = spec.make_inputs(one, dtype, draw)
    with torch.no_grad():
        outputs = as_tuple(spec.baseline(**inputs))
    grads = {
        name: draw.normal(y.shape, y.dtype, mean=0.1) for name, y in zip(spec.outputs, outputs, strict=False)
    }
    del outputs
    contenders, backend = contest.ours(machine, spec, inputs)
    contenders[EAGER] = spec.baseline
    if compiled:
        machine.forget_compiled()
        contenders[COMPILED] = machine.compile(spec.baseline)
    judge = partial(worst_error, spec, dtype, inputs, grads)
    cost = spec.cost(one, dtype)
    made = Contest(spec, one.name, dtype_name, inputs, grads, cost, contenders, judge)
    return contest.run(made, machine, seconds, backend)


def worst_error(
    spec: OpSpec, dtype: torch.dtype, inputs: dict[str, Any], grads: dict[str, Tensor], got: Results
) -> float:
    """The largest error of any element as a fraction of its bound."""
    by_row = inputs[spec.gradients[0]].shape
    ratios: list[float] = []
    sums: dict[str, tuple[Tensor, Tensor]] = {}  # exact, allowed error
    for cut, hidden in cuts(by_row, bool(inputs.get("causal"))):

        def part(value: Any, cut: Callable[[Tensor], Tensor] = cut) -> Any:
            return cut(value) if isinstance(value, Tensor) and value.shape == by_row else value

        problem = Problem(
            spec,
            dtype,
            {name: part(value) for name, value in inputs.items()},
            {name: part(value) for name, value in grads.items()},
        )
        mine = {name: part(value) for name, value in got.items()}
        exact, error = problem.solution_for(mine)
        for name, value in got.items():
            if value.shape != by_row:
                known = sums.get(name)
                sums[name] = (
                    (exact[name], error[name])
                    if known is None
                    else (known[0] + exact[name], known[1] + error[name])
                )
            elif value.dtype != problem.expected_dtype(name):
                return math.inf
            else:
                ratios.append(compare(mine[name], exact[name], error[name]).ratio)
                if hidden is not None and bool(hidden(value).any()):
                    return math.inf  # what causality hides is zero, in y and in dx
    ratios += [compare(got[name], exact, error).ratio for name, (exact, error) in sums.items()]
    return contest.largest(ratios)


Cut = Callable[[Tensor], Tensor]


def cuts(shape: torch.Size, causal: bool) -> Iterator[tuple[Cut, Cut | None]]:
    """Chunks of rows as calls of their own; and for a causal one, where its rows see nothing.

    Queries up to `stop` of a causal call are a causal call with the keys that the last of them sees.
    """
    columns = shape[-1]
    if not causal:
        for rows in contest.chunks(math.prod(shape[:-1]), columns, CHUNK):
            yield lambda t, rows=rows: t.reshape(-1, columns)[rows], None  # type: ignore[misc]
        return
    batch, queries, keys = shape
    whole = max(CHUNK // (queries * keys), 1)  # as many squares as fit into a chunk
    if whole > 1 or queries * keys <= CHUNK:
        for start in range(0, batch, whole):
            yield lambda t, start=start: t[start : start + whole], None  # type: ignore[misc]
        return
    for b in range(batch):
        for rows in contest.chunks(queries, keys, CHUNK):
            seen = keys - (queries - rows.stop)
            yield (
                lambda t, b=b, rows=rows, seen=seen: t[b : b + 1, rows, :seen],  # type: ignore[misc]
                lambda t, b=b, rows=rows, seen=seen: t[b : b + 1, rows, seen:],  # type: ignore[misc]
            )
