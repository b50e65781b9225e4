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


@pytest.mark.skipif("avx512_bf16" not in load_cpu().isas(), reason="needs a CPU with AVX512-BF16")
@pytest.mark.parametrize("pairs", [False, True])
def test_bf16_in_pairs_and_as_floats(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the faster one depends on the CPU; both are inside the bound for every case."""
    monkeypatch.setattr(attention, "PAIRS", pairs)
    cases = [case for case in SPEC.cases if not case.mixed]
    report = check("attention", backend="cpu", dtypes=["bf16"], cases=cases, thorough=False)
    assert report.ok, report


def test_the_two_ways_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are really multiplied where they are asked for: the sums round differently."""
    if "avx512_bf16" not in load_cpu().isas():
        pytest.skip("needs a CPU with AVX512-BF16")
    q, k, v = (torch.randn(1, 2, 70, 64).bfloat16() for _ in range(3))
    found = []
    for pairs in (False, True):
        monkeypatch.setattr(attention, "PAIRS", pairs)
        found.append(SPEC.function(q, k, v, backend="cpu", return_lse=True)[1])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


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
