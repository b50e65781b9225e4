"""`fastgpt check`: table, exit code, a user's own function, wrong names."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.testing.cli import run_check

MINE = """
import torch

def good(x, weight=None, bias=None, eps=1e-5):
    y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], None, None, eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)

def bad(x, weight=None, bias=None, eps=1e-5):
    return good(x, weight, bias, eps) * 1.02

def one_case(x, weight=None, bias=None, eps=1e-5):
    return good(x, weight, bias, eps) * (1.0 if x.shape[-1] != 1600 else 1.02)

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_norms.py").write_text(MINE)
    (tmp_path / "needs.py").write_text("import not_there_at_all")
    (tmp_path / "syntax.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("raise KeyError('two\\nlines')")
    monkeypatch.chdir(tmp_path)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("gelu", "cpu", "fp32", case="37x1600-bias") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "op"
    assert "PyTorch error" in header
    assert [row.split()[:4] for row in rows] == [
        ["gelu", "cpu", "fp32", name] for name in ("y", "dx", "dbias")
    ]
    assert all(row.endswith("37x1600-bias") for row in rows)


def test_all_backends_of_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("layer_norm", dtype="bf16", case="5x33") == 0
    assert {row.split()[1] for row in capsys.readouterr().out.splitlines()[1:]} == {
        "cpu",
        "torch",
        "reference",
    }


@pytest.mark.usefixtures("mine")
def test_a_function_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("layer_norm", dtype="bf16", implementation="my_norms:good", case="5x33") == 0
    assert "good" in capsys.readouterr().out
    assert run_check("layer_norm", dtype="bf16", implementation="my_norms:bad", case="5x33") == 1
    printed = capsys.readouterr().out
    assert "MISS" in printed
    assert "FAILED 5x33 bf16: bound" in printed
    assert "fastgpt check --op layer_norm --implementation my_norms:bad --dtype bf16 --case 5x33" in printed


@pytest.mark.usefixtures("mine")
def test_one_bad_case_among_all_is_found_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("layer_norm", dtype="fp32", implementation="my_norms:one_case") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all("7x1600" in line for line in failed)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "layer_nrom"}, "op: expected one of .*'layer_nrom'"),
        ({"backend": "cdpu"}, "backend: expected one of .*'cdpu'"),
        ({"dtype": "fp8"}, "dtype: expected one of .*'fp8'"),
        ({"op": "gelu", "case": "1x2x3"}, "case: no case '1x2x3' of gelu"),
        ({"op": "gelu", "backend": "triton"}, "backend: triton cannot run gelu: no "),
        ({"implementation": "my_norms:good"}, "expected an op"),
        ({"op": "layer_norm", "implementation": "my_norms:good", "backend": "cpu"}, "backend: expected none"),
        ({"op": "layer_norm", "implementation": "my_norms"}, "expected module:function, got 'my_norms'"),
        ({"op": "layer_norm", "implementation": "no_such:f"}, "no module 'no_such'"),
        (
            {"op": "gelu", "implementation": "needs:f"},
            "needs cannot be imported: ModuleNotFoundError: No module",
        ),
        ({"op": "gelu", "implementation": "syntax:f"}, "syntax cannot be imported: SyntaxError: "),
        ({"op": "gelu", "implementation": "raises:f"}, "raises cannot be imported: KeyError: "),
        ({"op": "layer_norm", "implementation": "my_norms:f"}, "my_norms has no function 'f'"),
        ({"op": "layer_norm", "implementation": "my_norms:number"}, "my_norms has no function 'number'"),
    ],
)
def test_a_wrong_name_is_one_line(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        run_check(**arguments)
    assert "\n" not in str(raised.value)


HALVED = """
from fastgpt.reference.gelu import gelu

def half(x, bias=None, approximate="none"):
    return 0.5 * gelu(x, bias, approximate=approximate)
"""


def test_the_printed_repro_runs_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "halved_gelu.py").write_text(HALVED)
    monkeypatch.chdir(tmp_path)
    args = ["--op", "gelu", "--dtype", "fp32", "--implementation", "halved_gelu:half"]
    assert cli.main(["check", *args]) == 1
    repro = next(line for line in capsys.readouterr().out.splitlines() if "fastgpt check" in line)
    command = shlex.split(repro)
    assert cli.main(command[1:]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all(line.split()[1] == command[-1] for line in failed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("{}['key']", "KeyError: 'key'"),
    ],
)
def test_a_broken_module_of_the_users_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    (tmp_path / "broken_module.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--op", "gelu", "--implementation", "broken_module:f"]) == 2
    line = capsys.readouterr().err.rstrip("\n")
    assert "\n" not in line
    assert f"implementation: broken_module cannot be imported: {message}" in line
