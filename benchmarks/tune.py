"""`python -m benchmarks tune`: the launch configurations of the Triton kernels, measured on the GPU that is here.

Every entry that an op module offers for tuning is timed under each of its candidates, against the kernel's own rule,
in interleaved rounds. A candidate is checked against the op's error bound first. Only what beats the rule beyond the
noise is written into `fastgpt_kernels/triton/tables/<arch>.json`; everything measured is kept beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastgpt_kernels.triton import common, device
from fastgpt_kernels.triton.common import LaunchConfig, Tunable
from fastgpt_kernels.triton.launch import INTERPRETING, recording

from benchmarks import environment, offline_calls
from benchmarks.results import beyond_noise
from fastgpt._core import registry
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing import proof, rotation
from fastgpt.testing.inputs import DTYPES
from fastgpt.testing.timing import Clock, Quantiles, Sample, Step, measure

SECONDS = 0.15  # of timing for one candidate
MAX_SETS = 8
RULE = "rule"

# Small cases for every width that is tuned, where the op's own cases have none.
_WIDTHS = (256, 512, 768, 1024, 2048, 3072, 4096, 6400, 8192, 16384, 32768, 65536, 131072)
_CHECKS: Mapping[str, tuple[Case, ...]] = {
    "layer_norm": tuple(Case((9, n)) for n in _WIDTHS),
    "embedding": tuple(Case((3, 200, n), {"positions": "all", "frequent": True}) for n in (768, 1600, 4096)),
    "geglu": (Case((9, 1024)),),
    "cross_entropy": tuple(Case((9, n)) for n in (768, 32768, 65536, 131072)),
    "linear": tuple(
        Case((20, k), {"n": n, "bias": True, "activation": "gelu_tanh"})
        for n, k in ((3072, 768), (768, 3072), (6400, 1600), (4096, 4096))
    ),
    "gelu": tuple(Case((9, n), {"bias": True, "approximate": "tanh"}) for n in _WIDTHS),
    "rms_norm": tuple(Case((9, n)) for n in _WIDTHS),
    "rope": tuple(Case((2, 12, 33, n), {"layout": "BTHD", "k_heads": 3}) for n in (64, 128)),
    "softmax": tuple(Case((9, n)) for n in _WIDTHS),
    "attention": tuple(
        case
        for width in (64, 128, 256)
        for case in (
            Case((1, 2, 300, 300, width), {"causal": True}),
            Case((1, 2, 300, 300, width), {"causal": False}),
            Case((1, 2, 1, 300, width), {"causal": True}),  # decoding, one query
            Case((1, 8, 4, 300, width), {"kv_heads": 1, "causal": True}),  # and several of one K/V head
        )
    ),
}

Check = Callable[[LaunchConfig], float]  # the error as a fraction of its bound


@dataclass
class Entry:
    """One entry of the table: the problems that look it up, and how a candidate for it is checked."""

    op: str
    problems: list[Tunable]
    check: Check | None = None

    @property
    def name(self) -> tuple[str, str]:
        return self.problems[0].kernel, self.problems[0].key

    @property
    def candidates(self) -> dict[str, LaunchConfig]:
        return {describe(config): config for one in self.problems for config in one.candidates}


@dataclass
class Outcome:
    """times: by candidate, seconds on each problem. refused: why a candidate was not timed."""

    best: LaunchConfig | None
    speedup: float
    times: dict[str, list[Quantiles]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("tune: torch sees no GPU; --dry-run rehearses without one")
    where = torch.device("cpu" if options.dry_run else "cuda")
    arch = options.arch if options.dry_run else device.arch_of(where)
    path = (
        None if options.dry_run and options.out is None else (options.out or device.TABLES) / f"{arch}.json"
    )
    stamp = {
        "device": "none: rehearsed" if options.dry_run else environment.device_name(where),
        "arch": arch,
        "versions": {name: environment.version(name) for name in ("torch", "triton", "fastgpt")},
    }
    table = load(path, stamp)
    started, left_out = time.perf_counter(), []
    with rules_only():
        for entry in entries(options.op or (), arch, where, check=not options.dry_run or INTERPRETING):
            if time.perf_counter() - started > options.budget:
                left_out.append(" ".join(entry.name))
                continue
            try:
                outcome = (rehearse if options.dry_run else tune)(entry, where, arch)
            except torch.OutOfMemoryError as error:
                left_out.append(f"{' '.join(entry.name)} ({str(error).splitlines()[0]})")
                continue
            print(line(entry, outcome), flush=True)
            note(table, entry, outcome)
            if path is not None:  # after every entry: a run cut short is worth what it has done
                save(path, table)
    if left_out:
        print(f"not tuned within {options.budget:.0f} s: {', '.join(left_out)}")
    if path is not None:
        print(path)
    return 0


def entries(ops: Sequence[str], arch: str, where: torch.device, *, check: bool = True) -> Iterator[Entry]:
    """What there is to tune, the ops in turn, so that a run cut short has something of each."""
    by_op = []
    for spec in registry.ops():
        if spec.kernels or (ops and spec.name not in ops) or not registry.is_written(spec.name, "triton"):
            continue
        found: dict[tuple[str, str], Entry] = {}
        for one in getattr(offline_calls.triton_module(spec.name), "tunables", tuple)():
            found.setdefault((one.kernel, one.key), Entry(spec.name, [])).problems.append(one)
        if check:
            reached = cases_by_lookup(spec, arch)
            for name, entry in found.items():
                known = name in reached
                entry.check = checker(spec, *reached[name], name[0], where) if known else unchecked
        by_op.append(found.values())
    for layer in itertools.zip_longest(*by_op):
        yield from (entry for entry in layer if entry is not None)


def tune(entry: Entry, where: torch.device, arch: str) -> Outcome:
    """Check every candidate, time the sound ones and the rule on all problems, choose."""
    outcome = Outcome(None, 1.0)
    sound = screen(entry, outcome)
    for problem in entry.problems:
        calls = inputs(problem, where)
        time_problem(problem, calls, sound, outcome, where)
    choose(outcome, sound)
    return outcome


def rehearse(entry: Entry, where: torch.device, arch: str) -> Outcome:
    """`tune` but for the clock: what is timed is recorded, on meta tensors, as on a device of `arch`."""
    outcome = Outcome(None, 1.0)
    sound = screen(entry, outcome)
    with recording(arch) as launches:
        for problem in entry.problems:
            calls = [problem.run(offline_calls.META)]
            time_problem(problem, calls, sound, outcome, where, RehearsalClock())
    if not launches:
        raise ValueError(f"{' '.join(entry.name)}: its problem launches nothing")
    choose(outcome, sound)
    return outcome


def screen(entry: Entry, outcome: Outcome) -> dict[str, LaunchConfig]:
    """The candidates within the op's error bound; the others are refused."""
    sound = {}
    for name, config in entry.candidates.items():
        if (reason := refusal(entry, config)) is None:
            sound[name] = config
        else:
            outcome.refused[name] = reason
    return sound


def refusal(entry: Entry, config: LaunchConfig) -> str | None:
    """Why a candidate must not be timed, or None. Without a check (a dry run) nothing is refused."""
    if entry.check is None:
        return None
    try:
        error = entry.check(config)
    except Exception as failure:  # a candidate may not compile, or not fit this GPU
        return f"{type(failure).__name__}: {' '.join(str(failure).splitlines()[:1])}"
    return None if error <= 1.0 else f"outside bound ×{error:.3g}"


def time_problem(
    problem: Tunable,
    calls: Sequence[Callable[[], object]],
    sound: Mapping[str, LaunchConfig],
    outcome: Outcome,
    where: torch.device,
    clock: Clock | None = None,
) -> None:
    """The rule and every sound candidate on one problem, in interleaved rounds."""
    steps: dict[str, Step] = {RULE: partial(_call, calls)}
    for name, config in sound.items():
        step = partial(_forced_call, problem, config, calls)
        try:
            step(0)
        except Exception as failure:  # what the check's smaller problem did not show
            outcome.refused[name] = f"{type(failure).__name__}: {' '.join(str(failure).splitlines()[:1])}"
            continue
        steps[name] = step
    timings = measure(steps, where, sets=len(calls), seconds=SECONDS * len(steps), clock=clock)
    for name, timing in timings.items():
        outcome.times.setdefault(name, []).append(timing.seconds)


def choose(outcome: Outcome, sound: Mapping[str, LaunchConfig]) -> None:
    """The candidate with the best mean ratio to the rule; none if it is within the noise of it, or worse anywhere."""
    rule = outcome.times[RULE]
    for name, config in sound.items():
        times = outcome.times.get(name, [])
        if len(times) != len(rule):
            continue  # refused on one of the problems
        ratios = [before.median / after.median for before, after in zip(rule, times, strict=True)]
        apart = all(beyond_noise(*pair) for pair in zip(rule, times, strict=True))
        speedup = math.prod(ratios) ** (1 / len(ratios))
        if apart and min(ratios) > 1.0 and speedup > outcome.speedup:
            outcome.best, outcome.speedup = config, speedup


class RehearsalClock:
    """Makes the call and then up a time."""

    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        step(first % sets)
        return Sample(1e-4, 1e-5, None)


def cases_by_lookup(spec: OpSpec, arch: str) -> dict[tuple[str, str], tuple[Case, str]]:
    """For every (kernel, key) that the cases of `spec` look up: the smallest case that does, and its dtype."""
    found: dict[tuple[str, str], tuple[Case, str]] = {}
    cases = sorted((*spec.cases, *_CHECKS.get(spec.name, ())), key=lambda case: math.prod(case.shape))
    for case in cases:
        for dtype in offline_calls.DTYPE_NAMES:
            if 0 in case.shape or (case.mixed and dtype == "fp32"):
                continue
            for name in lookups(offline_calls.case_call(spec, case, dtype), arch):
                found.setdefault(name, (case, dtype))
    return found


def lookups(call: offline_calls.Call, arch: str) -> set[tuple[str, str]]:
    """The (kernel, key) that the launchers look up in the table for a call."""
    seen: set[tuple[str, str]] = set()

    class Spy(dict[str, Any]):
        def get(self, kernel: str, default: Any = None) -> Any:
            return mock.Mock(get=lambda key, default=None: seen.add((kernel, key)))

    with mock.patch.object(device, "table", return_value=Spy()), _nothing_remembered():
        offline_calls.record(call, arch)
    return seen


def checker(spec: OpSpec, case: Case, dtype: str, kernel: str, where: torch.device) -> Check:
    """Runs the case forward and backward on the backend under a configuration of `kernel`."""
    problems: list[Any] = []  # posed when first needed: the exact results take time

    def check(config: LaunchConfig) -> float:
        if not problems:
            problems.append(proof.pose(spec, case, DTYPES[dtype], where))
        with common.forced(kernel, config):
            return proof.error(problems[0], partial(spec.function, backend="triton"))

    return check


def unchecked(config: LaunchConfig) -> float:
    """The check of an entry that no case reaches: what nobody can judge is not timed."""
    raise LookupError("no case of the op looks this entry up: add one to _CHECKS")


def inputs(problem: Tunable, where: torch.device) -> list[Callable[[], object]]:
    """The problem in as many sets of inputs as a cold cache asks for."""
    before = torch.cuda.memory_allocated(where)
    calls = [problem.run(where)]
    wanted, _ = rotation.how_many(torch.cuda.memory_allocated(where) - before, rotation.caches(where))
    return calls + [problem.run(where) for _ in range(min(wanted, MAX_SETS) - 1)]


def _call(calls: Sequence[Callable[[], object]], i: int) -> object:
    return calls[i]()


def _forced_call(
    problem: Tunable, config: LaunchConfig, calls: Sequence[Callable[[], object]], i: int
) -> object:
    with problem.forced(config):
        return calls[i]()


@contextlib.contextmanager
def rules_only() -> Iterator[None]:
    """Within the block no recorded configuration is used: what is compared with is the kernels' own rule."""
    with mock.patch.object(device, "table", return_value={}), _nothing_remembered():
        yield


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    common._recorded.cache_clear()
    try:
        yield
    finally:
        common._recorded.cache_clear()


# ---- the table ------------------------------------------------------------------------------------------------


def load(path: Path | None, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The table as it is, with this run's stamp: what this run does not reach stays."""
    kept = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    empty: dict[str, Any] = {"configurations": {}, "measurements": {}}
    return {**empty, **kept, **stamp, "date": date}


def note(table: dict[str, Any], entry: Entry, outcome: Outcome) -> None:
    kernel, key = entry.name
    chosen = table["configurations"].setdefault(kernel, {})
    chosen.pop(key, None)
    if outcome.best is not None:
        chosen[key] = asdict(outcome.best)
    if not chosen:
        del table["configurations"][kernel]
    table["measurements"].setdefault(kernel, {})[key] = {
        "date": table["date"],
        "versions": table["versions"],
        "speedup": round(outcome.speedup, 3),
        "microseconds": {
            name: [round(one.median * 1e6, 2) for one in times] for name, times in outcome.times.items()
        },
        "refused": outcome.refused,
    }


def save(path: Path, table: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def line(entry: Entry, outcome: Outcome) -> str:
    """Rule against tuned, on each problem of the entry."""
    before = ", ".join(f"{one.median * 1e6:.1f}" for one in outcome.times[RULE])
    text = f"{' '.join(entry.name):40} rule {before} µs"
    if outcome.best is not None:
        name = describe(outcome.best)
        after = ", ".join(f"{one.median * 1e6:.1f}" for one in outcome.times[name])
        text += f" -> {after} µs (×{outcome.speedup:.2f}) {name}"
    if entry.check is None:
        text += " [unchecked]"
    if outcome.refused:
        first = next(iter(outcome.refused.values()))
        text += f" [{len(outcome.refused)} of {len(entry.candidates)} refused: {first}]"
    return text


def describe(config: LaunchConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="everything but the clock, without a GPU")
    parser.add_argument("--arch", default="sm_90", help="what a dry run pretends to be; else it is the GPU's")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the package's tables; a dry run: none"
    )
    return parser.parse_args(arguments)
