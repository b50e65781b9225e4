"""Hazards of RMSNorm alone: rows of zeros, tiny and huge values, the residual's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import variants

from fastgpt import ops
from fastgpt._core.spec import Case
from fastgpt.testing import check
from fastgpt.testing.memory import same_bits

VARIANTS = variants("rms_norm")
on = pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])
# Up to two of the widest vectors, and around the groups of four.
WIDTHS = (*range(1, 34), 47, 48, 49, 63, 64, 65)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@on
@DTYPES
def test_rows_of_zeros_give_zeros_and_gradients_scaled_by_the_root_of_eps(
    variant: Any, dtype: torch.dtype
) -> None:
    """A padded token: s = 0, so that y = 0 and dx = weight * dy / sqrt(eps)."""
    variant.enter()
    for n in (1, 2, 16, 33, 100):
        x = torch.zeros(3, n, dtype=dtype, requires_grad=True)
        weight, dy = torch.randn(n, dtype=dtype), torch.randn(3, n).to(dtype)
        y = ops.rms_norm(x, weight, 0.0625, backend=variant.backend)
        assert not bool(y.any())
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, (4 * weight.float() * dy.float()).to(dtype))


@on
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15])
def test_a_power_of_ten_more_changes_nothing(variant: Any, scale: float) -> None:
    """Without eps y is of the direction alone, as long as the squares are fp32 numbers."""
    variant.enter()
    x = torch.randn(6, 770)
    y = ops.rms_norm(x * scale, eps=0.0, backend=variant.backend)
    exact = torch.nn.functional.rms_norm((x * scale).double(), (770,), eps=0.0)
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=0.0)


@on
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dtypes_of_the_mixed_forms(variant: Any, stream: torch.dtype, parameters: torch.dtype) -> None:
    variant.enter()
    x = torch.randn(4, 24, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(4, 24, dtype=stream, requires_grad=True)
    weight = torch.randn(24, dtype=parameters, requires_grad=True)
    y, total = ops.rms_norm(x, weight, residual=residual, backend=variant.backend)
    assert (y.dtype, total.dtype) == (torch.bfloat16, stream)
    assert same_bits(total, (x.float() + residual.float()).to(stream))
    (y.float().square().sum() + total.float().sum()).backward()
    for leaf in (x, residual, weight):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape


@on
def test_the_rounded_stream_is_what_is_normalised(variant: Any) -> None:
    """The next layer sees the rounded sum; so must this one."""
    variant.enter()
    x, residual = torch.randn(2, 4, 256).bfloat16()
    y, total = ops.rms_norm(x, residual=residual, backend=variant.backend)
    assert same_bits(y, ops.rms_norm(total, backend=variant.backend))


@on
def test_only_the_stream_used(variant: Any) -> None:
    variant.enter()
    x, residual = torch.randn(4, 24, requires_grad=True), torch.randn(4, 24, requires_grad=True)
    _, total = ops.rms_norm(x, residual=residual, backend=variant.backend)
    dy = torch.randn(4, 24)
    dx, dresidual = torch.autograd.grad(total, (x, residual), dy)
    assert torch.equal(dx, dy)
    assert torch.equal(dresidual, dy)


@on
def test_rows_are_independent(variant: Any) -> None:
    """A row alone has the bits that it has among others, whatever block of rows it falls into."""
    variant.enter()
    x = torch.randn(70, 129)
    whole = ops.rms_norm(x, backend=variant.backend)
    for i in (0, 1, 7, 33, 69):
        assert same_bits(ops.rms_norm(x[i : i + 1], backend=variant.backend), whole[i : i + 1])


@on
def test_every_width_to_twice_the_vector(variant: Any) -> None:
    """The explicit tail, for every length of it."""
    variant.enter()
    report = check(
        "rms_norm",
        backend=variant.backend,
        dtypes=["fp32", "bf16"],
        cases=[Case((2, n)) for n in (WIDTHS if variant.backend == "cpu" else (1, 17, 33, 65))],
        thorough=False,
    )
    assert not report.failures, report
