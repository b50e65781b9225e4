"""One case with all its contenders: each run once and judged, then all timed in turn, as in `benchmarks.suites`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import suites
from benchmarks.gpu.machine import Gpu
from benchmarks.results import FASTGPT, Row
from fastgpt._core import dispatch
from fastgpt._core.spec import Case, Cost, OpSpec
from fastgpt.testing import rotation
from fastgpt.testing.inputs import as_tuple, leaf_names
from fastgpt.testing.timing import Step, measure

Function = Callable[..., Any]
Results = dict[str, Tensor]  # outputs by name, gradients by "d" + the input's name
Judge = Callable[[Results], float]  # the largest error as a fraction of the bound


@dataclass
class Contest:
    """inputs: keyword arguments of every contender; grads: of the outputs, none for a forward-only contest."""

    spec: OpSpec
    case: str
    dtype: str
    inputs: dict[str, Any]
    grads: dict[str, Tensor]
    cost: Cost
    contenders: dict[str, Function]
    judge: Judge
    notes: dict[str, str] = field(default_factory=dict)
    peers_must_pass: float = (
        1e3  # a peer is timed outside our bound, and it shows, unless it is plainly wrong
    )

    @property
    def leaves(self) -> tuple[str, ...]:
        return leaf_names(self.spec, self.inputs) if self.grads else ()


def ours(machine: Gpu, spec: OpSpec, inputs: Mapping[str, Any]) -> tuple[dict[str, Function], str]:
    """The automatic choice and our other backends, and which backend is the automatic choice."""
    backends = machine.backends(spec.name)
    chosen = backends[0] if machine.dry else dispatch.choose(spec, spec.prepare(**inputs))
    found: dict[str, Function] = {FASTGPT: partial(spec.function, backend=chosen)}
    found |= {f"{FASTGPT} {b}": partial(spec.function, backend=b) for b in backends if b != chosen}
    return found, chosen


def run(contest: Contest, machine: Gpu, seconds: float, backend: str) -> list[Row]:
    """The rows of a contest; backend: what FASTGPT runs on."""
    errors: dict[str, float] = {}
    notes, timed = dict(contest.notes), dict[str, Function]()
    for name, function in contest.contenders.items():
        try:
            errors[name] = contest.judge(
                once(function, contest.inputs, contest.leaves, contest.grads, contest.spec)
            )
        except Exception as error:  # a refusal, a compiler that fails, no memory: the others go on
            notes[name] = reason(error)
            stop_if_broken(error)
            continue
        if not errors[name] <= 1.0:
            notes[name] = f"outside bound ×{errors[name]:.3g}"
        if errors[name] <= (1.0 if name.startswith(FASTGPT) else contest.peers_must_pass):
            timed[name] = function
    torch.cuda.empty_cache()

    grads = list(contest.grads.values())
    sets, temperature = rotation.how_many(
        rotation.tensor_bytes(contest.inputs.values()), rotation.caches(machine.device)
    )
    sets = 2 if machine.dry else sets
    rotated = rotation.copies(contest.inputs, sets, contest.leaves)
    steps: dict[str, Step] = {}
    labels: dict[str, tuple[str, str]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for name, function in timed.items():
        for pass_, step in rotation.passes_of(function, rotated, contest.leaves, grads).items():
            label = f"{name} {pass_}"
            steps[label], labels[label] = step, (name, pass_)
            peaks[name, pass_] = machine.peak_bytes(partial(step, 0))
    measured = measure(
        steps, machine.device, sets=sets, seconds=seconds, min_rounds=machine.rounds, clock=machine.clock
    )
    timings = {labels[label]: timing for label, timing in measured.items()}

    cost = contest.cost
    work = {
        "fwd": (cost.fwd_bytes, cost.fwd_flops),
        "fwd+bwd": (cost.fwd_bytes + cost.bwd_bytes, cost.fwd_flops + cost.bwd_flops),
        "bwd": (cost.bwd_bytes, cost.bwd_flops),
    }
    rows = []
    for pass_ in work if contest.leaves else ("fwd",):
        for name in dict.fromkeys([*contest.contenders, *notes]):
            row = Row(contest.spec.name, contest.case, contest.dtype, pass_, name, note=notes.get(name, ""))
            row.error, (row.moved, row.flops) = errors.get(name), work[pass_]
            if name.startswith(FASTGPT):
                row.backend = backend if name == FASTGPT else name.removeprefix(FASTGPT).strip()
            if name in timed:
                suites.fill(row, timings, peaks, sets, temperature)
            rows.append(row)
    return rows


def once(
    function: Function,
    inputs: Mapping[str, Any],
    leaves: tuple[str, ...],
    grads: Mapping[str, Tensor],
    spec: OpSpec,
) -> Results:
    """Outputs and gradients of one call."""
    call = {name: v.detach() if isinstance(v, Tensor) else v for name, v in inputs.items()}
    wanted = [call[name].requires_grad_() for name in leaves]
    outputs = as_tuple(function(**call))
    found = {name: y.detach() for name, y in zip(spec.outputs, outputs, strict=False)}
    if leaves:
        for name, gradient in zip(
            leaves, torch.autograd.grad(outputs, wanted, list(grads.values())), strict=True
        ):
            found[f"d{name}"] = gradient
    return found


def one_of_each(spec: OpSpec) -> list[Case]:
    """The smallest case, that is not trivially small, of every form: a set of options and of sizes that are one."""
    found: dict[Any, Case] = {}
    for case in sorted(spec.cases, key=lambda case: math.prod(case.shape)):
        if math.prod(case.shape) > 20:
            found.setdefault((frozenset(case.options), tuple(size == 1 for size in case.shape)), case)
    return list(found.values())


def reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def stop_if_broken(error: Exception) -> None:
    """After an illegal access nothing works in this process any more: let it end, with what it has written."""
    if "illegal" in str(error) or "unspecified launch failure" in str(error) or "misaligned" in str(error):
        raise RuntimeError("the device is lost to this process") from error


def chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Rows at a time, so that their exact results in fp64 fit beside everything else."""
    step = max(elements // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def largest(ratios: list[float]) -> float:
    """The largest, and infinity where there is a NaN."""
    return max((math.inf if math.isnan(r) else r for r in ratios), default=0.0)
