"""Hazards of cross-entropy alone: PyTorch's meaning, borders of blocks, masked classes, rows that do not count."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE, recorded, variants
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing.inputs import problem, results
from fastgpt.testing.memory import same_bits

VARIANTS = variants("cross_entropy")
CPU = [variant for variant in VARIANTS if variant.backend == "cpu"]
SMOOTHINGS = [0.0, 0.1, 1.0]


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


def loss_and_gradient(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """And the gradient for one of the loss that differs from row to row."""
    leaf = logits.detach().clone().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, **options)
    dloss = torch.linspace(0.5, 2.0, max(loss.numel(), 1), device=loss.device).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))[0]


@on(VARIANTS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_means_what_pytorch_means(variant: Any, smoothing: float, reduction: str) -> None:
    """Values and gradients of F.cross_entropy in fp64, its NaN and infinities included."""
    variant.enter()
    x = torch.randn(6, 19, generator=torch.Generator().manual_seed(3)) * 3.0
    targets = torch.tensor([3, -100, 18, 0, -100, 7])
    everything = torch.full_like(targets, -100)
    masked = x.clone()
    masked[:, 9:15] = -math.inf
    at_target = x.clone()
    at_target[2, 18] = -math.inf
    nothing = x.clone()
    nothing[0] = -math.inf
    for logits, labels in (
        (x, targets),
        (x, everything),
        (masked, targets),
        (at_target, targets),
        (nothing, targets),
    ):
        leaf = logits.double().requires_grad_()
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        expected = F.cross_entropy(leaf, labels, **options)
        dloss = torch.linspace(0.5, 2.0, expected.numel(), dtype=torch.float64).view(expected.shape)
        (dlogits,) = torch.autograd.grad(expected, leaf, dloss)
        got = loss_and_gradient(logits.to(DEVICE), labels.to(DEVICE), backend=variant.backend, **options)
        for one, other in zip(got, (expected, dlogits), strict=True):
            torch.testing.assert_close(
                one.double().cpu(), other.detach(), rtol=1e-5, atol=1e-6, equal_nan=True
            )


@on(CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_length_to_twice_the_vectors_of_a_loop(variant: Any, dtype: torch.dtype) -> None:
    variant.enter()
    spec = registry.get("cross_entropy")
    for n in range(1, 131):
        made = problem(spec, Case((2, n), {"reduction": "none", "label_smoothing": 0.1}), dtype)
        got = results(made, functools.partial(spec.function, backend="cpu"), made.inputs, made.output_grads)
        for name, comparison in made.compare(got).items():
            assert comparison.ok, f"{n} {name} {comparison}"


@on(VARIANTS)
@pytest.mark.parametrize("order", ["rising", "falling", "masked_first", "masked_last"])
def test_the_maximum_moves_from_block_to_block(variant: Any, order: str) -> None:
    """Rows of several blocks of every backend, whole blocks of -inf among them; every border of the C++ kernel's."""
    variant.enter()
    lengths = (2047, 2048, 2049, 4096, 6145) if variant.backend == "cpu" else (17000,)
    for n in lengths:
        x = torch.linspace(-60.0, 60.0, n).repeat(3, 1)
        x = x.flip(-1).contiguous() if order == "falling" else x
        if order.startswith("masked"):
            x[:, slice(0, n - 5) if order == "masked_first" else slice(5, n)] = -math.inf
        targets = torch.tensor([n - 1, n - 3, -100] if order != "masked_last" else [0, 3, -100])
        exact = x.double().requires_grad_()
        expected = F.cross_entropy(exact, targets, reduction="none")
        dloss = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
        (dlogits,) = torch.autograd.grad(expected, exact, dloss)
        loss, got = loss_and_gradient(
            x.to(DEVICE), targets.to(DEVICE), reduction="none", backend=variant.backend
        )
        torch.testing.assert_close(loss.double().cpu(), expected.detach(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(got.double().cpu(), dlogits, rtol=1e-4, atol=1e-7)


@on(VARIANTS)
def test_a_nan_among_masked_classes_shows(variant: Any) -> None:
    """Also in a block that is -inf otherwise, where no maximum has been found yet."""
    variant.enter()
    x = torch.zeros(2, 9000, device=DEVICE)
    x[0, :8000] = -math.inf
    x[0, 70] = math.nan
    targets = torch.tensor([8500, 1], device=DEVICE)
    loss, dlogits = loss_and_gradient(x, targets, reduction="none", backend=variant.backend)
    assert bool(loss[0].isnan())
    assert bool(dlogits[0].isnan().all())
    assert float(loss[1]) == pytest.approx(math.log(9000), rel=1e-6)
    assert bool(dlogits[1].isfinite().all())


@on(VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_an_ignored_row_is_not_looked_at(variant: Any, value: float) -> None:
    variant.enter()
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    targets = torch.tensor([3, -100, 36, 0], device=DEVICE)
    before = loss_and_gradient(x, targets, label_smoothing=0.1, backend=variant.backend)
    x[1] = value
    after = loss_and_gradient(x, targets, label_smoothing=0.1, backend=variant.backend)
    assert same_bits(before[0], after[0])
    assert same_bits(before[1], after[1])
    assert not bool(after[1][1].any())


@on(VARIANTS)
def test_a_target_that_is_no_class_gives_nan_where_it_cannot_be_checked(variant: Any) -> None:
    """Past validation, as on a GPU or under compile: nothing outside of the row is read, its result is NaN."""
    variant.enter()
    module: Any = registry.module("cross_entropy", variant.backend)
    x = torch.randn(4, 37, device=DEVICE)
    targets = torch.tensor([3, 2**40, -7, 0], device=DEVICE)
    loss, lse, count = module.cross_entropy_fwd(x, targets, -100, 0.0, "none")
    assert loss.isnan().tolist() == [False, True, True, False]
    dlogits = module.cross_entropy_bwd(torch.ones_like(loss), x, targets, lse, count, -100, 0.0, "none")
    assert dlogits.isnan().all(-1).tolist() == [False, True, True, False]
    assert bool(dlogits[[0, 3]].isfinite().all())


@on(CPU)
def test_a_mean_over_many_rows_is_accurate(variant: Any) -> None:
    """Equal losses, whose sum in fp32 errs to one side."""
    variant.enter()
    x = torch.tensor([0.3, 0.0]).expand(300_000, 2)
    loss = ops.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64), backend="cpu")
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.3)), rel=3e-7)


@pytest.mark.parametrize(
    "backend", sorted({variant.backend for variant in VARIANTS} & {"cpu", "torch", "reference"})
)
def test_the_gpt_takes_its_loss_from_here(backend: str) -> None:
    names = [backend] if backend != "cpu" else ["cpu", "torch"]
    model = GPT(GPTConfig(17, 8, 2, 1, 6, pad_idx=0, backend=names))
    tokens = torch.randint(1, 17, (2, 6))
    targets = tokens.roll(-1, 1)
    targets[0, 3:], targets[1, 5] = 0, -100  # padding, and what does not count
    with recorded() as calls:
        loss = model(tokens, targets)
        loss.backward()
    assert f"linear_cross_entropy_fwd_{backend}" in {
        name for name, _ in calls
    }  # which makes the gradients too
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens)[0, :3], targets[0, :3]) * 3
        expected += F.cross_entropy(model(tokens)[1, :5], targets[1, :5]) * 5
    torch.testing.assert_close(loss.detach(), expected / 8)


@pytest.mark.slow
@on([v for v in VARIANTS if v.level is None and v.backend in ("cpu", "triton") and not v.emulated])
def test_more_than_2_to_the_31_elements(variant: Any) -> None:
    """Offsets are 64 bits wide: the last rows are as they are alone."""
    rows, classes = 2**15 + 8, 2**16
    if _free_bytes() < 5 * rows * classes:
        pytest.skip("needs 11 GB of free memory")
    end = torch.randn(8, classes, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(0, classes, (rows,), device=DEVICE)
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits[-8:] = end
    options = {"reduction": "none", "backend": variant.backend}
    alone = loss_and_gradient(end, targets[-8:], reduction="none", backend=variant.backend)[0]
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, targets, **options)
    assert same_bits(loss[-8:].detach(), alone)
    (dlogits,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    small = end.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        ops.cross_entropy(small, targets[-8:], **options), small, torch.ones(8, device=DEVICE)
    )
    assert same_bits(dlogits[-8:].clone(), expected)


def _free_bytes() -> int:
    if DEVICE == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
