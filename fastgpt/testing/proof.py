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
# Of a case with more operations than that the first, the middle and the last piece are judged, for all of it would
# take minutes.
ALL_JUDGED_FLOPS = 2e10


@dataclass(frozen=True)
class Posed:
    """A case with its exact results: one problem, or for a large case one per piece of a leading dimension.

    In pieces the gradient of an input that all rows share is the sum of the pieces' gradients, and so is its bound.
    note: what is not judged.
    """

    spec: OpSpec
    inputs: dict[str, Any]
    output_grads: dict[str, Tensor]
    leaves: tuple[str, ...]
    pieces: tuple[tuple[slice, Problem], ...]
    axis: int = 0
    note: str = ""


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
    # The first dimension of several rows; heads where there is one sequence.
    axis = next((i for i in range(spec.independent) if case.shape[i] > 1), 0)
    count = case.shape[axis]
    slices = list(_pieces(axis, count, inputs, grads, piece_elements * count // max(_elements(case), 1)))
    note = ""
    if len(slices) > 3 and spec.cost(case, dtype).fwd_flops > ALL_JUDGED_FLOPS:
        note = f"judged on 3 of {len(slices)} pieces"
        slices = [slices[0], slices[len(slices) // 2], slices[-1]]
    pieces = []
    for rows in slices:
        part = {name: _rows(value, axis, rows, count) for name, value in inputs.items()}
        part_grads = {name: _rows(dy, axis, rows, count) for name, dy in grads.items()}
        pieces.append((rows, Problem(spec, dtype, part, part_grads)))
    return Posed(spec, inputs, grads, leaf_names(spec, inputs), tuple(pieces), axis, note)


def error(posed: Posed, function: Callable[..., Any]) -> float:
    """The largest error of any output or gradient as a fraction of its bound; inf for a wrong shape or dtype."""
    grads = {name: dy.clone() for name, dy in posed.output_grads.items()}  # others are judged by them too
    return judge(posed, results(posed.pieces[0][1], function, posed.inputs, grads))


def judge(posed: Posed, found: Mapping[str, Tensor]) -> float:
    """`error` of a call that gave these outputs and gradients (named as in `Problem.exact`)."""
    whole = posed.pieces[0][1]
    for name, got in found.items():
        if got.shape != _like(posed, name).shape or got.dtype != whole.expected_dtype(name):
            return float("inf")
    if len(posed.pieces) == 1:
        return max(comparison.ratio for comparison in whole.compare(found).values())
    axis = posed.axis
    worst, count = 0.0, next(iter(posed.output_grads.values())).shape[axis]  # pieces are rows of every output
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for rows, problem in posed.pieces:
        part = {name: _rows(got, axis, rows, count) for name, got in found.items()}
        exact, allowed = problem.solution_for(part)
        for name, got in part.items():
            if _per_row(_like(posed, name), axis, count):
                worst = max(worst, compare(got, exact[name], allowed[name]).ratio)
            elif name in shared:
                shared[name] = (shared[name][0] + exact[name], shared[name][1] + allowed[name])
            else:
                shared[name] = (exact[name], allowed[name])
    return max(worst, *(compare(found[name], *shared[name]).ratio for name in shared), 0.0)


def _pieces(
    axis: int, count: int, inputs: Mapping[str, Any], grads: Mapping[str, Tensor], step: int
) -> Iterator[slice]:
    """Rows that go together, about `step` of `count`: all, unless the case is large and its rows independent.

    They are where every output has them (no mean over all) and nothing counts them: no lists of lengths or offsets,
    no dropout, whose mask depends on the place in the whole. What they share is small: its gradient is that of every
    piece. Heads (axis 1) are, where nothing is shared.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    independent = all(_per_row(dy, axis, count) for dy in grads.values()) and all(
        _per_row(value, axis, count)
        or (axis == 0 and value.is_floating_point() and value.numel() <= PIECE_ELEMENTS)
        for value in tensors
    )
    step = max(step, 1) if independent else max(count, 1)
    for begin in range(0, max(count, 1), step):
        yield slice(begin, min(begin + step, count))


def _per_row(value: Tensor, axis: int, count: int) -> bool:
    return value.dim() > axis and value.shape[axis] == count


def _rows(value: Any, axis: int, rows: slice, count: int) -> Any:
    """Its part of what has a row for each of `count`; what all rows share as it is."""
    if not isinstance(value, Tensor) or not _per_row(value, axis, count):
        return value
    return value.narrow(axis, rows.start, rows.stop - rows.start)


def _elements(case: Case) -> int:
    return torch.Size(case.shape).numel()


def _like(posed: Posed, name: str) -> Tensor:
    """A tensor of the shape that the output or gradient `name` must have."""
    return posed.output_grads[name] if name in posed.output_grads else posed.inputs[name[1:]]
