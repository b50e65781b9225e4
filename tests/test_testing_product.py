"""`fastgpt.testing` for a kernel author: what a failure says, the pytest decorator, the worked example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import testing
from fastgpt._core.spec import Case
from fastgpt.testing import Failure, OneCase, check, example
from fastgpt.testing.explain import explain, pattern
from fastgpt.testing.report import Report, repro

ROOT = Path(__file__).parents[1]
FEW = ["5x33", "33x64", "9x257-mean_1000.0"]


def _result(*shape: int) -> tuple[Tensor, Tensor]:
    """(exact, E) of a result: honest fp32."""
    exact = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.3
    return exact, 16 * 2.0**-24 * (exact.abs() + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(100,), (7, 100)])
def test_everything_times_a_number_is_said(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact, error = _result(*shape)
    assert explain(exact.to(dtype), exact, error) == ""
    assert "all of it is 1.02" in explain((exact * 1.02).to(dtype), exact, error)
    assert "all of it is -1 times" in explain((-exact).to(dtype), exact, error)
    assert "times" not in explain((exact + 0.1 * torch.randn_like(exact)).to(dtype), exact, error)


def test_misses_in_one_place_are_located() -> None:
    exact, error = _result(8, 100)

    def said(rows: slice, columns: slice, factor: float = 0.0) -> str:
        got = exact.float()
        got[rows, columns] *= factor
        return explain(got, exact, error)

    everything = slice(None)
    tail = said(everything, slice(97, None))
    assert tail == "24 of 800 elements miss; only in the last 3 of 100 columns: a tail; each is 0 there"
    assert "only in columns 32 to 47 of 100" in said(everything, slice(32, 48))
    assert "only in row 7 of 8" in said(slice(7, None), everything)
    assert "each of them is 3 times the exact result" in said(slice(2, 4), everything, 3.0)
    assert "only in" not in said(everything, everything, 1.5)
    assert "only in" not in said(slice(None, None, 2), slice(None, None, 3))  # here and there


def test_a_result_that_is_another_tensor_is_recognised() -> None:
    exact, error = _result(8, 100)
    others = {"x": torch.randn(8, 100), "w": torch.randn(100), "dy": torch.randn(8, 100)}
    assert explain(others["dy"], exact, error, others).endswith("each of them is the element of dy")
    assert explain(others["x"] * 0.5, exact, error, others).endswith(
        "each of them is 0.5 times the element of x"
    )
    partly = torch.where(torch.arange(8)[:, None] < 6, others["x"], exact.float())
    assert explain(partly, exact, error, others).endswith("each of them is the element of x")
    assert "element of" not in explain(torch.randn(8, 100), exact, error, others)


def test_roundings_are_recognised() -> None:
    exact, error = _result(8, 100)
    assert "every element is a torch.bfloat16 number" in explain(exact.bfloat16().float(), exact, error)
    other = torch.rand(8, 100, dtype=torch.float64) + 1.0
    twice = (exact.bfloat16().double() * other).bfloat16()
    assert "units in the last place: rounded more than once" in explain(twice, exact * other, error * other)


def test_what_the_failed_cases_have_in_common() -> None:
    plain, mean, odd = Case((4, 64)), Case((9, 64), {"mean": 100.0}), Case((5, 33))
    every = [(case, dtype) for case in (plain, mean, odd) for dtype in ("fp32", "bf16")]

    def common(*failed: tuple[Case, str]) -> str:
        return pattern("layer_norm", failed, [call for call in every if call not in failed])

    assert common((mean, "fp32"), (mean, "bf16")).startswith(
        "exactly the cases with mean (a variance as E[x²]"
    )
    assert common(*(call for call in every if call[1] == "bf16")) == "exactly the cases in bf16"
    assert common((mean, "bf16")).endswith("bits), in bf16")
    assert common((plain, "fp32"), (odd, "bf16")) == ""
    assert common() == common(*every) == ""
    widths = [(Case((3, n)), "fp32") for n in (33, 70, 64, 96)]
    assert (
        pattern("gelu", widths[:2], widths[2:])
        == "exactly the cases whose last dimension is no multiple of 4"
    )
    assert pattern("gelu", [(Case((3, 0)), "fp32")], widths) == "exactly the cases with no elements"


def test_a_failure_of_check_says_what_it_likely_means() -> None:
    def scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = example.two_pass(x, weight, bias)
        if bias.requires_grad:
            bias.register_hook(lambda db: db * 1.02)
        return y

    report = check("layer_norm", scaled, dtypes=["fp32"], cases=["33x64"])
    (failure,) = report.telling["bound"]
    assert failure.meaning == "all 64 elements miss; all of it is 1.02 times the exact result"
    assert failure.meaning in str(report)
    assert "where the bound is missed already, so are: " in str(report)
    assert "fastgpt check" not in str(report)  # a local function has no name to repeat it by


def test_a_kernel_that_writes_over_gradients_spoils_no_other_check() -> None:
    """Problems are shared between checks; in-place kernels of others showed that they were not safe."""

    def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _Overwrites.apply(example.two_pass(x, weight, bias))

    calls: Any = {"dtypes": ["fp32"], "cases": ["5x33"]}
    assert "input mutated" in check("layer_norm", in_place, **calls).hazards
    report = check("layer_norm", example.two_pass, **calls)
    assert report.ok, report


def test_a_gradient_in_the_memory_of_an_input_is_judged_before_it_is_written_over() -> None:
    report = check(
        "swiglu", lambda gate, up: _GradientInInput.apply(gate, up), dtypes=["fp32"], cases=["5x33"]
    )
    assert {"alias", "input mutated"} <= report.hazards
    assert all(row.kernel.ok for row in report.rows)
    assert len(report.rows) == 3


class _Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = dy.clone()
        dy.data.zero_() if dy.is_contiguous() else None
        return dx


class _GradientInInput(torch.autograd.Function):
    """SwiGLU whose backward writes dgate over gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        dgate, dup = dy * up * (s + gate * s * (1 - s)), dy * gate * s
        gate.data.copy_(dgate)
        return gate.view(gate.shape), dup


def test_the_line_that_repeats_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    failure = Failure("5x33", "bf16", "bound", "")
    report = check("layer_norm", example.one_pass, dtypes=["fp32"], cases=["9x257-mean_1000.0"])
    line = "fastgpt check --op layer_norm --implementation fastgpt.testing.example:one_pass --dtype"
    assert f"{line} fp32 --case 9x257-mean_1000.0" in str(report)
    assert repro(report, failure) == f"{line} bf16 --case 5x33"
    assert repro(Report("gelu", "my"), failure) == ""
    assert repro(report, failure._replace(case="3x3")) == ""  # a case of one's own
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert repro(report, failure).startswith("TRITON_INTERPRET=1 fastgpt check")
    assert repro(Report("gelu", "backend cpu"), failure).startswith("fastgpt check")


def test_the_example_passes_the_usual_test_and_fails_the_check() -> None:
    example.usual_test()
    report = check("layer_norm", example.one_pass, dtypes=["fp32"], thorough=False)
    assert {failure.case for failure in report.failures} == {"9x257-mean_1000.0"}
    assert "exactly the cases with mean (a variance as E[x²] − mean²" in str(report)


@testing.cases("layer_norm", dtypes=["fp32", torch.bfloat16], cases=FEW)
def test_the_example_without_its_bug(case: OneCase) -> None:
    assert case.check(example.two_pass).ok


def test_a_decorated_function_is_a_test_for_every_case(request: pytest.FixtureRequest) -> None:
    ids = [item.name for item in request.session.items if "without_its_bug" in item.name]
    if len(ids) > 1:  # not picked by name
        assert ids == [
            f"test_the_example_without_its_bug[{case}-{d}]" for case in FEW for d in ("fp32", "bf16")
        ]
    (all_cases,) = (mark.args[1] for mark in [testing.cases("gelu").mark])
    assert {one.values[0].dtype for one in all_cases} == {"fp32", "bf16", "fp16"}


def test_a_kernel_authors_file(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import fastgpt\n"
        "from fastgpt.testing import example\n\n"
        "@fastgpt.testing.cases('layer_norm', dtypes=['fp32'],\n"
        "                       cases=['5x33', '9x257-mean_1000.0', '6x100-residual'])\n"
        "def test_mine(case):\n"
        "    case.check(example.one_pass)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "pytest", "-rs", "-v", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in said
    assert "test_mine.py::test_mine[5x33-fp32] PASSED" in said
    assert "not taken: has arguments that it does not take" in said
    assert "elements miss" in said
    assert "or: python -m pytest 'test_mine.py::test_mine[9x257-mean_1000.0-fp32]'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "layer_nrom"}, "op: expected one of .*layer_norm"),
        ({"op": "gelu", "dtypes": ["fp8"]}, "dtype: expected one of fp32"),
        ({"op": "gelu", "cases": ["5x34"]}, "case: expected one of .*5x33"),
        ({"op": "gelu", "cases": []}, "cases: expected at least one case and dtype, got none"),
    ],
)
def test_a_wrong_name_in_the_decorator_is_a_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        testing.cases(**arguments)
