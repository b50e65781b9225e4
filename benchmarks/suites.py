"""The suites over the registry.

quick: every op at its bench cases, then the GPT step (`gpt_step.py`). cpu: the shapes of GPTs that no cache holds,
and tiny ones, where the host's time is all (`OpSpec.cpu_cases`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import buffers, environment, limits
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row, Run
from fastgpt._core import dispatch, registry
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing import proof, rotation
from fastgpt.testing.inputs import DTYPES
from fastgpt.testing.timing import Step, Timing, measure

COMPILE_SHARE = 0.45  # of the budget: torch.compile takes seconds a case when its cache is cold
BUDGETS = {"quick": 270.0, "cpu": 3600.0, "gpt2": 1800.0, "patch": 1800.0, "encoders": 1800.0}  # seconds
CASE_SECONDS = (0.3, 3.0)  # least and most that the timing of a case may take
# Calls that move so much have their limit measured among them, so that both see the same neighbours on the machine.
LIMIT_BESIDE = 16 * 2**20

Emit = Callable[[list[Row], list[dict[str, Any]]], None]  # the rows of a case, the limits so far
Function = Callable[..., Any]


@dataclass
class Options:
    device: torch.device
    suite: str = "quick"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    ops: tuple[str, ...] = ()  # none: all
    match: str = ""  # only cases with this in their names
    backends: tuple[str, ...] = ()  # of ours, timed beside the automatic choice
    budget: float = BUDGETS["quick"]
    compiled: bool = True


@dataclass
class Budget:
    """Seconds of the run, and of them what torch.compile may take."""

    total: float
    start: float = field(default_factory=time.perf_counter)
    compiling: float = 0.0

    @property
    def left(self) -> float:
        return self.total - (time.perf_counter() - self.start)

    def allows_compiling(self, expected: float) -> bool:
        return self.compiling < COMPILE_SHARE * self.total and self.left > 2 * expected


@dataclass(frozen=True)
class OpCase:
    spec: OpSpec
    case: Case
    dtype_name: str
    rank: int = 0  # 0: first of its op

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.case.name} {self.dtype_name}"


def op_cases(ops: Sequence[str], dtypes: Sequence[str], suite: str = "quick") -> list[OpCase]:
    """All cases of the suite, the ops in turn, so that a run cut short has something of each.

    Large shapes first, but in `cpu`, where they take up to a minute each to be checked, small ones.
    """
    found: list[OpCase] = []
    for spec in [registry.get(name) for name in ops] if ops else registry.ops():
        forms: dict[str, list[Case]] = {}
        for case in spec.suite_cpu if suite == "cpu" else spec.bench_cases:
            forms.setdefault(repr(sorted(case.options.items())), []).append(case)
        for cases in forms.values():
            cases.sort(key=lambda case: torch.Size(case.shape).numel(), reverse=suite == "quick")
        by_size = [
            case for layer in itertools.zip_longest(*forms.values()) for case in layer if case is not None
        ]
        for rank, case in enumerate(by_size):
            found += [OpCase(spec, case, dtype, rank) for dtype in dtypes if allowed(case, dtype)]
    return sorted(found, key=lambda case: case.rank)


def allowed(case: Case, dtype: str) -> bool:
    return dtype != "fp32" or not case.mixed


def run(options: Options, environment_stamp: dict[str, Any], emit: Emit) -> Run:
    """Run the suite within the budget; `emit` gets the rows of each case as soon as they are there."""
    from benchmarks import encoders, gpt2, gpt_step, patched

    settings = {
        "suite": options.suite,
        "dtypes": list(options.dtypes),
        "ops": list(options.ops),
        "match": options.match,
        "backends": list(options.backends),
        "budget": options.budget,
        "forward": "with autograd's bookkeeping, as in training",
    }
    run, budget = Run(environment_stamp, settings), Budget(options.budget)
    meter = limits.LimitMeter(options.device)
    run.limits.append(limits.to_json(meter.measure(), "start"))
    limits_took = options.budget - budget.left  # the same again is kept for the end
    ops, dtypes = [name for name in options.ops if name != gpt_step.OP], options.dtypes
    cases = op_cases(ops, dtypes, options.suite) if ops or not options.ops else []
    cases = [case for case in cases if options.match in case.name]
    whole = options.suite == "quick" and not options.ops and not options.match
    with_step = whole or gpt_step.OP in options.ops

    def timed(case: OpCase) -> Callable[[float], list[Row]]:
        return lambda seconds: op_rows(case, options, budget, seconds, meter, run.limits)

    # After the first case of each op comes the GPT, then the rest.
    jobs: list[tuple[str, Callable[[float], list[Row]]]] = [
        *((case.name, timed(case)) for case in cases if case.rank == 0),
        *((f"{gpt_step.OP} {d}", partial(gpt_step.rows, d, options, budget)) for d in dtypes if with_step),
        *((case.name, timed(case)) for case in cases if case.rank > 0),
    ]
    of_models = {"gpt2": gpt2.jobs, "patch": patched.jobs, "encoders": encoders.jobs}
    if options.suite in of_models:
        jobs = [job for job in of_models[options.suite](options, budget, meter) if options.match in job[0]]
    if not jobs:
        raise ValueError(f"--case: expected a part of the name of a case, got {options.match!r}")
    for done, (name, job) in enumerate(jobs):
        if budget.left < limits_took + 3.0:
            run.not_run.append(f"{name}: the budget of {options.budget:.0f} s is spent")
            continue
        if len(run.limits) == 1 and 4 * limits_took < budget.left < budget.total / 2:
            run.limits.append(limits.to_json(meter.measure(), "middle"))
        # Half of what is left goes into timing; checks and compilation take the rest.
        least, most = CASE_SECONDS
        rows = job(min(max(0.5 * (budget.left - limits_took) / (len(jobs) - done), least), most))
        run.rows += rows
        emit(rows, run.limits)
    run.limits.append(limits.to_json(meter.measure(), "end"))
    run.seconds = round(time.perf_counter() - budget.start, 1)
    return run


def op_rows(
    op_case: OpCase,
    options: Options,
    budget: Budget,
    seconds: float,
    meter: limits.LimitMeter | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
) -> list[Row]:
    """Check, then time, every contender on one case; forward and forward+backward share the rounds.

    With a meter, and what it has `measured` so far, so are the limits that bind a large case.
    """
    spec, case, dtype, device = op_case.spec, op_case.case, op_case.dtype, options.device
    problem = proof.pose(spec, case, dtype, device)
    inputs = problem.inputs
    functions: dict[str, Function] = {FASTGPT: spec.function, EAGER: spec.baseline}
    for backend in options.backends:
        functions[f"{FASTGPT} {backend}"] = partial(spec.function, backend=backend)
    notes: dict[str, str] = {}
    compiled, why_not = compile_baseline(spec, options, budget)
    if compiled is not None:
        functions[COMPILED] = compiled
    else:
        notes[COMPILED] = why_not

    errors: dict[str, float] = {}
    for name, function in list(functions.items()):
        started = time.perf_counter()
        try:
            errors[name] = proof.error(problem, function)
        except Exception as error:  # a backend that refuses, or one of torch.compile's many ways to fail
            if name in (FASTGPT, EAGER):
                raise
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del functions[name]
            continue
        if name == COMPILED:
            budget.compiling += time.perf_counter() - started
        if errors[name] > 1.0:
            notes[name] = f"outside bound ×{errors[name]:.3g}"
            if name.startswith(FASTGPT):  # ours outside its bound is not timed; PyTorch is, and it shows
                del functions[name]

    if problem.note:
        notes |= {name: "; ".join(filter(None, (notes.get(name), problem.note))) for name in functions}
    leaves, output_grads = problem.leaves, list(problem.output_grads.values())
    del problem  # the exact results are large
    sets, temperature = rotation.how_many(rotation.tensor_bytes(inputs.values()), rotation.caches(device))
    rotated = rotation.copies(inputs, sets, leaves)
    steps, peaks = {}, {}
    for name, function in functions.items():
        passes = rotation.passes_of(function, rotated, leaves, output_grads)
        for pass_, step in passes.items():
            steps[name, pass_] = step
            step(0)
            peaks[name, pass_] = buffers.peak_bytes(partial(step, 0), device)
    cost = spec.cost(case, dtype)
    work = {
        "fwd": (cost.fwd_bytes, cost.fwd_flops),
        "fwd+bwd": (cost.fwd_bytes + cost.bwd_bytes, cost.fwd_flops + cost.bwd_flops),
        "bwd": (cost.bwd_bytes, cost.bwd_flops),
    }
    limit_steps: dict[str, tuple[Step, float]] = {}
    if meter is not None and cost.fwd_bytes >= LIMIT_BESIDE:
        rates = limits.best(measured)
        binding = (limits.binding(*amount, op_case.dtype_name, rates)[0] for amount in work.values())
        limit_steps = meter.steps(binding, measured[-1])
    steps |= {(name, "limit"): step for name, (step, _) in limit_steps.items()}
    labels = {f"{name} {pass_}": (name, pass_) for name, pass_ in steps}
    timed = measure({label: steps[key] for label, key in labels.items()}, device, sets=sets, seconds=seconds)
    timings = {labels[label]: timing for label, timing in timed.items()}
    beside = {
        name: amount / timings[name, "limit"].seconds.median for name, (_, amount) in limit_steps.items()
    }

    backend = dispatch.choose(spec, spec.prepare(**inputs))
    rows = []
    for pass_ in ("fwd", "fwd+bwd", "bwd") if leaves else ("fwd",):
        for name in [*functions, *(name for name in notes if name not in functions)]:
            row = Row(spec.name, case.name, op_case.dtype_name, pass_, name, note=notes.get(name, ""))
            row.error, (row.moved, row.flops), row.limits = errors.get(name), work[pass_], beside
            if name.startswith(FASTGPT):
                row.backend = backend if name == FASTGPT else name.removeprefix(FASTGPT).strip()
            if name in functions:
                fill(row, timings, peaks, sets, temperature)
            rows.append(row)
    return rows


def fill(
    row: Row,
    timings: Mapping[tuple[str, str], Timing],
    peaks: Mapping[tuple[str, str], int],
    sets: int,
    temperature: str,
) -> None:
    row.sets, row.inputs = sets, temperature
    if row.pass_ == "bwd":
        both, forward = timings[row.contender, "fwd+bwd"], timings[row.contender, "fwd"]
        difference = both.minus(forward)
        if difference.p20 > 0:  # else noise swallowed it
            row.seconds, row.rounds, row.calls = difference, len(both.samples), both.calls
        else:
            row.note = "; ".join(filter(None, (row.note, "backward lost in the noise")))
        return
    row.take(timings[row.contender, row.pass_])
    row.peak_bytes = peaks[row.contender, row.pass_]


def compile_baseline(spec: OpSpec, options: Options, budget: Budget) -> tuple[Function | None, str]:
    """torch.compile of the baseline for exactly this case's shapes, or None and the reason."""
    reason = compile_refusal(options, budget)
    if reason:
        return None, reason
    torch._dynamo.reset()
    return torch.compile(spec.baseline, dynamic=False), ""


def compile_refusal(options: Options, budget: Budget, expected: float = 8.0) -> str:
    """Why torch.compile, expected to take so many seconds, is left out; "" if it is not."""
    if not options.compiled:
        return "not asked for"
    if options.device.type == "cpu" and environment.cxx_compiler() is None:
        return "no C++ compiler for torch.compile"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    return "" if budget.allows_compiling(expected) else "this run's share for compiling is spent"
