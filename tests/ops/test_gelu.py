"""Hazards of GELU alone: tails, infinities, the vector's tail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import variants

from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing import check
from fastgpt.testing.bounds import compare
from fastgpt.testing.inputs import problem

VARIANTS = variants("gelu")
# In PyTorch's own formulas, 0 * inf gives NaN out there.
OURS = [variant for variant in VARIANTS if variant.backend == "cpu"]


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


@on(OURS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_tails(variant: Any, approximate: str, dtype: torch.dtype) -> None:
    """To the right the identity, to the left zero, with no NaN from inf * 0 or inf - inf on the way."""
    variant.enter()
    right = torch.tensor([20.0, 100.0, 3e4, torch.finfo(dtype).max]).to(dtype).repeat(9).requires_grad_()
    y = ops.gelu(right, approximate=approximate, backend=variant.backend)
    assert torch.equal(y, right)
    assert torch.equal(torch.autograd.grad(y.sum(), right)[0], torch.ones_like(right))
    left = -right.detach()
    left.requires_grad_()
    y = ops.gelu(left, approximate=approximate, backend=variant.backend)
    assert not bool(y.any())
    assert not bool(torch.autograd.grad(y.sum(), left)[0].any())


@on(OURS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_plus_infinity_and_nan(variant: Any, approximate: str) -> None:
    variant.enter()
    x = torch.tensor([math.inf, math.nan, 1.0]).repeat(11)
    y = ops.gelu(x, approximate=approximate, backend=variant.backend)
    assert bool((y[0::3] == math.inf).all())
    assert bool(y[1::3].isnan().all())
    assert bool(y[2::3].isfinite().all())


@on(VARIANTS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_dense_grid(variant: Any, approximate: str) -> None:
    """Every 2**-9 in [-16, 16): each piece of each approximation, its seams and where results turn subnormal."""
    variant.enter()
    spec = registry.get("gelu")
    made = problem(spec, Case((4, 4096), {"approximate": approximate}), torch.float32)
    grid = (torch.arange(16384) * 2.0**-9 - 16.0).reshape(4, 4096)
    inputs = {**made.inputs, "x": grid}
    exact, error = made.solve(inputs)
    x = grid.clone().requires_grad_()
    y = ops.gelu(x, approximate=approximate, backend=variant.backend)
    (dx,) = torch.autograd.grad(y, x, made.output_grads["y"])
    for name, got in (("y", y), ("dx", dx)):
        comparison = compare(got, exact[name], error[name])
        assert comparison.ok, f"{name} {comparison}"


@on(VARIANTS)
def test_every_length_to_twice_the_vector(variant: Any) -> None:
    variant.enter()
    step = 1 if variant.backend == "cpu" else 16
    cases = [Case((n,), {"bias": True}) for n in range(1, 66, step)] + [
        Case((2, n), {"bias": True}) for n in range(1, 40, 3 * step)
    ]
    report = check("gelu", backend=variant.backend, dtypes=["fp32", "bf16"], cases=cases)
    assert not report.failures, report
