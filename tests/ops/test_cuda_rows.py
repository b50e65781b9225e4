"""Hazards of the CUDA layer_norm and gelu: every form that a width leads to, rows at any place in memory, parts."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, check

from fastgpt import ops
from fastgpt._core.spec import Case
from fastgpt.testing.memory import same_bits

pytestmark = pytest.mark.interpreter

# Forward: a warp up to 1024 columns, a block that holds its row up to 16384, and rows that are read again. Backward:
# up to 512, up to 8192, and two kernels.
WIDTHS = (512, 513, 1027, 8195, 16384, 16385)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_in_every_form(width: int, dtype: str) -> None:
    cases = [Case((3, width)), Case((2, width), {"residual": True, "mean": 10.0})]
    report = check("layer_norm", backend="cuda", dtypes=[dtype], cases=cases, thorough=False)
    assert report.ok, str(report)


@pytest.mark.parametrize("stream", ["fp32", None], ids=["fp32", "same"])
@pytest.mark.parametrize("width", [40, 1100, 8200])
def test_layer_norm_with_a_wider_stream_and_parameters(width: int, stream: str | None) -> None:
    options = {"parameters": "fp32"} | ({"stream": stream} if stream else {})
    report = check(
        "layer_norm", backend="cuda", dtypes=["bf16"], cases=[Case((5, width), options, mixed=True)]
    )
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "shape", [(8200, 8), (1100, 530), (530, 8200)], ids=["warps", "blocks", "two kernels"]
)
def test_layer_norm_parameters_over_many_rows(shape: tuple[int, int]) -> None:
    """More rows than parts: a group takes several, and the second stage has many parts to add."""
    x, weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (shape, *([shape[1:]] * 2)))
    dy = torch.randn(shape, device=DEVICE)
    y = ops.layer_norm(x, weight, bias, backend="cuda")
    found = torch.autograd.grad(y, (weight, bias), dy)
    xhat = torch.nn.functional.layer_norm(x.detach().double(), shape[1:])
    for got, terms in zip(found, (dy * xhat, dy.double()), strict=True):
        assert (got - terms.sum(0)).abs().max() <= 16 * 2**-24 * terms.abs().sum(0).max()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(3, 16385), (700, 256), (1, 4096), (2100, 9)], ids=str)
def test_gelu_in_every_form(shape: tuple[int, int], approximate: str) -> None:
    cases = [Case(shape, {"approximate": approximate, "bias": bias}) for bias in (False, True)]
    report = check("gelu", backend="cuda", dtypes=["bf16"], cases=cases, thorough=False)
    assert report.ok, str(report)


def misplaced(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same values `by` elements past where an allocation begins."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)


@pytest.mark.parametrize("op", ["layer_norm", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [16, 300, 1504, 17000])
def test_where_a_tensor_lies_changes_nothing(op: str, width: int, dtype: torch.dtype) -> None:
    """Whole pieces of 16 bytes or single elements: the same sums in the same order."""
    x = torch.randn(3, width, device=DEVICE).to(dtype)
    dy, bias = torch.randn_like(x), torch.randn_like(x[0])
    found = []
    for by in (0, 1, 7):
        leaf, b = misplaced(x, by).requires_grad_(), misplaced(bias, by).requires_grad_()
        y = getattr(ops, op)(leaf, bias=b, backend="cuda")
        found.append([y.detach(), *torch.autograd.grad(y, (leaf, b), misplaced(dy, by))])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))
