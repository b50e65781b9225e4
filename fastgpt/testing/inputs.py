"""One case of an op made concrete: its inputs, the exact results, and the error that each result may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt._core import registry
from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.bounds import Comparison, allowed_error, compare
from fastgpt.testing.explain import explain
from fastgpt.testing.memory import same_bits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL = (
    20_000  # elements of the main input up to which a case gets the checks that need further exact results
)


class Poke(NamedTuple):
    """Inputs changed in a few elements, and for every result where that must change nothing."""

    name: str
    inputs: dict[str, Any]
    unaffected: dict[str, Tensor]


class Problem:
    """What a call of an op on given inputs must return, forward and backward, exactly.

    inputs: the keyword arguments, floating tensors rounded to their dtypes.
    leaves: names of the inputs that have a gradient here.
    output_grads: the gradient of each output, by its name: random, in the output's dtype.
    exact: every output by its name and every gradient by "d" + the input's name, in fp64, from the rounded inputs.
    error: the E of each of them (see `bounds`).

    With a restart (`OpSpec`) those two hold for the intermediates alone: what follows from them is judged by
    `compare` from the intermediates that the call itself returned.
    """

    def __init__(
        self, spec: OpSpec, dtype: torch.dtype, inputs: dict[str, Any], output_grads: dict[str, Tensor]
    ) -> None:
        self.spec, self.dtype, self.inputs, self.output_grads = spec, dtype, inputs, output_grads
        self.leaves = leaf_names(spec, inputs)
        self.exact, self.error = self.solve(inputs)
        # The last restart. Honest implementations return the same intermediates: one solution serves them all.
        self._restarted: tuple[dict[str, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None

    def compare(self, got: Mapping[str, Tensor]) -> dict[str, Comparison]:
        """Results of one call of an implementation, among them all intermediates, each against its bound."""
        exact, error = self.solution_for(got)
        return {name: compare(value, exact[name], error[name]) for name, value in got.items()}

    def explain(self, got: Mapping[str, Tensor], name: str) -> str:
        """What the misses of the result `name` of a call have in common; "" if nothing is to be said."""
        exact, error = self.solution_for(got)
        others = {key: value for key, value in self.inputs.items() if isinstance(value, Tensor)}
        others |= {f"the gradient of {key}": dy for key, dy in self.output_grads.items()}
        return explain(got[name], exact[name], error[name], others)

    def solution_for(self, got: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(exact, error) for a call that returned these results."""
        if self.spec.restart is None:
            return self.exact, self.error
        returned = {name: got[name].detach() for name in self.spec.intermediates if name in self.exact}
        if self._restarted is None or not all(
            same_bits(value, self._restarted[0][name]) for name, value in returned.items()
        ):
            inputs = self.spec.restart(self.inputs, returned)
            if inputs is None:
                return self.exact, self.error
            solution = self.solve(inputs)
            for whole, part in zip((self.exact, self.error), solution, strict=True):
                part.update({name: whole[name] for name in returned})
            self._restarted = {name: value.clone() for name, value in returned.items()}, solution
        return self._restarted[1]

    def expected_dtype(self, name: str) -> torch.dtype:
        """Of the output or gradient `name`."""
        return self.output_grads[name].dtype if name in self.output_grads else self.inputs[name[1:]].dtype

    @property
    def small(self) -> bool:
        return max(value.numel() for value in self.inputs.values() if isinstance(value, Tensor)) <= SMALL

    @cached_property
    def summed(self) -> Problem:
        """The same inputs under the gradient that `.sum()` sends back: one number for all elements."""
        grads = {name: torch.full_like(dy, 0.75) for name, dy in self.output_grads.items()}
        return Problem(self.spec, self.dtype, self.inputs, grads)

    @cached_property
    def baseline(self) -> dict[str, Comparison | None]:
        """PyTorch's own results against the same bound; None where it has no such op (Philox dropout)."""
        if self.inputs.get("dropout_p"):
            return dict.fromkeys(self.exact)
        try:
            got = results(self, self.spec.baseline, self.inputs, self.output_grads)
        except (RuntimeError, TypeError):
            return dict.fromkeys(self.exact)
        return dict(self.compare(got))

    @cached_property
    def pokes(self) -> tuple[Poke, ...]:
        """Changes that must not show: in elements that nothing depends on, and in the last row of each input.

        What may change is read off the exact reference, run on the changed inputs: a result does not depend on
        what was changed if both it and the error that it may have stay the same.
        """
        found = []
        for name, where, inputs in self._changes():
            exact, error = self.solve(inputs)
            unaffected = {
                key: (exact[key] == self.exact[key]) & (error[key] == self.error[key]) for key in exact
            }
            if any(bool(mask.any()) for mask in unaffected.values()):
                found.append(Poke(f"{where} of {name}", inputs, unaffected))
        return tuple(found)

    def _changes(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for name in self.leaves:
            value: Tensor = self.inputs[name]
            hidden = (self.exact[f"d{name}"] == 0.0) & (value.dim() > 1)
            last = torch.zeros_like(hidden)
            if value.dim() > 1 and value.shape[-2] > 1:
                last[..., -1, :] = True
            for where, mask in (("hidden elements", hidden), ("the last row", last)):
                if bool(mask.any()):
                    for new in (value * -3.0 + 7.0, torch.full_like(value, torch.nan)):
                        yield name, where, {**self.inputs, name: torch.where(mask, new, value)}

    def solve(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(exact, error) for these inputs."""
        exact_inputs = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        grads = {name: dy.double() for name, dy in self.output_grads.items()}
        exact = results(self, self.spec.reference, exact_inputs, grads)
        conditions = self.spec.condition(exact_inputs, grads)
        working = torch.float64 if self.dtype == torch.float64 else torch.float32
        error = {}
        for name, value in exact.items():
            condition = conditions[name]
            error[name] = allowed_error(self.spec.c, condition, self.dtype, value.shape, working)
        return exact, error


def problem(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
    *,
    expanded: bool = False,
) -> Problem:
    """The problem that `case` is for a dtype and seed. The last few are kept: backends share their exact results.

    expanded: the gradients of the outputs are one row, expanded.
    """
    return _problem(
        spec.name, case.shape, tuple(case.options.items()), case.mixed, dtype, seed, device, expanded
    )


@lru_cache(maxsize=8)
def _problem(
    op: str,
    shape: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
    mixed: bool,
    dtype: torch.dtype,
    seed: int,
    device: str,
    expanded: bool,
) -> Problem:
    spec, draw = registry.get(op), Draw(seed, device)
    inputs = spec.make_inputs(Case(shape, dict(options), mixed), dtype, draw)
    with torch.no_grad():
        outputs = as_tuple(spec.reference(**inputs))
    grads = {}
    for name, output in zip(spec.outputs, outputs, strict=False):
        if expanded:  # one row for all
            row = draw.normal((1,) * (output.dim() - 1) + tuple(output.shape[-1:]), output.dtype, mean=0.1)
            grads[name] = row.expand(output.shape)
        else:
            grads[name] = draw.normal(output.shape, output.dtype, mean=0.1)
    return Problem(spec, dtype, inputs, grads)


def results(
    problem: Problem, function: Any, inputs: Mapping[str, Any], output_grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients of one call on copies of the inputs, named as in `Problem.exact`."""
    call = {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    leaves = [call[name].requires_grad_() for name in problem.leaves]
    outputs = as_tuple(function(**call))
    found = {name: y.detach() for name, y in zip(output_grads, outputs, strict=True)}
    grads = torch.autograd.grad(outputs, leaves, list(output_grads.values()))
    return found | {f"d{name}": grad for name, grad in zip(problem.leaves, grads, strict=True)}


def leaf_names(spec: OpSpec, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs of this call that can have a gradient."""
    return tuple(
        name
        for name in spec.gradients
        if isinstance(inputs.get(name), Tensor) and inputs[name].is_floating_point()
    )


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """What a case is checked in."""
    return (torch.bfloat16, torch.float16) if case.mixed else (torch.float32, torch.bfloat16, torch.float16)


def pairs(
    cases: Iterable[str | Case], dtypes: Iterable[str | torch.dtype] | None, known: Sequence[Case]
) -> Iterator[tuple[Case, torch.dtype]]:
    """Every case in every dtype that it exists in; names are of `known` cases.

    Raises:
        ValueError: an unknown dtype or case.
    """
    wanted = None if dtypes is None else [_dtype(dtype) for dtype in dtypes]
    for case in [_case(case, known) for case in cases]:
        for dtype in dtypes_of(case) if wanted is None else wanted:
            if not case.mixed or dtype in dtypes_of(case):
                yield case, dtype


def accepts(function: Callable[..., Any], inputs: Mapping[str, Any]) -> bool:
    """Whether the signature of `function` has all of these arguments."""
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


def _case(case: str | Case, known: Sequence[Case]) -> Case:
    if isinstance(case, Case):
        return case
    for one in known:
        if one.name == case:
            return one
    names = dict.fromkeys(one.name for one in known)
    raise ValueError(f"case: expected one of {', '.join(names)}, got {case!r}")
