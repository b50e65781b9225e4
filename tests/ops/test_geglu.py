"""Hazards of the gated units alone: halves of one projection, far tails, the vector's tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import backends, variants
from torch import Tensor

from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing import check
from fastgpt.testing.bounds import compare
from fastgpt.testing.inputs import problem
from fastgpt.testing.memory import same_bits

VARIANTS = variants("geglu")
OURS = [variant for variant in VARIANTS if variant.backend in ("cpu", "triton")]
UNITS: dict[str, Callable[..., Tensor]] = {
    "geglu": ops.geglu,
    "geglu_tanh": lambda *args, **named: ops.geglu(*args, approximate="tanh", **named),
    "swiglu": ops.swiglu,
}


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


def halves(rows: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(rows + n)
    return torch.randn(rows, 2 * n, generator=made).to(dtype).requires_grad_().chunk(2, dim=-1)  # type: ignore[return-value]


@on(OURS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", [5, 64, 1030])
def test_halves_of_a_projection_have_the_bits_of_copies(variant: Any, unit: str, n: int) -> None:
    """Forward and backward, gate and up from either side; and nothing beside a half is looked at."""
    variant.enter()
    for dtype in (torch.float32, torch.bfloat16):
        for flip in (False, True):
            gate, up = halves(7, n, dtype)[:: -1 if flip else 1]
            dy = torch.linspace(-1, 1, 7 * n).reshape(7, n).to(dtype)
            y = UNITS[unit](gate, up, backend=variant.backend)
            got = (y, *torch.autograd.grad(y, (gate, up), dy))
            plain = gate.detach().contiguous().requires_grad_(), up.detach().contiguous().requires_grad_()
            y = UNITS[unit](*plain, backend=variant.backend)
            expected = (y, *torch.autograd.grad(y, plain, dy))
            for one, other in zip(got, expected, strict=True):
                assert one.is_contiguous()
                assert same_bits(one, other)


@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton") if name in backends("geglu")])
def test_halves_are_not_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.module("geglu", backend)
    seen: list[int] = []
    original = module.rows_of  # type: ignore[union-attr]

    def spy(x: Tensor, n: int) -> Any:
        rows, stride = original(x, n)
        seen.append(stride)
        assert rows is x
        return rows, stride

    monkeypatch.setattr(module, "rows_of", spy)
    gate, up = halves(6, 40)
    y = ops.swiglu(gate, up, backend=backend)
    torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    assert seen == [80, 80, 40, 80, 80]


@on(OURS)
@pytest.mark.parametrize("unit", UNITS)
def test_infinities_and_nan_as_by_definition(variant: Any, unit: str) -> None:
    """Every pair of special values. (PyTorch's gelu says NaN for inf, and inf for 3e38, on some machines.)"""
    variant.enter()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 2.0, -2.0])
    gate, up = (t.reshape(-1) for t in torch.meshgrid(special, special, indexing="ij"))
    y, expected = (UNITS[unit](gate, up, backend=backend) for backend in (variant.backend, "reference"))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[expected.isinf()], expected[expected.isinf()])
    assert torch.equal(y.isinf(), expected.isinf())


@on(OURS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_far_tails(variant: Any, unit: str, dtype: torch.dtype) -> None:
    """To the right the identity, to the left zero, with no NaN from inf * 0 or inf - inf on the way."""
    variant.enter()
    most = torch.finfo(dtype).max
    if variant.backend == "triton" and unit == "geglu_tanh":
        most = min(most, 1e12)  # the slope's z**2 overflows beyond, in `gelu` and in PyTorch too
    right = torch.tensor([200.0, 1000.0, 3e4, most]).to(dtype).repeat(9).requires_grad_()
    one = torch.ones_like(right).detach().requires_grad_()
    y = UNITS[unit](right, one, backend=variant.backend)
    assert torch.equal(y, right)
    dgate, dup = torch.autograd.grad(y.sum(), (right, one))
    assert torch.equal(dgate, torch.ones_like(dgate))
    assert torch.equal(dup, right)
    left = -right.detach()
    left.requires_grad_()
    y = UNITS[unit](left, one, backend=variant.backend)
    assert not bool(y.any())
    for grad in torch.autograd.grad(y.sum(), (left, one)):
        assert not bool(grad.any())


@on(VARIANTS)
def test_silu_on_a_dense_grid(variant: Any) -> None:
    """Every 2**-7 in [-64, 64): the bound of the negative tail is relative to it."""
    variant.enter()
    spec = registry.get("swiglu")
    made = problem(spec, Case((4, 4096)), torch.float32)
    inputs = {**made.inputs, "gate": (torch.arange(16384) * 2.0**-7 - 64.0).reshape(4, 4096)}
    exact, error = made.solve(inputs)
    gate, up = (inputs[name].clone().requires_grad_() for name in ("gate", "up"))
    y = ops.swiglu(gate, up, backend=variant.backend)
    dgate, dup = torch.autograd.grad(y, (gate, up), made.output_grads["y"])
    tail = inputs["gate"] < -20.0
    assert bool((error["y"][tail] < 1e-4 * exact["y"][tail].abs() + 2e-38).all())
    for name, got in (("y", y), ("dgate", dgate), ("dup", dup)):
        comparison = compare(got, exact[name], error[name])
        assert comparison.ok, f"{name} {comparison}"


@on([variant for variant in VARIANTS if variant.backend == "cpu"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_negative_tail_is_relatively_accurate(variant: Any, unit: str) -> None:
    """Where 1 + erf, or 1 + tanh, has lost every digit. (GELU's fit of erfc is good to 3e-5 there.)"""
    variant.enter()
    gate = torch.linspace(-11.0, -3.0, 4001)
    if unit == "swiglu":
        gate = gate * 7.0
    y = UNITS[unit](gate, torch.ones_like(gate), backend="cpu")
    z = gate.double()
    share = {
        "geglu": lambda: 0.5 * torch.erfc(-z * math.sqrt(0.5)),
        "geglu_tanh": lambda: torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)),
        "swiglu": lambda: torch.sigmoid(z),
    }[unit]()
    kept = (z * share).abs() > 1e-30
    assert int(kept.sum()) > 2000
    assert float(((y.double() - z * share) / (z * share)).abs()[kept].max()) < 5e-5


@on(VARIANTS)
def test_every_length_to_twice_the_vector(variant: Any) -> None:
    variant.enter()
    seams = [
        m + d for m in (4, 8, 16, 32, 48, 64) for d in (-1, 0, 1)
    ]  # whole vectors of every level, give or take one
    cases = [Case((n,)) for n in (1, 2, *(seams if variant.backend == "cpu" else seams[9::8]))]
    report = check("swiglu", backend=variant.backend, dtypes=["fp32", "bf16"], cases=cases)
    assert not report.failures, report


@on([variant for variant in VARIANTS if variant.backend == "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_large_results_have_the_bits_of_small_ones(variant: Any, packed: bool) -> None:
    """Past 12 MiB they are written by streaming stores, from the first aligned element of a row on."""
    variant.enter()
    rows, n = 1100, 3001
    gate, up = halves(rows, n)
    if not packed:
        gate, up = (half.detach().contiguous().requires_grad_() for half in (gate, up))
    dy = torch.randn(rows, n)
    assert dy.nbytes > 12 * 2**20
    y = ops.swiglu(gate, up, backend="cpu")
    whole = (y, *torch.autograd.grad(y, (gate, up), dy))
    for at in (slice(0, 3), slice(547, 551), slice(rows - 3, rows)):
        parts = gate[at].detach().requires_grad_(), up[at].detach().requires_grad_()
        y = ops.swiglu(*parts, backend="cpu")
        for one, other in zip(whole, (y, *torch.autograd.grad(y, parts, dy[at])), strict=True):
            assert same_bits(one[at], other)


def test_the_same_tensor_twice() -> None:
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad((torch.nn.functional.silu(x) * x).sum(), x)
    for backend in backends("swiglu"):
        leaf = x.detach().float().requires_grad_()
        (got,) = torch.autograd.grad(ops.swiglu(leaf, leaf, backend=backend).sum(), leaf)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
