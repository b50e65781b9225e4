"""The number of threads changes no bit of what the C++ kernels give; forked children and threads may call them."""

from __future__ import annotations

import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgpt_kernels.cpu import gemm
from op_cases import OPS, backends, check, problem

from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing.inputs import results
from fastgpt.testing.memory import same_bits


def _masked(kind: str, **options: Any) -> list[Case]:
    """A case for every dimension that the mask's gradient can be summed over."""
    patterns = ("bhqk", "b11k", "11qk", "1hq1", "1111")
    return [Case((3, 4, 90, 80), {"mask": kind, "over": pattern, **options}) for pattern in patterns]


# Every path of the C++ kernels at a size that is handed out to several threads: the declared cases are smaller.
THREADED = {
    "attention": [
        Case((2, 4, 150, 150, 20), {"causal": True, "return_lse": True}),
        Case((2, 4, 150, 170, 16), {"mask": "fp32", "over": "1hqk", "dropout": 0.1}),
        Case((2, 4, 3, 2000, 16), {"mask": "bool", "lengths": True}),
        # More threads than key heads: backward goes by stretches of keys and of queries.
        Case((1, 2, 100, 1100, 16), {"kv_heads": 1, "window": "600"}),
        Case((1, 1, 900, 900, 24), {"causal": True, "softcap": 20.0, "return_lse": True}),
        Case((1, 2, 500, 700, 40), {"mask": "fp32", "over": "b1qk", "dropout": 0.1, "lengths": True}),
    ],
    "attention_qkv": [Case((4, 150, 4, 32), {"causal": True})],
    "attention_varlen": [Case((150, 90, 4, 16), {"causal": True})],
    "layer_norm": [
        Case((130, 700)),
        Case((4000, 24), {"residual": True}),
        Case((130, 700), {"residual": True}),
        Case((130, 700), {"residual": True, "weight": False, "bias": False}),
        Case((130, 700), {"parameters": "fp32", "stream": "fp32"}, mixed=True),
    ],
    "embedding": [
        Case((20, 50, 70), {"positions": "all", "vocab": 300}),
        Case((70, 16, 130), {"positions": "each", "frequent": True, "padding": True}),
        Case((300, 7, 64), {"positions": "all"}),
    ],
    "geglu": [Case((60, 1600)), Case((4000, 24), {"approximate": "tanh"})],
    "cross_entropy": [
        Case((130, 700), {"ignored": 0.2}),
        Case((4000, 24), {"reduction": "sum"}),
        Case((3, 50257), {"label_smoothing": 0.1, "reduction": "none"}),
    ],
    "gelu": [
        Case(shape, {"approximate": approximate, **bias})
        for shape in ((60, 1600), (4000, 24))
        for approximate in ("none", "tanh")
        for bias in ({}, {"bias": True})
    ],
    "rms_norm": [
        Case((130, 700)),
        Case((4000, 24), {"residual": True}),
        Case((130, 700), {"residual": True, "weight": False}),
        Case((130, 700), {"parameters": "fp32", "stream": "fp32"}, mixed=True),
    ],
    "softmax": [
        Case((3, 50257)),
        Case((2, 2, 150, 150), {"causal": True, "scale": 0.125}),
        *_masked("bool"),
        *_masked("same", scale=0.5),
        *_masked("fp32", causal=True),
        Case((2, 2, 150, 150), {"dropout": 0.3}),
        Case((2, 2, 150, 150), {"dropout": 0.3, "causal": True}),
        *_masked("fp32", dropout=0.1)[2:4],
    ],
    "rope": [
        Case((2, 12, 50, 64), {"layout": "BTHD"}),
        Case((3, 4, 90, 80), {"turning": "half", "interleaved": True, "tables": "each", "k_heads": 2}),
    ],
    "swiglu": [Case((60, 1600)), Case((4000, 24))],
}
# By our own products alone: of PyTorch's library we promise nothing.
PRODUCTS = {
    "linear": [Case((60, 1600), {"n": 450, "bias": True, "activation": "gelu"}), Case((1100, 70), {"n": 90})],
    "linear_cross_entropy": [Case((260, 260), {"n": 600})],
    "mlp": [Case((230, 290), {"m": 400, "n": 450, "bias": True})],
}
THREADED_CASES = [(op, case) for op in OPS if "cpu" in backends(op) for case in {**THREADED, **PRODUCTS}[op]]


@pytest.mark.parametrize(
    ("op", "case"), THREADED_CASES, ids=[f"{op}-{case.name}" for op, case in THREADED_CASES]
)
def test_the_number_of_threads_changes_no_bit(op: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2 and 3 threads, forward and backward; with 3 inside the bound as well."""
    if op in PRODUCTS:
        monkeypatch.setattr("fastgpt_kernels.cpu.gemm.faster", lambda dtype, m, n, k: m * n * k > 0)
    spec = registry.get(op)
    run = functools.partial(spec.function, backend="cpu")
    assert math.prod(case.shape) >= 2 * _parallel_elements()
    for dtype in (torch.bfloat16,) if case.mixed else (torch.float32, torch.bfloat16):
        made = problem(spec, case, dtype)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(made, run, made.inputs, made.output_grads))
        for name, value in found[0].items():
            assert same_bits(value, found[1][name]), f"2 threads: {dtype} {name}"
            assert same_bits(value, found[2][name]), f"3 threads: {dtype} {name}"
    report = check(op, backend="cpu", dtypes=["bf16" if case.mixed else "fp32"], cases=[case])
    assert report.ok, report


class Normed(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        y = ops.layer_norm(self.x[i], backend="cpu")  # torch's own ops would wait with two threads
        product = torch.empty(len(y), len(y))
        gemm._gemm(y, y.t(), product)
        return product


def test_kernels_run_in_the_workers_of_a_data_loader() -> None:
    """They are forked from a process whose OpenMP threads they believe in."""
    torch.set_num_threads(2)
    data = Normed(torch.randn(4, 600, 96))
    here = [data[i] for i in range(4)]  # OpenMP's threads are there now
    for workers_threads in (1, 2):
        loader = torch.utils.data.DataLoader(
            data,
            batch_size=None,
            num_workers=2,
            timeout=60,
            worker_init_fn=functools.partial(_use_threads, workers_threads),
            multiprocessing_context="fork",
        )
        for ours, theirs in zip(here, loader, strict=True):
            assert same_bits(ours, theirs)


def _use_threads(count: int, worker: int) -> None:
    torch.set_num_threads(count)


def test_kernels_run_in_several_python_threads_at_once() -> None:
    """Each has OpenMP threads of its own."""
    torch.set_num_threads(2)
    x = torch.randn(8, 600, 96, requires_grad=True)

    def work(i: int) -> list[torch.Tensor]:
        y = ops.softmax(ops.layer_norm(x[i], backend="cpu"), causal=True, backend="cpu")
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(alone, pool.map(work, range(8)), strict=True):
            assert all(map(same_bits, ours, theirs))


def _parallel_elements() -> int:
    """From how many elements on the kernels use more than one thread."""
    header = Path(__file__).parents[1] / "csrc" / "cpu" / "parallel.h"
    found = re.search(r"kParallelElements = ([\d* ]+);", header.read_text())
    assert found
    return math.prod(int(factor) for factor in found[1].split("*"))
