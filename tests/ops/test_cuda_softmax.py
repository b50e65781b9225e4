"""Hazards of the CUDA softmax: every form that a width leads to, rows at any place in memory, masks in parts."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, check

from fastgpt import ops
from fastgpt._core.spec import Case
from fastgpt.testing.memory import same_bits

pytestmark = pytest.mark.interpreter

# A warp that holds 8 or 32 elements a lane, a block that holds its row (one with a mask: up to 8192 columns), and
# rows that are read twice; a multiple of 8 columns, where all rows begin on 16 bytes, and not.
WIDTHS = (256, 1017, 1025, 8192, 8193, 16384, 17001)
OPTIONS = {
    "plain": {"scale": 0.7},
    "causal": {"causal": True, "scale": 0.25},
    "bool": {"mask": "bool", "over": "1k"},
    "same": {"mask": "same", "over": "all"},
    "fp32": {"mask": "fp32", "over": "1k", "causal": True},
    "dropout": {"dropout": 0.3, "causal": True},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("width", WIDTHS)
def test_every_form(width: int, options: dict[str, object], dtype: str) -> None:
    report = check("softmax", backend="cuda", dtypes=[dtype], cases=[Case((3, width), options)])
    assert report.ok, str(report)


def misplaced(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same values `by` elements past where an allocation begins."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [9, 300, 1500, 17001])
def test_where_a_tensor_lies_changes_nothing(width: int, dtype: torch.dtype) -> None:
    """Whole pieces of 16 bytes or single elements: the same sums in the same order."""
    x = torch.randn(3, width, device=DEVICE).to(dtype)
    mask, dy = torch.randn_like(x), torch.randn_like(x)
    found = []
    for by in (0, 1, 7):
        leaf, bias = misplaced(x, by).requires_grad_(), misplaced(mask, by).requires_grad_()
        y = ops.softmax(leaf, mask=bias, scale=0.5, backend="cuda")
        found.append([y.detach(), *torch.autograd.grad(y, (leaf, bias), misplaced(dy, by))])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("shape", "over"),
    [
        ((1400, 5), "1k"),  # 21 parts of 67 rows, the last one shorter
        ((2, 700, 40), "11k"),
        ((2, 700, 40), "b1k"),
        ((2, 700, 40), "111"),
        ((2, 700, 40), "b11"),
        ((70, 6, 40), "1qk"),
        ((70, 6, 1), "1q1"),
        ((9, 6, 40), "bq1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_the_gradient_of_a_mask(shape: tuple[int, ...], over: str) -> None:
    """Many rows that share a row of the mask: summed in parts; few of them: by fewer warps."""
    case = Case(shape, {"mask": "fp32", "over": over, "dropout": 0.2, "scale": 0.5})
    report = check("softmax", backend="cuda", dtypes=["bf16"], cases=[case])
    assert report.ok, str(report)


@pytest.mark.parametrize("width", [300, 1500, 17001])
def test_infinities_in_rows_of_every_form(width: int) -> None:
    """-inf first and numbers later, an infinity, a NaN, and -inf alone, with a mask and without."""
    x = torch.randn(5, width, device=DEVICE)
    x[0, : width // 2] = -torch.inf
    x[1, : width - 1] = -torch.inf
    x[2, width // 3] = torch.inf
    x[3, width - 2] = torch.nan
    x[4] = -torch.inf
    seen = torch.rand(width, device=DEVICE) < 0.7
    seen[width // 3] = seen[-2:] = True
    torch.testing.assert_close(ops.softmax(x, backend="cuda"), torch.softmax(x, -1), equal_nan=True)
    expected = torch.softmax(x.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    torch.testing.assert_close(ops.softmax(x, mask=seen, backend="cuda"), expected, equal_nan=True)


def test_rows_of_a_block_that_see_nothing() -> None:
    """Causal with more queries than keys: zeros, and what is hidden is not looked at."""
    x = torch.randn(1, 1027, 1025, device=DEVICE)
    x[0, :2] = torch.nan
    x[0, 2, 1:] = torch.nan
    y = ops.softmax(x, causal=True, backend="cuda")
    assert not bool(y[0, :2].any())
    assert bool(y.isfinite().all())
    assert y[0, 2].tolist() == [1.0] + [0.0] * 1024
