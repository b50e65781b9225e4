"""Hazards of LayerNorm alone: cancellation, constant rows, the residual's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import variants

from fastgpt import ops
from fastgpt.testing import check
from fastgpt.testing.memory import same_bits

VARIANTS = variants("layer_norm")
on = pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])


@on
@pytest.mark.parametrize("mean", [1e3, -1e4, 3e5])
def test_a_large_mean_does_not_cancel(variant: Any, mean: float) -> None:
    """The variance of the centred values; mean(x**2) - mean(x)**2 would be all noise."""
    variant.enter()
    x = (torch.randn(6, 770) + mean).double().float()
    y = ops.layer_norm(x, backend=variant.backend)
    exact = torch.nn.functional.layer_norm(x.double(), (770,))
    # What one rounding of the mean costs: half an ulp of it beside a standard deviation of one.
    assert (y - exact).abs().max() < 4 * abs(mean) * 2**-24 + 1e-5


@on
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_constant_rows_give_the_bias(variant: Any, dtype: torch.dtype) -> None:
    """Variance zero: the rows are exactly representable, so that nothing but the bias is left."""
    variant.enter()
    for n in (1, 2, 16, 33, 100):
        x = torch.full((3, n), 1.5, dtype=dtype, requires_grad=True)
        weight, bias = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
        y = ops.layer_norm(x, weight, bias, backend=variant.backend)
        assert same_bits(y, bias.expand(3, n))
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert bool(dx.isfinite().all())


@on
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dtypes_of_the_mixed_forms(variant: Any, stream: torch.dtype, parameters: torch.dtype) -> None:
    variant.enter()
    x = torch.randn(4, 24, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(4, 24, dtype=stream, requires_grad=True)
    weight = torch.randn(24, dtype=parameters, requires_grad=True)
    bias = torch.randn(24, dtype=parameters, requires_grad=True)
    y, total = ops.layer_norm(x, weight, bias, residual=residual, backend=variant.backend)
    assert (y.dtype, total.dtype) == (torch.bfloat16, stream)
    assert same_bits(total, (x.float() + residual.float()).to(stream))
    (y.float().square().sum() + total.float().sum()).backward()
    for leaf in (x, residual, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape


@on
def test_the_rounded_stream_is_what_is_normalised(variant: Any) -> None:
    """The next layer sees the rounded sum; so must this one."""
    variant.enter()
    x, residual = torch.randn(2, 4, 256).bfloat16()
    y, total = ops.layer_norm(x, residual=residual, backend=variant.backend)
    assert same_bits(y, ops.layer_norm(total, backend=variant.backend))


@on
def test_only_the_stream_used(variant: Any) -> None:
    variant.enter()
    x, residual = torch.randn(4, 24, requires_grad=True), torch.randn(4, 24, requires_grad=True)
    _, total = ops.layer_norm(x, residual=residual, backend=variant.backend)
    dy = torch.randn(4, 24)
    dx, dresidual = torch.autograd.grad(total, (x, residual), dy)
    assert torch.equal(dx, dy)
    assert torch.equal(dresidual, dy)


@on
def test_rows_are_independent(variant: Any) -> None:
    """A row alone has the bits that it has among others, whatever block of rows it falls into."""
    variant.enter()
    x = torch.randn(70, 129)
    whole = ops.layer_norm(x, backend=variant.backend)
    for i in (0, 1, 7, 33, 69):
        assert same_bits(ops.layer_norm(x[i : i + 1], backend=variant.backend), whole[i : i + 1])


@on
def test_every_width_to_twice_the_vector(variant: Any) -> None:
    """The explicit tail, for every length of it."""
    from fastgpt._core.spec import Case

    variant.enter()
    report = check(
        "layer_norm",
        backend=variant.backend,
        dtypes=["fp32", "bf16"],
        cases=[Case((2, n)) for n in range(1, 66, 1 if variant.backend == "cpu" else 16)],
    )
    assert not report.failures, report
