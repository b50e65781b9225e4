"""Hazards of the linear layers: a few rows, views, the output head in blocks, backward through it twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_cpu, products
from torch import Tensor

from fastgpt import ops
from fastgpt._core.spec import Case
from fastgpt.testing import check
from fastgpt.testing.memory import same_bits


@pytest.fixture
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = load_cpu().isa()
    load_cpu().set_isa(request.param)
    yield request.param
    load_cpu().set_isa(before)


every_level = pytest.mark.parametrize("every_isa", load_cpu().isas(), indirect=True)


@every_level
@pytest.mark.parametrize("rows", [*range(1, 18)])
def test_every_number_of_rows(rows: int, every_isa: str) -> None:
    """Up to 8 or 16 go to a kernel of their own, more to the library's product."""
    cases = [
        Case((rows, k), {"n": n, "bias": True, "activation": activation})
        for k, n, activation in ((1, 5, None), (67, 50, "gelu_tanh"), (200, 29, "gelu"))
    ]
    report = check("linear", backend="cpu", dtypes=["fp32", "bf16", "fp16"], cases=cases, thorough=False)
    assert report.ok, report


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_have_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, every_isa: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 700, generator=draw).to(dtype), torch.randn(901, 700, generator=draw).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, weight, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


def test_weights_whose_rows_lie_apart() -> None:
    """A stretch of columns of a wider matrix; and a view that no row of which is adjacent."""
    wide = torch.randn(40, 100)
    x = torch.randn(2, 64)
    for weight in (wide[:, 10:74], wide[::2, :64], torch.randn(64, 40).mT):
        torch.testing.assert_close(ops.linear(x, weight, backend="cpu"), F.linear(x, weight))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("block", [1, 16 * 130 * 2])
def test_the_head_in_many_blocks(backend: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows: the gradient of the weight is summed over them, beyond `ROUNDINGS` of them in fp32."""
    monkeypatch.setattr(products, "BLOCK_BYTES", block)
    cases = [
        Case((rows, 20), {"n": 130, "reduction": reduction, "ignored": 0.2})
        for rows in (33, 64, 150)
        for reduction in ("mean", "none")
    ]
    report = check("linear_cross_entropy", backend=backend, dtypes=["fp32", "bf16", "fp16"], cases=cases)
    assert report.ok, report


def test_blocks_keep_to_their_size() -> None:
    for rows, classes in ((2048, 50257), (1, 50257), (333, 1000), (10**6, 17), (5, 10**8)):
        for dtype in (torch.float32, torch.bfloat16):
            size = products.block_rows(rows, classes, dtype)
            assert size >= 1
            assert size * classes * dtype.itemsize <= products.BLOCK_BYTES or size <= 16
            if size < rows:  # nearly equal: the last is not much shorter
                assert -(-rows // size) * size - rows < 16 * -(-rows // size)


def gradients(loss: Tensor, inputs: tuple[Tensor, Tensor], scale: float) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss * scale, inputs, retain_graph=True)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_head_can_be_gone_through_twice(backend: str, reduction: str) -> None:
    """The gradients that forward made are given away by the first backward; the next makes them again."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, 24, generator=draw, requires_grad=True) for s in (30, 50))
    targets = torch.randint(0, 50, (30,), generator=draw)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend).sum()
    first, second, third = (gradients(loss, (x, weight), scale) for scale in (1.0, 1.0, 3.0))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(3.0 * a, c)
    expected = torch.autograd.grad(
        F.cross_entropy(x @ weight.T, targets, reduction=reduction).sum(), (x, weight)
    )
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_but_the_loss_without_gradients() -> None:
    x, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert not loss.requires_grad
    (dx,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), x)  # the weight's is not made
    assert dx.shape == x.shape
