"""`check`: an implementation of an op against the exact reference, forward and backward, with its hazards."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgpt.ops  # noqa: F401  (registers the ops)
from fastgpt._core import registry
from fastgpt._core.dispatch import BackendError
from fastgpt._core.spec import BACKENDS, Case, OpSpec
from fastgpt.testing.bounds import Comparison
from fastgpt.testing.inputs import DTYPE_NAMES, DTYPES, Problem, as_tuple, dtypes_of, problem
from fastgpt.testing.memory import LAYOUTS, OutputGuards, Placed, place_expanded, poisoned, same_bits

HAZARDS = {
    "raised": "the call raised",
    "shape": "a result has the wrong shape, or is missing",
    "dtype": "a result has the wrong dtype",
    "bound": "a result is outside its error bound",
    "not written": "an element is NaN where the exact result is not",
    "input mutated": "an input or an incoming gradient was changed",
    "out of bounds": "memory outside of a tensor was written",
    "alias": "a result shares memory with an input or an output",
    "layout": "wrong for inputs or gradients that are not contiguous or not aligned",
    "expanded gradient": "wrong for an expanded incoming gradient, as .sum() sends it",
    "stale": "wrong when the same tensors come again with other values: something was cached",
    "not repeatable": "the same call gives other bits",
    "no-grad differs": "the call gives other bits under no_grad",
    "leak": "a result changes with elements that it does not depend on",
}


class Row(NamedTuple):
    """One output or gradient of one case; pytorch: what a PyTorch user's own code gives, None where it cannot."""

    case: str
    dtype: str
    output: str
    kernel: Comparison
    pytorch: Comparison | None


class Failure(NamedTuple):
    """A hazard (a key of HAZARDS) that one case ran into."""

    case: str
    dtype: str
    hazard: str
    detail: str


@dataclass
class Report:
    """What `check` found; `ok` if nothing failed and something was checked. Printable."""

    op: str
    implementation: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # (case, dtype, reason)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.failures

    @property
    def hazards(self) -> set[str]:
        return {failure.hazard for failure in self.failures}

    def worst(self) -> list[Row]:
        """For each dtype and output the row that comes closest to its bound or is furthest past it."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            known = found.get((row.dtype, row.output))
            if known is None or row.kernel.ratio > known.kernel.ratio:
                found[row.dtype, row.output] = row
        return list(found.values())

    def __str__(self) -> str:
        lines = [f"{self.op} by {self.implementation}: {'ok' if self.ok else 'FAILED'}"]
        lines += table([self])
        lines += [f"  {f.case} {f.dtype}: {f.hazard}: {f.detail}" for f in self.failures]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} of its cases not run, e.g. {' '.join(self.skipped[0])}")
        return "\n".join(lines)


def check(
    op: str,
    implementation: Callable[..., Any] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    dtypes: Iterable[str | torch.dtype] | None = None,
    cases: Iterable[str | Case] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Prove an implementation of `op` on its declared cases, forward and backward.

    Args:
        op: "layer_norm", ...
        implementation: a function with the public signature of the op without `backend`, differentiable by
            autograd. Cases with arguments that it does not take, or for which it raises NotImplementedError, are
            left out (`Report.skipped`). By default fastgpt's own.
        backend: with fastgpt's own: which one.
        dtypes: "fp32", "bf16", "fp16" or torch dtypes; by default all three.
        cases: names of the op's declared cases, or `Case`s; by default all it declares.
        device, seed: of the inputs.

    Raises:
        ValueError: an unknown op, backend, dtype or case.
    """
    spec = registry.get(op)
    if implementation is not None and backend is not None:
        raise ValueError("backend: expected None beside an implementation of your own")
    for name in (backend,) if isinstance(backend, str) else backend or ():
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    ours = implementation is None
    function = functools.partial(spec.function, backend=backend) if ours else implementation
    assert function is not None
    name = f"backend {backend}" if ours else getattr(function, "__name__", repr(function))
    report = Report(op, name)
    wanted = None if dtypes is None else [_dtype(dtype) for dtype in dtypes]
    for case in spec.cases if cases is None else [_case(spec, case) for case in cases]:
        for dtype in dtypes_of(case) if wanted is None else wanted:
            if case.mixed and dtype not in dtypes_of(case):
                continue
            _check_case(report, function, spec, case, dtype, device, seed)
    return report


def table(reports: Iterable[Report]) -> list[str]:
    """The worst element of each op, implementation, dtype and output, with PyTorch's own error beside it."""
    lines = [
        ("op", "by", "dtype", "result", "error", "bound", "ratio", "PyTorch error", "ratio", "worst case", "")
    ]
    for report in reports:
        for row in report.worst():
            kernel, pytorch = row.kernel, row.pytorch
            lines.append((
                report.op, report.implementation.removeprefix("backend "), row.dtype, row.output,
                f"{kernel.error:.2e}", f"{kernel.bound:.2e}", f"{kernel.ratio:.2f}",
                "-" if pytorch is None else f"{pytorch.error:.2e}",
                "-" if pytorch is None else f"{pytorch.ratio:.2f}",
                row.case, "" if kernel.ok else "MISS",
            ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


class _Session:
    """One implementation on one case and dtype: runs it under poison and guards, and notes what goes wrong."""

    def __init__(
        self, report: Report, function: Callable[..., Any], case: Case, problem: Problem, guards: OutputGuards
    ) -> None:
        self.report, self.function, self.case, self.problem, self.guards = (
            report,
            function,
            case,
            problem,
            guards,
        )

    def fail(self, hazard: str, detail: str) -> None:
        failure = Failure(self.case.name, DTYPE_NAMES[self.problem.dtype], hazard, detail)
        if not any(
            known[:3] == failure[:3] for known in self.report.failures
        ):  # the first of a kind is enough
            self.report.failures.append(failure)

    def place(self, inputs: Mapping[str, Any], layout: str = "plain") -> dict[str, Placed]:
        return {
            name: Placed(value, "plain" if name == "rng" else layout)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def run(
        self, placed: dict[str, Placed], grads: Mapping[str, Tensor], watched: Sequence[Placed] = ()
    ) -> dict[str, Tensor] | None:
        """Outputs and gradients by name; None if there is nothing to look at. `watched` hold the gradients."""
        call = {**self.problem.inputs, **{name: p.tensor.detach() for name, p in placed.items()}}
        leaves = [call[name].requires_grad_() for name in self.problem.leaves]
        try:
            outputs = as_tuple(self.function(**call))
            if len(outputs) != len(grads):
                self.fail("shape", f"expected {len(grads)} outputs, got {len(outputs)}")
                return None
            found = {name: y.detach() for name, y in zip(grads, outputs, strict=True)}
            if not self._well_formed(found):
                return None
            both = [
                torch.autograd.grad(
                    outputs, leaves, list(grads.values()), retain_graph=True, allow_unused=True
                )
                for _ in range(2)
            ]
        except (NotImplementedError, BackendError):
            raise
        except Exception as error:
            self.fail("raised", f"{type(error).__name__}: {error}")
            return None
        for name, grad, again in zip(self.problem.leaves, *both, strict=True):
            if grad is None:
                self.fail("shape", f"no gradient for {name}")
                return None
            found[f"d{name}"] = grad
            if not same_bits(grad, again):
                self.fail("not repeatable", f"d{name} of a second backward (retain_graph) differs")
        if not self._well_formed({f"d{name}": found[f"d{name}"] for name in self.problem.leaves}):
            return None
        self._watch(placed, watched)
        self._aliases(found, call)
        return found

    def judge(self, got: Mapping[str, Tensor], problem: Problem, hazard: str) -> None:
        """Every result inside the bound of `problem`, or `hazard`."""
        for name, value in got.items():
            comparison = problem.compare(name, value)
            if not comparison.ok:
                unwritten = (
                    hazard == "bound" and math.isnan(comparison.got) and not math.isnan(comparison.exact)
                )
                self.fail("not written" if unwritten else hazard, f"{name} {comparison}")

    def same(self, got: Mapping[str, Tensor], other: Mapping[str, Tensor], hazard: str) -> None:
        for name in got.keys() & other.keys():
            if not same_bits(got[name], other[name]):
                self.fail(hazard, f"{name} differs")

    def _well_formed(self, found: Mapping[str, Tensor]) -> bool:
        for name, value in found.items():
            expected = self.problem.exact[name].shape, self.problem.expected_dtype(name)
            if value.shape != expected[0]:
                self.fail("shape", f"{name}: expected {tuple(expected[0])}, got {tuple(value.shape)}")
                return False
            if value.dtype != expected[1]:
                self.fail("dtype", f"{name}: expected {expected[1]}, got {value.dtype}")
                return False
        return True

    def _watch(self, placed: Mapping[str, Placed], watched: Sequence[Placed]) -> None:
        named = [*placed.items(), *(("an incoming gradient", p) for p in watched)]
        for name, p in named:
            misuse = p.misuse()
            if misuse is not None:
                self.fail("input mutated" if misuse == "changed" else "out of bounds", f"{name} was {misuse}")
                p.write(p.values)
        if self.guards.overwritten():
            self.fail("out of bounds", "guard bytes around an output were written")

    def _aliases(self, found: Mapping[str, Tensor], call: Mapping[str, Any]) -> None:
        owners = {
            value.untyped_storage().data_ptr(): name
            for name, value in call.items()
            if isinstance(value, Tensor) and value.numel()
        }
        for name, value in found.items():
            owner = owners.get(value.untyped_storage().data_ptr(), name) if value.numel() else name
            if owner != name:
                self.fail("alias", f"{name} shares memory with {owner}")
            elif value.numel() and name in self.problem.output_grads:
                # Gradients may share with one another and with what came in; outputs are nobody else's.
                owners[value.untyped_storage().data_ptr()] = name


def _check_case(
    report: Report,
    function: Callable[..., Any],
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> None:
    first = problem(spec, case, dtype, seed, device)
    dtype_name = DTYPE_NAMES[dtype]
    if not _accepts(function, first.inputs):
        report.skipped.append((case.name, dtype_name, "has arguments that it does not take"))
        return
    try:
        with poisoned() as guards:
            session = _Session(report, function, case, first, guards)
            for name, comparison in _prove(
                session, problem(spec, case, dtype, seed + 1, device, expanded=True)
            ):
                report.rows.append(Row(case.name, dtype_name, name, comparison, first.baseline[name]))
    except (NotImplementedError, BackendError) as error:
        report.skipped.append((case.name, dtype_name, str(error)))


def _prove(session: _Session, second: Problem) -> Iterator[tuple[str, Comparison]]:
    """Every run that a case asks for; the comparisons of the first."""
    first = session.problem
    placed = session.place(first.inputs)
    incoming = {name: Placed(dy) for name, dy in first.output_grads.items()}
    base = session.run(placed, {name: p.tensor for name, p in incoming.items()}, list(incoming.values()))
    if base is None:
        return
    base = {name: value.clone() for name, value in base.items()}
    session.judge(base, first, "bound")
    for name, value in base.items():
        yield name, first.compare(name, value)

    # The same tensors with other values, under an expanded gradient; then the first values again.
    for name, p in placed.items():
        p.write(second.inputs[name])
    other = session.run(placed, {name: place_expanded(dy) for name, dy in second.output_grads.items()})
    if other is not None:
        session.judge({k: v for k, v in other.items() if k in first.output_grads}, second, "stale")
        session.judge(
            {k: v for k, v in other.items() if k not in first.output_grads}, second, "expanded gradient"
        )
    for name, p in placed.items():
        p.write(first.inputs[name])
    again = session.run(placed, {name: p.tensor for name, p in incoming.items()}, list(incoming.values()))
    if again is not None:
        session.same(again, base, "not repeatable")
    with torch.no_grad():
        outputs = as_tuple(
            session.function(**{**first.inputs, **{name: p.tensor for name, p in placed.items()}})
        )
    session.same(dict(zip(first.output_grads, outputs, strict=False)), base, "no-grad differs")

    for layout in LAYOUTS[1:]:
        incoming = {name: Placed(dy, layout) for name, dy in first.output_grads.items()}
        got = session.run(
            session.place(first.inputs, layout),
            {name: p.tensor for name, p in incoming.items()},
            list(incoming.values()),
        )
        if got is not None:
            session.judge(got, first, "layout")
    if not first.small:
        return
    summed = {
        name: place_expanded(dy.new_full((), 0.75).expand(dy.shape))
        for name, dy in first.output_grads.items()
    }
    got = session.run(placed, summed)
    if got is not None:
        session.judge(got, first.summed, "expanded gradient")
    for poke in first.pokes:
        got = session.run(session.place(poke.inputs), first.output_grads)
        if got is None:
            continue
        for name, unaffected in poke.unaffected.items():
            now, before = got[name][unaffected], base[name][unaffected]
            if not bool(((now == before) | (now.isnan() & before.isnan())).all()):
                session.fail("leak", f"{name} changes with {poke.name}")


def _accepts(function: Callable[..., Any], inputs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(**inputs)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: the call will tell
        return True
    return True


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPE_NAMES:
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _case(spec: OpSpec, case: str | Case) -> Case:
    if isinstance(case, Case):
        return case
    for known in spec.cases:
        if known.name == case:
            return known
    raise ValueError(f"case: expected one of {', '.join(c.name for c in spec.cases)}, got {case!r}")
