"""Hazards of the C++ row kernels that no small case meets: outputs that are streamed, and vectors in other orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fastgpt_kernels import load_cpu
from torch import Tensor

from fastgpt import ops
from fastgpt.testing.memory import same_bits

STREAMED = 12 * 2**20  # bytes of an output: csrc/cpu/stream.h


@pytest.fixture(params=load_cpu().isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = load_cpu().isa()
    load_cpu().set_isa(request.param)
    yield request.param
    load_cpu().set_isa(before)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y).cumsum(-1).remainder(5) - 2)[0]


ROW_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: ops.softmax(x, backend="cpu"),
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones_like(x[0]), backend="cpu"),
    "rms_norm": lambda x: ops.rms_norm(x, torch.ones_like(x[0]), backend="cpu"),
    "gelu": lambda x: ops.gelu(x, torch.ones_like(x[0]), backend="cpu"),
    "swiglu": lambda x: ops.swiglu(x, x, backend="cpu"),
}


@pytest.mark.parametrize("width", [992, 1000, 1001])
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_a_tensor_of_any_size(op: str, dtype: torch.dtype, width: int) -> None:
    """Forward and backward: a few rows by themselves, and at the end of an output that is streamed."""
    rows = STREAMED // (width * dtype.itemsize) + 8
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for function in (ROW_OPS[op], lambda x: gradient(ROW_OPS[op], x)):
        many, few = function(x), function(x[-7:].clone())
        assert same_bits(many[-7:], few)


@pytest.mark.parametrize("length", [224, 225])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_rows_have_the_same_bits_in_a_tensor_of_any_size(dtype: torch.dtype, length: int) -> None:
    """A row is written beside the exponentials of the next, which is longer, or the first of another sequence."""
    many = STREAMED // (length * length * dtype.itemsize) + 1
    x = torch.randn(many, length, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    for function in (
        lambda x: ops.softmax(x, causal=True, backend="cpu"),
        lambda x: gradient(lambda x: ops.softmax(x, causal=True, backend="cpu"), x),
    ):
        assert same_bits(function(x)[-2:], torch.cat([function(x[-2:-1].clone()), function(x[-1:].clone())]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [64, 65, 70])
def test_rope_rotates_streamed_rows_of_any_width(width: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Widths above 64 end in features that are copied, so that rows begin anywhere in a cache line."""
    batch = STREAMED // (2 * 400 * width * dtype.itemsize) + 1
    q = torch.randn(batch, 2, 400, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.rand(400, 32) * 6
    both = ops.rope(q, q, angles.cos(), angles.sin(), interleaved=interleaved, backend="cpu")
    for found in both:
        few = ops.rope(q[-1:], q[-1:], angles.cos(), angles.sin(), interleaved=interleaved, backend="cpu")[0]
        assert same_bits(found[-1:], few)
        expected = ops.rope(q, q, angles.cos(), angles.sin(), interleaved=interleaved, backend="reference")[0]
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_gelu_shows_nan_and_infinities(dtype: torch.dtype, approximate: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e3, -1e3, 0.0]).to(dtype).repeat(9)
    for width in (6, 54):  # parts of a vector, and whole ones
        x = special[:width].requires_grad_()
        expected = torch.autograd.grad(torch.nn.functional.gelu(x, approximate=approximate).sum(), x)[0]
        for found in (
            torch.autograd.grad(ops.gelu(x, approximate=approximate, backend="cpu").sum(), x)[0],
            torch.autograd.grad(
                ops.geglu(x, torch.ones_like(x), approximate=approximate, backend="cpu").sum(), x
            )[0],
        ):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6, equal_nan=True)


def test_softmax_of_huge_scaled_scores() -> None:
    """The maximum is of rounded products: an exponent that is not must not be above it."""
    x = torch.tensor([[3e38, 1e38, 0.0], [-3.4e38] * 3])
    found = ops.softmax(x, scale=0.3, backend="cpu")
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3]))
