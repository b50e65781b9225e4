"""`check`: an implementation of an op against the exact reference, forward and backward, with its hazards."""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastgpt.ops  # noqa: F401  (registers the ops)
from fastgpt._core import registry
from fastgpt._core.dispatch import BackendError
from fastgpt._core.spec import BACKENDS, Case, OpSpec
from fastgpt.testing.bounds import Comparison
from fastgpt.testing.inputs import DTYPE_NAMES, Problem, accepts, as_tuple, pairs, problem
from fastgpt.testing.memory import LAYOUTS, OutputGuards, Placed, place_expanded, poisoned, same_bits
from fastgpt.testing.report import Failure, Report, Row

T = TypeVar("T")


def check(
    op: str,
    implementation: Callable[..., Any] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    dtypes: Iterable[str | torch.dtype] | None = None,
    cases: Iterable[str | Case] | None = None,
    device: str = "cpu",
    seed: int = 0,
    thorough: bool = True,
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
        thorough: every hazard on every case. Without it (for kernels in an emulator, a thousand times slower) the
            repetitions, the layouts and the leaks take turns, one of each for a case and dtype.

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
    report = Report(op, name, path=None if ours else _path(function), device=device)
    for case, dtype in pairs(spec.cases if cases is None else cases, dtypes, spec.cases):
        report.cases[case.name] = case
        _check_case(report, function, spec, case, dtype, device, seed, thorough)
    return report


def _path(function: Any) -> str | None:
    """ "module:function" where that names it, as `fastgpt check --implementation` wants it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", None)
    found = sys.modules.get(str(module))
    if found is None or not isinstance(name, str) or getattr(found, name, None) is not function:
        return None
    spec = getattr(found, "__spec__", None)  # python -m package.module calls the module "__main__"
    return None if spec is None else f"{spec.name}:{name}"


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

        self.backwards = 2  # through each graph

    def fail(self, hazard: str, detail: str, meaning: str = "") -> None:
        failure = Failure(self.case.name, DTYPE_NAMES[self.problem.dtype], hazard, detail, meaning)
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
        call = self._call(placed)
        leaves = [call[name].requires_grad_() for name in self.problem.leaves]
        outputs = self._attempt(lambda: as_tuple(self.function(**call)))
        found = None if outputs is None else self._named(outputs)
        if outputs is None or found is None:
            return None

        def backward() -> dict[str, Tensor | None]:
            returned = torch.autograd.grad(
                outputs, leaves, list(grads.values()), retain_graph=True, allow_unused=True
            )
            return {f"d{name}": grad for name, grad in zip(self.problem.leaves, returned, strict=True)}

        gradients = self._attempt(backward)
        if gradients is None:
            return None
        for name, grad in gradients.items():
            if grad is None:
                self.fail("shape", f"no gradient for {name[1:]}")
                return None
            found[name] = grad.detach()
        if not self._well_formed({name: found[name] for name in gradients}):
            return None
        self._aliases(found, call)
        # Copied at once: where they share memory with inputs, what comes now would write over them.
        found = {name: value.clone() for name, value in found.items()}
        if self.backwards > 1:
            again = self._attempt(backward)
            for name, grad in (again or {}).items():
                if grad is None or not same_bits(found[name], grad):
                    self.fail("not repeatable", f"{name} of a second backward (retain_graph) differs")
        self._watch(placed, watched)
        return found

    def run_without_grad(self, placed: dict[str, Placed]) -> dict[str, Tensor] | None:
        """Outputs by name under no_grad; None if there is nothing to look at."""
        with torch.no_grad():
            outputs = self._attempt(lambda: as_tuple(self.function(**self._call(placed))))
        return None if outputs is None else self._named(outputs)

    def judge(
        self, got: Mapping[str, Tensor], problem: Problem, hazard: str, gradients: str | None = None
    ) -> dict[str, Comparison]:
        """Every result inside the bound of `problem`, or `hazard`; of the gradients, or `gradients`."""
        comparisons = problem.compare(got)
        for name, comparison in comparisons.items():
            if not comparison.ok:
                unwritten = (
                    hazard == "bound" and math.isnan(comparison.got) and not math.isnan(comparison.exact)
                )
                found = hazard if gradients is None or name in problem.output_grads else gradients
                self.fail(
                    "not written" if unwritten else found, f"{name} {comparison}", problem.explain(got, name)
                )
        return comparisons

    def same(self, got: Mapping[str, Tensor], other: Mapping[str, Tensor], hazard: str) -> None:
        for name in got.keys() & other.keys():
            if not same_bits(got[name], other[name]):
                self.fail(hazard, f"{name} differs")

    def _call(self, placed: Mapping[str, Placed]) -> dict[str, Any]:
        return {**self.problem.inputs, **{name: p.tensor.detach() for name, p in placed.items()}}

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, and a failure noted, if it raises."""
        try:
            return work()
        except (NotImplementedError, BackendError):  # it does not take this case
            raise
        except Exception as error:
            self.fail("raised", f"{type(error).__name__}: {error}")
            return None

    def _named(self, outputs: tuple[Any, ...]) -> dict[str, Tensor] | None:
        """The outputs by name; None, and a failure noted, if they are not what a call returns."""
        names = self.problem.output_grads
        if len(outputs) != len(names) or not all(isinstance(y, Tensor) for y in outputs):
            got = ", ".join(type(y).__name__ for y in outputs)
            self.fail("shape", f"expected {len(names)} tensors, got {len(outputs)} results ({got})")
            return None
        found = {name: y.detach() for name, y in zip(names, outputs, strict=True)}
        return found if self._well_formed(found) else None

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
    thorough: bool,
) -> None:
    first = problem(spec, case, dtype, seed, device)
    dtype_name = DTYPE_NAMES[dtype]
    if not accepts(function, first.inputs):
        report.skipped.append((case.name, dtype_name, "has arguments that it does not take"))
        return
    try:
        with poisoned() as guards:
            session = _Session(report, function, case, first, guards)
            second = problem(spec, case, dtype, seed + 1, device, expanded=True)
            for name, comparison in _prove(session, second, thorough):
                report.rows.append(Row(case.name, dtype_name, name, comparison, first.baseline[name]))
    except (NotImplementedError, BackendError) as error:
        report.skipped.append((case.name, dtype_name, str(error)))


def _prove(session: _Session, second: Problem, thorough: bool) -> Iterator[tuple[str, Comparison]]:
    """Every run that a case asks for; the comparisons of the first."""
    first = session.problem
    turn = zlib.crc32(f"{session.case.name} {first.dtype}".encode())  # the same in every process
    placed = session.place(first.inputs)
    incoming = {name: Placed(dy) for name, dy in first.output_grads.items()}
    base = session.run(placed, {name: p.tensor for name, p in incoming.items()}, list(incoming.values()))
    if base is None:
        return
    session.backwards = 2 if thorough else 1
    yield from session.judge(base, first, "bound").items()

    # The same tensors with other values, under an expanded gradient; then the first values again.
    for name, p in placed.items():
        p.write(second.inputs[name])
    other = session.run(placed, {name: place_expanded(dy) for name, dy in second.output_grads.items()})
    if other is not None:
        session.judge(other, second, "stale", gradients="expanded gradient")
    for name, p in placed.items():
        p.write(first.inputs[name])
    for look in _LOOKS if thorough else _one_of(_LOOKS, turn // 16):
        look(session, placed, {name: p.tensor for name, p in incoming.items()}, base)

    for layout in LAYOUTS[1:] if thorough else _one_of(LAYOUTS[1:], turn):
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
    for poke in first.pokes if thorough else _one_of(first.pokes, turn):
        # Placed, as everywhere: `first` is shared with other checks, and a kernel may write into what it gets.
        grads = {name: Placed(dy).tensor for name, dy in first.output_grads.items()}
        got = session.run(session.place(poke.inputs), grads)
        if got is None:
            continue
        for name, unaffected in poke.unaffected.items():
            now, before = got[name][unaffected], base[name][unaffected]
            if not bool(((now == before) | (now.isnan() & before.isnan())).all()):
                session.fail("leak", f"{name} changes with {poke.name}")


def _one_of(things: Sequence[T], turn: int) -> Sequence[T]:
    return things and things[turn % len(things) :][:1]


def _again(
    session: _Session, placed: dict[str, Placed], grads: dict[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    got = session.run(placed, grads)
    if got is not None:
        session.same(got, base, "not repeatable")


def _without_grad(
    session: _Session, placed: dict[str, Placed], grads: dict[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    got = session.run_without_grad(placed)
    if got is not None:
        session.same(got, base, "no-grad differs")


def _summed(
    session: _Session, placed: dict[str, Placed], grads: dict[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    if not session.problem.small:
        return
    ones = {name: place_expanded(dy.new_full((), 0.75).expand(dy.shape)) for name, dy in grads.items()}
    got = session.run(placed, ones)
    if got is not None:
        session.judge(got, session.problem.summed, "expanded gradient")


_LOOKS = (_again, _without_grad, _summed)  # at the same call once more, in another way
