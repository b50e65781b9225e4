"""The C++ attention: the sizes at which its loops change, and the arithmetic that this CPU would not choose.

Panels are of 48, 24 or 12 queries (by SIMD level), tiles of 64 keys; up to 4 queries have products of their own.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_cpu
from fastgpt_kernels.cpu import attention
from op_cases import variants

from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing import check

SPEC = registry.get("attention")
LEVELS = [variant for variant in variants("attention") if variant.backend == "cpu"]


def prove(shape: tuple[int, ...], dtype: str = "fp32", **options: Any) -> None:
    report = check("attention", backend="cpu", dtypes=[dtype], cases=[Case(shape, options)], thorough=False)
    assert report.ok, report


@pytest.mark.parametrize("level", LEVELS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("queries", [1, 3, 4, 5])
def test_few_queries_and_more(queries: int, level: Any) -> None:
    level.enter()
    for keys, width in ((1, 1), (15, 8), (17, 33), (63, 64), (65, 128), (130, 130)):
        for options in ({"causal": True}, {"mask": "fp32", "kv_heads": 1, "return_lse": True}):
            prove((2, 2, queries, keys, width), **options)
    prove((1, 2, queries, 70, 20), "bf16", dropout=0.3, window="40", softcap=3.0, v_width=7)


@pytest.mark.parametrize("level", LEVELS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("length", [11, 12, 13, 47, 48, 49, 97, 193])
def test_at_the_borders_of_panels_and_tiles(length: int, level: Any) -> None:
    level.enter()
    prove((1, 2, length, length, 8), causal=True)
    for keys in (63, 64, 65):
        prove((1, 1, length, keys, 16), window="30_5")


has_pairs = pytest.mark.skipif("avx512_bf16" not in load_cpu().isas(), reason="needs a CPU with AVX512-BF16")


@has_pairs
@pytest.mark.parametrize("pairs", [False, True])
def test_bf16_in_pairs_and_as_floats(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the faster one depends on the CPU; both are inside the bound for every case."""
    monkeypatch.setattr(attention, "PAIRS", pairs)
    cases = [case for case in SPEC.cases if not case.mixed]
    report = check("attention", backend="cpu", dtypes=["bf16"], cases=cases, thorough=False)
    assert report.ok, report


@has_pairs
def test_the_two_ways_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are really multiplied where they are asked for: the sums round differently."""
    q, k, v = (torch.randn(2, 8, 100, 64).bfloat16() for _ in range(3))  # one row in forty shows it
    found = []
    for pairs in (False, True):
        monkeypatch.setattr(attention, "PAIRS", pairs)
        found.append(SPEC.function(q, k, v, backend="cpu", return_lse=True)[1])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def results(backend: str, *tensors: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """out, lse, and the gradients of the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    q, k, v = leaves
    out, lse = SPEC.function(q, k, v, **options, return_lse=True, backend=backend)
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("smallest", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_gradients_of_rows_whose_mask_is_a_huge_number(smallest: float) -> None:
    """Uniform rows, as Hugging Face makes them: their lse has lost the logarithm of the number of keys."""
    q, k, v = (torch.randn(1, 2, 60, 8) for _ in range(3))
    mask = torch.zeros(60, 70)[:, :60]
    mask[[2, 50]] = smallest
    q[:, :, [2, 50]] *= 1e-6  # what is left of a score beside such a mask
    got = results("cpu", q, k, v, mask=mask)
    exact = results("reference", *(t.double() for t in (q, k, v)), mask=mask.double())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5, msg=f"{name} {smallest}")


def test_a_window_may_be_as_large_as_an_integer() -> None:
    tensors = tuple(torch.randn(1, 1, 6, 8) for _ in range(3))
    whole, causal = results("cpu", *tensors), results("cpu", *tensors, causal=True)
    for window in (sys.maxsize, (None, sys.maxsize), (sys.maxsize, sys.maxsize)):
        for a, b in zip(results("cpu", *tensors, window=window), whole, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(results("cpu", *tensors, causal=True, window=sys.maxsize), causal, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("value", "compared"), [(-torch.inf, 2), (torch.inf, 5)])
def test_rows_lost_to_infinity_are_nan_and_not_zero(value: float, compared: int) -> None:
    """Minus infinity as a product hides nothing (though in backward its p is 0); plus infinity loses the row."""
    q, k, v = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4).abs(), torch.randn(1, 1, 5, 4)
    q[0, 0, 2, 0] = value
    got, expected = results("cpu", q, k, v), results("reference", q, k, v)
    for a, b in list(zip(got, expected, strict=True))[:compared]:
        assert torch.equal(a.isnan(), b.isnan())
    assert bool(got[0][0, 0, 2].isnan().all())


@pytest.mark.parametrize("pairs", [False, True])
def test_lanes_without_a_query_reach_no_key(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of queries: the last pair along them has half a query, times a key of NaN that nobody sees."""
    monkeypatch.setattr(attention, "PAIRS", pairs)
    q, k, v = (torch.randn(1, 1, 5, 8).bfloat16() for _ in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[:, 3] = False
    expected = results("cpu", q, k, v, mask=seen)
    k[0, 0, 3] = torch.nan
    got = results("cpu", q, k, v, mask=seen)
    for grad in got[3:]:
        assert not bool(grad.isnan().any())
    assert torch.equal(got[4], expected[4])


MEASURE = """
import resource, torch
from fastgpt import ops
q, k, v = (torch.randn(1, 1, {length}, 16, requires_grad=True) for _ in range(3))
ops.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.attention(q, k, v, causal=True, backend="cpu").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_the_length() -> None:
    """8192 x 8192 scores would take 256 MiB."""
    command = [sys.executable, "-c", MEASURE.format(length=8192)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, f"{done.stdout} KiB"
