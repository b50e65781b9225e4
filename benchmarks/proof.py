"""The check before the timing: outputs and gradients of a case against the op's own error bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.bounds import compare
from fastgpt.testing.inputs import Problem, as_tuple, leaf_names, results

# Of the main input: exact results and their bounds are ten times as large as the call's own, and where those of a
# piece stay in the caches the proof takes a fifth of the time.
PIECE_ELEMENTS = 2**19


@dataclass(frozen=True)
class Posed:
    """A bench case with its exact results: one problem, or for a large case one per piece of the leading dimension.

    In pieces the gradient of an input that all rows share is the sum of the pieces' gradients, and so is its bound.
    """

    spec: OpSpec
    inputs: dict[str, Any]
    output_grads: dict[str, Tensor]
    leaves: tuple[str, ...]
    pieces: tuple[tuple[slice, Problem], ...]


def pose(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, piece_elements: int = PIECE_ELEMENTS
) -> Posed:
    """(`testing.inputs.problem` keeps several alive; these are large.)"""
    draw = Draw(0, device)
    inputs = spec.make_inputs(case, dtype, draw)
    with torch.no_grad():
        outputs = as_tuple(spec.reference(**inputs))
    grads = {
        name: draw.normal(output.shape, output.dtype, mean=0.1)
        for name, output in zip(spec.outputs, outputs, strict=False)
    }
    pieces = []
    for rows in _pieces(case, inputs, grads, piece_elements):
        part = {name: _rows(value, rows, case.shape[0]) for name, value in inputs.items()}
        part_grads = {name: _rows(dy, rows, case.shape[0]) for name, dy in grads.items()}
        pieces.append((rows, Problem(spec, dtype, part, part_grads)))
    return Posed(spec, inputs, grads, leaf_names(spec, inputs), tuple(pieces))


def error(posed: Posed, function: Callable[..., Any]) -> float:
    """The largest error of any output or gradient as a fraction of its bound; inf for a wrong shape or dtype."""
    whole = posed.pieces[0][1]
    found = results(whole, function, posed.inputs, posed.output_grads)
    for name, got in found.items():
        if got.shape != _like(posed, name).shape or got.dtype != whole.expected_dtype(name):
            return float("inf")
    if len(posed.pieces) == 1:
        return max(comparison.ratio for comparison in whole.compare(found).values())
    worst, count = 0.0, next(iter(posed.output_grads.values())).shape[0]  # pieces are rows of every output
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for rows, problem in posed.pieces:
        part = {name: _rows(got, rows, count) for name, got in found.items()}
        exact, allowed = problem.solution_for(part)
        for name, got in part.items():
            if _like(posed, name).shape[0] == count:
                worst = max(worst, compare(got, exact[name], allowed[name]).ratio)
            elif name in shared:
                shared[name] = (shared[name][0] + exact[name], shared[name][1] + allowed[name])
            else:
                shared[name] = (exact[name], allowed[name])
    return max(worst, *(compare(found[name], *shared[name]).ratio for name in shared), 0.0)


def _pieces(case: Case, inputs: Mapping[str, Any], grads: Mapping[str, Tensor], most: int) -> Iterator[slice]:
    """Rows of the leading dimension that go together: all, unless the case is large and its rows independent.

    They are where every output has them (no mean over all) and nothing counts them: no lists of lengths or offsets,
    no dropout, whose mask depends on the place in the whole. What they share is small: its gradient is that of every
    piece.
    """
    count = case.shape[0]
    independent = all(dy.dim() > 0 and dy.shape[0] == count for dy in grads.values()) and all(
        value.is_floating_point() or value.shape[:1] == (count,)
        for value in inputs.values()
        if isinstance(value, Tensor)
    )
    independent = independent and not any(
        isinstance(value, Tensor) and value.shape[:1] != (count,) and value.numel() > most
        for value in inputs.values()
    )
    step = max(most * count // max(torch.Size(case.shape).numel(), 1), 1) if independent else count
    for begin in range(0, max(count, 1), max(step, 1)):
        yield slice(begin, min(begin + step, count))


def _rows(value: Any, rows: slice, count: int) -> Any:
    """Its part of what has a row for each of `count`; what all rows share as it is."""
    per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    return value[rows] if per_row else value


def _like(posed: Posed, name: str) -> Tensor:
    """A tensor of the shape that the output or gradient `name` must have."""
    return posed.output_grads[name] if name in posed.output_grads else posed.inputs[name[1:]]
