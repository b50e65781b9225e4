"""The harness on kernels that nobody here wrote: the adapters, and the table of `python -m benchmarks foreign`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import foreign, foreign_read, foreign_table
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing import Failure, check
from fastgpt.testing.cli import load
from fastgpt.testing.report import HAZARDS, Report

ROOT = Path(__file__).parents[1]
needs_liger = pytest.mark.skipif(foreign.missing() is not None, reason="needs liger-kernel and Triton")


def test_pytorchs_ops_have_names_that_a_line_can_repeat() -> None:
    for spec in registry.ops():
        name = f"pytorch_{spec.name}"
        function = getattr(foreign, name)
        assert function is getattr(foreign, name) is load(f"benchmarks.foreign:{name}")
        assert function.__name__ == name
    with pytest.raises(AttributeError):
        _ = foreign.pytorch_layer_nrom
    with pytest.raises(NotImplementedError, match="dropout_p"):
        foreign.pytorch_softmax(x=torch.zeros(2, 2), dropout_p=0.1)


def test_pytorchs_swiglu_is_exact_in_fp32_and_rounds_twice_in_bf16() -> None:
    reports = [foreign_table.one("pytorch_swiglu", "swiglu", [dtype], "cpu") for dtype in ("fp32", "bf16")]
    (right,), (wrong,) = (list(foreign_table.lines_of(report)) for report in reports)
    assert right.startswith("| swiglu | pytorch_swiglu | fp32 | ")
    assert right.endswith("| pass |")
    assert wrong.endswith("| **bound 9** |")
    assert list(foreign_table.failures_of(reports[0], "0.8.5")) == []
    (said,) = foreign_table.failures_of(reports[1], "0.8.5")
    assert "rounded to x's dtype before the product" in said
    assert (
        "\nfastgpt check --op swiglu --implementation benchmarks.foreign:pytorch_swiglu --dtype bf16" in said
    )


def test_every_function_and_every_dtype_has_a_line() -> None:
    named = dict(foreign_table.functions(None))
    assert {op for name, op in named.items() if name.startswith("pytorch_")} == {
        s.name for s in registry.ops()
    }
    assert set(foreign.LIGER) < set(named)
    assert list(dict(foreign_table.functions(["geglu"]))) == ["liger_geglu", "pytorch_geglu"]
    report = Report("gelu", "liger_gelu", cases={"5x33": Case((5, 33))}, path="benchmarks.foreign:liger_gelu")
    report.failures.append(Failure("5x33", "bf16", "raised", "KeyError: 3"))
    report.skipped.append(("7x1", "bf16", "no"))
    assert list(foreign_table.lines_of(report)) == [
        "| gelu | liger_gelu | bf16 | 1 (1) | - | - | - | **raised 1** |"
    ]
    assert "- read: not yet\n" in next(foreign_table.failures_of(report, foreign_read.LIGER_VERSION))


def test_what_was_read_is_told_of_that_version_only() -> None:
    report = Report("softmax", "liger_softmax")
    assert "16 bits" in foreign_table.read(report, "bound", foreign_read.LIGER_VERSION)
    assert foreign_table.read(report, "bound", "0.9").startswith("not yet, of this version")
    for name, hazard in foreign_read.READ:
        assert name in foreign.LIGER or name.removeprefix("pytorch_") in {s.name for s in registry.ops()}
        assert hazard in HAZARDS


def test_without_liger_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the command sets nothing for the tests after it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["foreign", "--out", str(tmp_path)]) == 2
    assert "benchmarks: liger-kernel is not installed: pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, w: foreign.liger_layer_norm(x, w), "weight and bias"),
        (lambda x, w: foreign.liger_rms_norm(x, residual=x), "residual: it needs a weight"),
        (lambda x, w: foreign.liger_rms_norm_gemma(x, w, residual=x.double()), "residual: it needs a weight"),
        (lambda x, w: foreign.liger_softmax(x, causal=True), "causal"),
        (lambda x, w: foreign.liger_geglu(x, x), "approximate"),
    ],
)
def test_what_liger_has_no_argument_for_is_left_out(call: Any, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        call(torch.ones(2, 3), torch.ones(3))


@needs_liger
def test_liger_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton interprets all kernels or none."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [
        "foreign",
        "--op",
        "layer_norm",
        "--op",
        "cross_entropy",
        "--dtype",
        "fp32",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("foreign-*.md")
    text = path.read_text()
    (norm,) = (
        line for line in text.splitlines() if line.startswith("| layer_norm | liger_layer_norm | fp32")
    )
    assert float(norm.split("|")[5]) < 1.0
    (loss,) = (line for line in text.splitlines() if line.startswith("| cross_entropy | liger_cross_entropy"))
    assert "input mutated" in loss
    assert "layout" in loss
    assert (
        "TRITON_INTERPRET=1 fastgpt check --op cross_entropy --implementation benchmarks.foreign:liger_cross"
        in text
    )


@needs_liger
def test_ligers_kernels_on_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = check("softmax", foreign.liger_softmax, dtypes=["fp32"], cases=["5x33"])
    assert "need TRITON_INTERPRET=1" in report.failures[0].detail
