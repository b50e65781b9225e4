"""The cases of the quick suite under pytest-benchmark: `pytest benchmarks --benchmark-only [-k "not compiled"]`.

A group per case. Contenders run one after another here, so ratios are less sure than those of `python -m benchmarks`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastgpt
from benchmarks import buffers, environment, gpt_step, suites
from benchmarks.proof import Truth
from benchmarks.results import COMPILED, EAGER, FASTGPT
from benchmarks.timing import Step

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cpu")
DTYPES = ("fp32", "bf16")
OP_CASES = suites.op_cases((), DTYPES)
CONTENDERS = (FASTGPT, EAGER, COMPILED)


@pytest.fixture(scope="module", autouse=True)
def _allocator() -> None:
    fastgpt.keep_large_blocks()


@functools.lru_cache(maxsize=1)  # the tests of one case follow one another
def prepared(case: suites.OpCase) -> tuple[Truth, list[dict[str, Any]], Callable[..., Any]]:
    inputs = case.spec.make_inputs(case.case, case.dtype, suites.Draw(0, DEVICE))
    truth = Truth(case.spec, inputs, case.dtype)
    sets, _ = buffers.rotation(buffers.tensor_bytes(inputs.values()), buffers.caches(DEVICE))
    torch._dynamo.reset()
    return (
        truth,
        buffers.copies(inputs, sets, truth.gradients),
        torch.compile(case.spec.baseline, dynamic=False),
    )


def parameters() -> Iterator[Any]:
    for case, pass_, contender in itertools.product(OP_CASES, ("fwd", "fwd+bwd"), CONTENDERS):
        yield pytest.param(case, pass_, contender, id=f"{case.name} {pass_} {contender}".replace(" ", "-"))


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=2, disable_gc=True)
@pytest.mark.parametrize(("case", "pass_", "contender"), parameters())
def test_op(benchmark: Any, case: suites.OpCase, pass_: str, contender: str) -> None:
    if contender == COMPILED:
        _needs_compiler()
    benchmark.group = f"{case.name} {pass_}"
    truth, inputs, compiled = prepared(case)
    function = {FASTGPT: case.spec.function, EAGER: case.spec.baseline, COMPILED: compiled}[contender]
    error = truth.error(function)
    benchmark.extra_info["error as a fraction of the bound"] = error
    if contender == FASTGPT:
        assert error <= 1.0, "not timed: outside its error bound on this case"
    step = suites.passes_of(function, inputs, truth.gradients, truth.output_gradients)[pass_]
    _time(benchmark, step, len(inputs))


@pytest.mark.benchmark(min_rounds=5, max_time=1.0, warmup=True, warmup_iterations=1, disable_gc=True)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_step(benchmark: Any, dtype: str, contender: str) -> None:
    if contender == COMPILED:
        _needs_compiler()
    benchmark.group = f"{gpt_step.OP} {dtype}"
    module, call = gpt_step.contender(contender, DEVICE)
    batches = gpt_step.random_batches(DEVICE)
    error = gpt_step.checked(module, call, batches[0], dtype)
    if contender == FASTGPT:
        assert error <= 1.0, "not timed: outside its tolerance"
    _time(benchmark, gpt_step.training_step(module, call, batches, dtype), len(batches))


def _time(benchmark: Any, step: Step, sets: int) -> None:
    indices = itertools.cycle(range(sets))
    benchmark(lambda: step(next(indices)))


def _needs_compiler() -> None:
    if environment.cxx_compiler() is None:
        pytest.skip("no C++ compiler for torch.compile")
