"""Hazards of the linear layers: a few rows, views, the output head in blocks, backward through it twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_cpu, products
from fastgpt_kernels.cpu.linear import column_sums
from fastgpt_kernels.cpu.linear_cross_entropy import into_gradient
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
@pytest.mark.parametrize("rows", range(1, 17))
def test_a_few_rows_have_the_same_bits_for_any_number_of_threads(rows: int, every_isa: str) -> None:
    """Of sums in fp32, which no rounding hides: bf16 differs in nothing but its last rounding."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 700, generator=draw), torch.randn(901, 700, generator=draw)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = x.to(dtype), weight.to(dtype)
        assert_same_for_threads(lambda inputs=inputs: [ops.linear(*inputs, backend="cpu")])


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_beside_the_products_have_the_same_bits_for_any_number_of_threads(
    dtype: torch.dtype, every_isa: str
) -> None:
    """The bias' gradient, and the head's loss and gradient of logits that are the same."""
    draw = torch.Generator().manual_seed(0)
    dy = torch.randn(700, 130, generator=draw).to(dtype)
    targets, g = torch.randint(0, 130, (700,), generator=draw), torch.rand(700, generator=draw)

    def head() -> list[Tensor]:
        return [t for t in into_gradient(dy.clone(), targets, g, None, -100) if t is not None]

    assert_same_for_threads(lambda: [column_sums(dy)])
    assert_same_for_threads(head)


def assert_same_for_threads(run: Callable[[], list[Tensor]]) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for found in results for a, b in zip(found, results[0], strict=True))


def test_weights_whose_rows_lie_apart() -> None:
    """A stretch of columns of a wider matrix; and a view that no row of which is adjacent."""
    wide = torch.randn(40, 100)
    x = torch.randn(2, 64)
    for weight in (wide[:, 10:74], wide[::2, :64], torch.randn(64, 40).mT):
        torch.testing.assert_close(ops.linear(x, weight, backend="cpu"), F.linear(x, weight))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("block", [1, 48 * 130 * 4])
def test_the_head_in_many_blocks(backend: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows, and of 48 or 96: the weight's gradient is summed over them, beyond `ROUNDINGS` of them in fp32."""
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


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_loss_is_not_rounded_first(dtype: torch.dtype, backend: str) -> None:
    """A third has no systematic error in bf16; the scale of fp16's losses neither overflows nor comes too late."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, 64, generator=draw).to(dtype).requires_grad_() for s in (512, 600))
    targets = torch.randint(0, 600, (512,), generator=draw)
    scale = 1.0 / 3.0 if dtype == torch.bfloat16 else 65536.0
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    got = torch.autograd.grad(loss * scale, (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets) * scale, wide)
    for grad, exact in zip(got, expected, strict=True):
        assert grad.isfinite().all()
        ratio = (grad.double() * exact).sum() / exact.square().sum()
        assert abs(ratio - 1.0) < 1e-3
        assert (grad.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_backward_within_autocast_is_in_the_dtypes_of_forward(backend: str) -> None:
    """Autocast decides forward; a product of backward that it changed would be read as what it is not."""
    draw = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=draw).requires_grad_() for s in ((30, 24), (40, 24), (24, 40)))
    b1 = torch.randn(40, generator=draw).requires_grad_()
    targets = torch.randint(0, 40, (30,), generator=draw)

    def outputs() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = ops.mlp(x, w1, b1, w2, None, backend=backend)
        z = ops.linear(y, w1, b1, activation="gelu", backend=backend)
        return z.square().mean() + ops.linear_cross_entropy(y, w1, targets, backend=backend), (x, w1, b1, w2)

    loss, inputs = outputs()
    expected = torch.autograd.grad(loss, inputs)
    loss, inputs = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b)
