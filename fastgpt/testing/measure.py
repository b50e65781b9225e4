"""`measure`: implementations of an op side by side, each one checked on the very case before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt._core import registry
from fastgpt._core.dispatch import BackendError
from fastgpt._core.spec import BACKENDS, Case, OpSpec
from fastgpt.testing import proof, rotation, timing
from fastgpt.testing.inputs import DTYPE_NAMES, accepts, pairs, results
from fastgpt.testing.memory import same_bits
from fastgpt.testing.report import aligned
from fastgpt.testing.timing import Quantiles

PYTORCH, AUTOMATIC = "PyTorch", "fastgpt"  # the SPEC's baseline, and fastgpt's own choice of a backend

Contender = Callable[..., Any] | str


@dataclass(frozen=True)
class Time:
    """One contender on one case, dtype and pass.

    pass_: "fwd" (with autograd's bookkeeping, as in training) or "fwd+bwd".
    seconds: of a call: median, p20, p80; None where it was not timed, and `note` says why.
    ratio: its time over that of the implementation measured, round by round: 2 is twice as long.
    error: the largest error of any output or gradient over the allowed one; None where it returned nothing.
    rounds, inputs: how often it was timed, and where a call finds its inputs ("cold", "beyond L2", "warm").
    """

    case: str
    dtype: str
    pass_: str
    by: str
    seconds: Quantiles | None = None
    ratio: Quantiles | None = None
    error: float | None = None
    note: str = ""
    rounds: int = 0
    inputs: str = ""


@dataclass
class Measurement:
    """What `measure` found; printable, and data: `rows`, or all of it by `dataclasses.asdict`."""

    op: str
    implementation: str
    environment: dict[str, Any]
    rows: list[Time] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the implementation was timed in every row of its own."""
        own = [row for row in self.rows if row.by == self.implementation]
        return bool(own) and all(row.seconds is not None for row in own)

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        header = ("case", "dtype", "pass", "by", "median", "p20", "p80", "times as long", "error/bound", "")
        cells = [header, *map(_cells, self.rows)]
        return "\n".join([f"{self.op} by {self.implementation}: {where}", *aligned(cells)])


def measure(
    op: str,
    implementation: Contender,
    *,
    against: Sequence[Contender] | None = None,
    cases: Iterable[str | Case] | None = None,
    dtypes: Iterable[str | torch.dtype] | None = ("fp32", "bf16"),
    device: str = "cpu",
    seconds: float = 1.0,
    seed: int = 0,
) -> Measurement:
    """Time an implementation of `op` beside others, forward and forward+backward.

    All contenders of a case run in one process, every round times each of them once in random order, and what is
    compared comes from the same rounds. Inputs rotate where they would fit a cache. Before that each is checked on
    that very case: who is outside its error bound, changes its inputs or raises gets no time, and the row says so.
    PyTorch's own baseline alone is timed outside its bound too, since it is what a user has now; its row says it.

    Args:
        op: "layer_norm", ...
        implementation: a function as `check` takes it, or one of the names that `against` takes.
        against: functions, "PyTorch" (what a PyTorch user would write: `baseline` of the op's SPEC), "fastgpt" (its
            automatic choice) or a backend ("cpu", "torch", ...). By default "PyTorch" and "fastgpt".
        cases: names of declared cases, or `Case`s; by default those that the benchmarks run.
        dtypes: "fp32", "bf16", "fp16" or torch dtypes; None: all three.
        device: of the inputs; "cuda" is timed by events, with a host that runs ahead.
        seconds: of timing, for a case and dtype and all contenders together; five rounds at the least.
        seed: of the order within rounds.

    Raises:
        ValueError: an unknown op, case, dtype or contender, or no contender but the implementation itself.
    """
    spec, where = registry.get(op), torch.device(device)
    contenders: dict[str, Callable[..., Any]] = {}
    for contender in (implementation, *((PYTORCH, AUTOMATIC) if against is None else against)):
        name, function = _resolve(spec, contender, "against" if contenders else "implementation")
        if function not in contenders.values():
            contenders[_unused(name, contenders)] = function
    if len(contenders) < 2:
        raise ValueError(f"against: expected something else than the implementation, got {against!r}")
    environment = {
        "device": _device_name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    found = Measurement(op, next(iter(contenders)), environment)
    known = (*spec.bench_cases, *spec.cases, *spec.suite_cpu)
    for case, dtype in pairs(spec.bench_cases if cases is None else cases, dtypes, known):
        found.rows += _rows(spec, case, dtype, where, contenders, seconds, seed)
    return found


class _Verdict(NamedTuple):
    """error: as in `Time`; note: what is to be said; timed: whether it may be."""

    error: float | None
    note: str
    timed: bool = False


def _rows(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    contenders: Mapping[str, Callable[..., Any]],
    seconds: float,
    seed: int,
) -> Iterator[Time]:
    posed = proof.pose(spec, case, dtype, device)
    verdicts = {name: _verdict(posed, function) for name, function in contenders.items()}
    inputs, leaves, output_grads = posed.inputs, posed.leaves, list(posed.output_grads.values())
    del posed  # the exact results are large
    sets, found_in = rotation.how_many(rotation.tensor_bytes(inputs.values()), rotation.caches(device))
    rotated = rotation.copies(inputs, sets, leaves)
    steps = {
        f"{pass_} {name}": step
        for name, function in contenders.items()
        if verdicts[name].timed
        for pass_, step in rotation.passes_of(function, rotated, leaves, output_grads).items()
    }
    timings = timing.measure(steps, device, sets=sets, seconds=seconds, seed=seed)
    first = next(iter(contenders))
    for pass_ in ("fwd", "fwd+bwd") if leaves else ("fwd",):
        for name, (error, note, _) in verdicts.items():
            own, of_first = timings.get(f"{pass_} {name}"), timings.get(f"{pass_} {first}")
            yield Time(
                case.name,
                DTYPE_NAMES[dtype],
                pass_,
                name,
                seconds=None if own is None else own.seconds,
                ratio=None if own is None or of_first is None else own.over(of_first),
                error=error,
                note=note,
                rounds=0 if own is None else len(own.samples),
                inputs=found_in,
            )


def _verdict(posed: proof.Posed, function: Callable[..., Any]) -> _Verdict:
    """One call, forward and backward, judged."""
    if not accepts(function, posed.inputs):
        return _Verdict(None, "not taken: has arguments that it does not take")
    inputs: dict[str, Any] = {}
    grads = {name: dy.clone() for name, dy in posed.output_grads.items()}

    def watched(**call: Any) -> Any:
        inputs.update(call)
        return function(**call)

    try:
        found = results(posed.pieces[0][1], watched, posed.inputs, grads)
    except (NotImplementedError, BackendError) as error:
        return _Verdict(None, f"not taken: {error}")
    except Exception as error:
        return _Verdict(None, f"not timed: raised {type(error).__name__}: {error}".splitlines()[0])
    share = proof.judge(posed, found)
    befores = {**posed.inputs, **{f"the gradient of {name}": dy for name, dy in posed.output_grads.items()}}
    afters = {**inputs, **{f"the gradient of {name}": dy for name, dy in grads.items()}}
    changed = [
        name
        for name, before in befores.items()
        if isinstance(before, Tensor) and not same_bits(before, afters[name])
    ]
    note = posed.note
    if changed:  # the rounds that follow would compute on other values
        return _Verdict(share, f"not timed: changes {' and '.join(changed)}")
    if share > 1.0:
        outside = f"{share:.3g} times its error bound"
        if function is posed.spec.baseline:
            return _Verdict(share, "; ".join(filter(None, (outside, note))), timed=True)
        return _Verdict(share, f"not timed: {outside}")
    return _Verdict(share, note, timed=True)


def _resolve(spec: OpSpec, contender: Contender, argument: str) -> tuple[str, Callable[..., Any]]:
    if not isinstance(contender, str):
        if not callable(contender):
            raise ValueError(f"{argument}: expected a function or a name, got {contender!r}")
        return getattr(contender, "__name__", repr(contender)), contender
    if contender == PYTORCH:
        return PYTORCH, spec.baseline
    if contender == AUTOMATIC:
        return AUTOMATIC, spec.function
    if contender not in BACKENDS:
        expected = ", ".join((PYTORCH, AUTOMATIC, *BACKENDS))
        raise ValueError(f"{argument}: expected a function or one of {expected}, got {contender!r}")
    return f"backend {contender}", functools.partial(spec.function, backend=contender)


def _unused(name: str, names: Iterable[str]) -> str:
    known, unused, count = set(names), name, 1
    while unused in known:
        count += 1
        unused = f"{name} ({count})"
    return unused


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cells(row: Time) -> tuple[str, ...]:
    times = ("-",) * 3 if row.seconds is None else tuple(map(_short, row.seconds))
    ratio = "-" if row.ratio is None else f"{row.ratio.median:.2f} ({row.ratio.p20:.2f}-{row.ratio.p80:.2f})"
    error = "-" if row.error is None else f"{row.error:.2f}"
    return (row.case, row.dtype, row.pass_, row.by, *times, ratio, error, row.note)


def _short(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
