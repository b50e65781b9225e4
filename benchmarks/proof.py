"""The check before the timing: outputs and gradients of a case against the op's own error bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.inputs import Problem, as_tuple, results


def pose(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """A bench case with its exact results. (`testing.inputs.problem` keeps several alive; these are large.)"""
    draw = Draw(0, device)
    inputs = spec.make_inputs(case, dtype, draw)
    with torch.no_grad():
        outputs = as_tuple(spec.reference(**inputs))
    grads = {
        name: draw.normal(output.shape, output.dtype, mean=0.1)
        for name, output in zip(spec.outputs, outputs, strict=False)
    }
    return Problem(spec, dtype, inputs, grads)


def error(problem: Problem, function: Callable[..., Any]) -> float:
    """The largest error of any output or gradient as a fraction of its bound; inf for a wrong shape or dtype."""
    found = results(problem, function, problem.inputs, problem.output_grads)
    for name, got in found.items():
        if got.shape != problem.exact[name].shape or got.dtype != problem.expected_dtype(name):
            return float("inf")
    return max(comparison.ratio for comparison in problem.compare(found).values())
