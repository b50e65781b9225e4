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
from benchmarks import environment, gpt_step, suites
from benchmarks.results import COMPILED, EAGER, FASTGPT
from fastgpt.testing import proof, rotation
from fastgpt.testing.timing import Step

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cpu")
DTYPES = ("fp32", "bf16")
OP_CASES = {case.name: case for case in suites.op_cases((), DTYPES)}
CONTENDERS = (FASTGPT, EAGER, COMPILED)


@pytest.fixture(scope="module", autouse=True)
def _allocator() -> None:
    fastgpt.keep_large_blocks()


@functools.lru_cache(maxsize=1)  # the tests of one case follow one another
def prepared(name: str) -> tuple[proof.Posed, list[dict[str, Any]], Callable[..., Any]]:
    case = OP_CASES[name]
    problem = proof.pose(case.spec, case.case, case.dtype, DEVICE)
    sets, _ = rotation.how_many(rotation.tensor_bytes(problem.inputs.values()), rotation.caches(DEVICE))
    torch._dynamo.reset()
    compiled = torch.compile(case.spec.baseline, dynamic=False)
    return problem, rotation.copies(problem.inputs, sets, problem.leaves), compiled


def parameters() -> Iterator[Any]:
    for case, pass_, contender in itertools.product(OP_CASES.values(), ("fwd", "fwd+bwd"), CONTENDERS):
        yield pytest.param(case, pass_, contender, id=f"{case.name} {pass_} {contender}".replace(" ", "-"))


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=2, disable_gc=True)
@pytest.mark.parametrize(("case", "pass_", "contender"), list(parameters()))
def test_op(benchmark: Any, case: suites.OpCase, pass_: str, contender: str) -> None:
    if contender == COMPILED:
        _needs_compiler()
    benchmark.group = f"{case.name} {pass_}"
    problem, inputs, compiled = prepared(case.name)
    function = {FASTGPT: case.spec.function, EAGER: case.spec.baseline, COMPILED: compiled}[contender]
    error = proof.error(problem, function)
    benchmark.extra_info["error as a fraction of the bound"] = error
    if contender == FASTGPT:
        assert error <= 1.0, "not timed: outside its error bound on this case"
    step = rotation.passes_of(function, inputs, problem.leaves, list(problem.output_grads.values()))[pass_]
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
    error = gpt_step.checked(module, call, dtype, DEVICE)
    if contender == FASTGPT:
        assert error <= 1.0, "not timed: outside its tolerance"
    _time(benchmark, gpt_step.training_step(module, call, batches, dtype), len(batches))


def _time(benchmark: Any, step: Step, sets: int) -> None:
    indices = itertools.cycle(range(sets))
    benchmark(lambda: step(next(indices)))


def _needs_compiler() -> None:
    if environment.cxx_compiler() is None:
        pytest.skip("no C++ compiler for torch.compile")
