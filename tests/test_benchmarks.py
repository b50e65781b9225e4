"""The benchmarks are themselves tested: their statistics, their fairness, and that a wrong kernel gets no time."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import hugging_face_models
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, engines, gpt2, gpt_step, limits, patched, report, suites
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row, Run, load, slower_than_eager
from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.models.gpt import GPTConfig
from fastgpt.testing import proof
from fastgpt.testing.timing import Quantiles, Sample, Timing, measure

CPU = torch.device("cpu")


def test_every_bench_case_appears_largest_of_each_form_first() -> None:
    cases = suites.op_cases((), ("fp32", "bf16"))
    expected = sum(2 - case.mixed for spec in registry.ops() for case in spec.bench_cases)
    assert len({case.name for case in cases}) == len(cases) == expected
    sizes = [
        torch.Size(c.case.shape).numel() for c in cases if c.name.endswith("-approximate_tanh-bias fp32")
    ]
    assert len(sizes) > 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cpu_suite_has_every_width_of_the_row_ops_and_a_tiny_size(dtype: str) -> None:
    found: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for case in suites.op_cases((), (dtype,), "cpu"):
        forms = found.setdefault(case.spec.name, {})
        forms.setdefault(repr(case.case.options), set()).add(case.case.shape)
    wide = {(8192, 768), (8192, 1600), (8192, 3072), (8192, 6400), (1043, 50257), (4, 64)}
    for op, forms in {"layer_norm": 2, "gelu": 4, "softmax": 1}.items():
        assert sum(shapes == wide for shapes in found[op].values()) == forms, op
    assert suites.op_cases(("gelu",), (dtype,), "cpu")[0].case.shape == (4, 64)  # the cheap ones first
    causal = found["softmax"][repr({"causal": True, "scale": 0.125})]
    assert {shape[-1] for shape in causal} == {768, 1600, 3072, 6400, 64}
    assert {(2, 12, 1024, 1024, 64), (1, 16, 4096, 4096, 128)} < found["attention"][repr({"causal": True})]


def test_the_cpu_suite_runs_and_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = suites.OpCase(registry.get("softmax"), Case((4, 64)), "bf16")
    words = ["--suite", "cpu", "--op", "softmax", "--case", "4x64", "--allocator", "default", "--no-compile"]
    meter = mock.Mock(**{"measure.return_value": dict.fromkeys(limits.NAMES, limits.Limit(1e10, "w"))})
    with (
        mock.patch.object(suites, "op_cases", side_effect=lambda ops, dtypes, suite: [tiny]) as asked,
        mock.patch.object(limits, "LimitMeter", return_value=meter),  # its buffers are large
    ):
        assert command.main([*words, "--budget", "20", "--out", str(tmp_path)]) == 0
        assert command.main([*words, "--case", "5x64", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    assert asked.call_args.args[2] == "cpu"
    (stored,) = tmp_path.glob("cpu-*.json")  # "keep" where an earlier test has asked for that
    rows = load(stored).rows
    assert {row.pass_ for row in rows} == {"fwd", "bwd", "fwd+bwd"}
    assert rows[0].seconds is not None
    assert "of copy" in capsys.readouterr().out


SMALL = [
    (spec.name, case)
    for spec in registry.ops()
    for case in spec.suite_cpu
    if torch.Size(case.shape).numel() * case.options.get("n", 1) <= 2**16
]


@pytest.mark.parametrize(("name", "case"), SMALL, ids=[f"{name}-{case.name}" for name, case in SMALL])
def test_small_cases_can_be_posed_and_judged(name: str, case: Case) -> None:
    """Of every op that has benchmarks, also of those whose output is one number for all rows."""
    assert {op for op, _ in SMALL} == {spec.name for spec in registry.ops() if spec.suite_cpu}
    spec = registry.get(name)
    assert proof.error(proof.pose(spec, case, torch.float32, CPU), spec.function) <= 1.0


def test_a_large_case_is_measured_against_the_limit_of_its_own_rounds() -> None:
    calls: list[int] = []
    meter = mock.Mock(spec=limits.LimitMeter)
    meter.steps.side_effect = lambda names, measured: dict.fromkeys(names, (calls.append, 1e6))
    measured = [{name: {"rate": 1e9 if name == "copy" else 1e12, "way": "w"} for name in limits.NAMES}]
    options = suites.Options(CPU, compiled=False)
    case = suites.OpCase(registry.get("softmax"), Case((4, 64)), "fp32")
    for least, beside in ((1, {"copy"}), (10**9, set())):
        with mock.patch.object(suites, "LIMIT_BESIDE", least):
            rows = suites.op_rows(case, options, suites.Budget(60.0), 0.01, meter, measured)
        assert {*rows[0].limits} == beside
        assert bool(calls) == bool(beside)
        calls.clear()
    row = next(row for row in rows if row.seconds is not None)
    run_wide = {**dict.fromkeys(limits.NAMES, 1e12), "copy": 1e9}
    row.limits = {"copy": 4e9}
    own = report.fraction(row, run_wide)
    row.limits = {}
    assert own[0] == pytest.approx(report.fraction(row, run_wide)[0] / 4)


def test_a_way_to_multiply_that_is_far_behind_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {limits.PLAIN: 1.0, limits.WIDENED: 0.01}
    monkeypatch.setattr(
        limits, "measure", lambda ways, *_, **__: {way: Timing((Sample(taken[way]),), 1) for way in ways}
    )
    assert limits._worth_measuring(torch.bfloat16, CPU) == [limits.WIDENED]
    assert limits._worth_measuring(torch.float32, CPU) == [limits.PLAIN]
    taken[limits.PLAIN] = 0.03
    assert limits._worth_measuring(torch.bfloat16, CPU) == [limits.PLAIN, limits.WIDENED]


def test_a_case_checked_in_pieces_is_judged_as_the_whole() -> None:
    spec, case = registry.get("layer_norm"), Case((50, 96), {"residual": True})
    whole = proof.pose(spec, case, torch.bfloat16, CPU)
    pieces = proof.pose(spec, case, torch.bfloat16, CPU, piece_elements=700)
    assert (len(whole.pieces), len(pieces.pieces)) == (1, 8)
    assert proof.error(pieces, spec.function) == pytest.approx(proof.error(whole, spec.function), rel=1e-6)

    for name in ("x", "weight"):  # of each row, and of their sum

        def wrong(*, wrong: str = name, **inputs: Any) -> Any:
            outputs = spec.function(**inputs)
            if inputs[wrong].requires_grad:
                inputs[wrong].register_hook(lambda gradient: gradient * 1.05)
            return outputs

        assert proof.error(pieces, wrong) > 1.0


@pytest.mark.parametrize(("options", "pieces"), [({"dropout": 0.1}, 1), ({"mask": "bool", "over": "b1"}, 8)])
def test_rows_that_hang_together_are_checked_together(options: dict[str, Any], pieces: int) -> None:
    spec = registry.get("softmax")
    posed = proof.pose(spec, Case((50, 96), options), torch.float32, CPU, piece_elements=700)
    assert len(posed.pieces) == pieces
    assert proof.error(posed, spec.function) <= 1.0


def _rows(**changes: Any) -> dict[tuple[str, str], Row]:
    spec = dataclasses.replace(registry.get("gelu"), **changes)
    options = suites.Options(CPU, compiled=False)
    case = suites.OpCase(spec, Case((32, 48), {"bias": True}), "bf16")
    rows = suites.op_rows(case, options, suites.Budget(60.0), 0.01)
    return {(row.contender, row.pass_): row for row in rows}


def test_a_case_has_forward_backward_and_both_for_every_contender() -> None:
    rows = _rows()
    assert {pass_ for _, pass_ in rows} == {"fwd", "bwd", "fwd+bwd"}
    for contender in (FASTGPT, EAGER):
        row = rows[contender, "fwd+bwd"]
        assert row.seconds is not None
        assert row.error is not None
        assert row.rounds >= 5
        assert row.peak_bytes is not None
        assert row.peak_bytes >= 2 * 32 * 48 * 2  # y and dx
    assert rows[FASTGPT, "fwd"].backend in ("cpu", "torch")
    assert rows[COMPILED, "fwd"].seconds is None
    assert rows[COMPILED, "fwd"].note == "not asked for"


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_implementation_gets_no_time(factor: float) -> None:
    right = registry.get("gelu").function
    rows = _rows(function=_scaled_gradient(right, factor))
    for pass_ in ("fwd", "fwd+bwd", "bwd"):
        row = rows[FASTGPT, pass_]
        assert row.seconds is None
        assert row.error is not None
        assert row.error > 1
        assert "outside bound" in row.note
        assert rows[EAGER, pass_].seconds or "noise" in rows[EAGER, pass_].note


def test_a_baseline_outside_its_bound_is_timed_and_says_so() -> None:
    row = _rows(baseline=_scaled_gradient(registry.get("gelu").baseline, 1.05))[EAGER, "fwd+bwd"]
    assert row.seconds is not None
    assert "outside bound" in row.note


def test_the_training_step_is_checked_too() -> None:
    truth = (2.0, {"w": torch.randn(4, 4, dtype=torch.float64)})
    assert gpt_step.error(truth, truth, "fp32") == 0.0
    assert gpt_step.error((2.0, {"w": truth[1]["w"] * 1.001}), truth, "fp32") > 1
    assert gpt_step.error((2.001, truth[1]), truth, "fp32") > 1
    assert gpt_step.error((2.0, {}), truth, "fp32") == float("inf")
    assert gpt_step.error((2.0, {"w": truth[1]["w"] * float("nan")}), truth, "fp32") == float("inf")


@pytest.mark.parametrize("wrong", [False, True])
def test_gpt2_is_timed_beside_the_limit_and_only_where_it_is_right(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPTConfig(vocab_size=97, embedding_dim=32, num_heads=2, num_layers=2, max_seq_length=16)
    for name, value in {"MODEL": model, "LENGTH": 8, "CONTEXT": 6, "NEW": 2}.items():
        monkeypatch.setattr(gpt2, name, value)
    monkeypatch.setattr(
        gpt2, "measure", lambda steps, device, **how: measure(steps, device, **{**how, "seconds": 0.01})
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whether transformers is there or not
    if wrong:
        monkeypatch.setattr(gpt_step, "error", lambda *args: 5.0)
    meter = mock.Mock(spec=limits.LimitMeter)
    meter.measure.return_value = {name: limits.Limit(1e9, "w") for name in limits.NAMES}
    meter.steps.side_effect = lambda names, measured: {name: (lambda _: None, 1e6) for name in names}
    options = suites.Options(CPU, dtypes=("fp32",), compiled=False)
    (_, decode), *_, (_, step) = gpt2.jobs(options, suites.Budget(60.0), meter)
    rows = {row.contender: row for row in step(0.01)}
    assert rows[EAGER].seconds is not None
    assert (rows[FASTGPT].seconds is None) == wrong
    assert ("outside tolerance" in rows[FASTGPT].note) == wrong
    assert rows[gpt2.HUGGING_FACE].note == "transformers is not installed"
    assert rows[COMPILED].note == "not asked for"
    decoded = decode(0.01)
    assert {row.dtype for row in decoded} == {"fp32", "bf16", "int8"}
    assert decoded[0].moved > decoded[2].moved > 0


@pytest.mark.parametrize("wrong", [False, True])
def test_another_engine_is_timed_where_it_writes_the_same_texts(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(model: Any, directory: Path, batch: int, threads: int) -> Any:
        assert (directory / engines.HUGGING_FACE / "model.safetensors").exists()
        right = engines.ours(model, "fp32", batch)
        other = lambda prompts: [[(text[0] + 1) % 97, *text[1:]] for text in right(prompts)]  # noqa: E731
        return nullcontext({"fp32": other if wrong else right, "bf16": other})

    for name, value in {"PROMPT": 3, "NEW": 4, "hugging_face": theirs}.items():
        monkeypatch.setattr(engines, name, value)
    monkeypatch.setattr(
        engines, "measure", lambda steps, device, **how: measure(steps, device, **{**how, "seconds": 0.01})
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "transformers" or None)
    model = GPTConfig(vocab_size=97, embedding_dim=32, num_heads=2, num_layers=2, max_seq_length=16)
    rows = {(row.contender, row.dtype): row for row in engines.rows(model, 3, CPU, 0.01)}
    assert {kind for name, kind in rows if name == FASTGPT} == {"fp32", "bf16", "int8"}
    assert all(row.seconds for (name, _), row in rows.items() if name == FASTGPT)
    assert (rows[engines.HUGGING_FACE, "fp32"].seconds is None) == wrong
    said = "0 of 3 texts as ours in fp32, not the same work" if wrong else "3 of 3 texts as ours in fp32"
    assert rows[engines.HUGGING_FACE, "fp32"].note == said
    assert rows[engines.HUGGING_FACE, "bf16"].seconds is not None  # rounded weights say other things
    assert rows[engines.LLAMA_CPP, "fp32"].note == "llama_cpp and gguf not installed"
    assert rows[FASTGPT, "int8"].tokens == 12


@pytest.mark.parametrize("wrong", [False, True])
def test_a_patched_model_is_timed_where_it_gives_the_same(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    model = ("tiny", lambda: (hugging_face_models.model("gpt2"), hugging_face_models.inputs("gpt2")))
    monkeypatch.setitem(patched.MODELS, "patched_gpt2", model)
    monkeypatch.setattr(
        patched, "measure", lambda steps, device, **how: measure(steps, device, **{**how, "seconds": 0.01})
    )
    if wrong:
        monkeypatch.setattr(ops, "gelu", lambda x, approximate: 1.01 * x)
        monkeypatch.setattr(ops, "mlp", lambda x, *_, activation: 1.01 * x)
    options = suites.Options(CPU, dtypes=("fp32",), compiled=False)
    meter = mock.Mock(spec=limits.LimitMeter)
    (name, job), *_ = patched.jobs(options, suites.Budget(60.0), meter)
    assert name == "patched_gpt2 fp32"
    rows = {(row.contender, row.pass_): row for row in job(0.01)}
    for pass_ in ("fwd", "fwd+bwd"):
        assert rows[EAGER, pass_].seconds is not None
        assert (rows[FASTGPT, pass_].seconds is None) == wrong
        assert ("outside tolerance" in rows[FASTGPT, pass_].note) == wrong
        assert rows[COMPILED, pass_].note == "not asked for"


def test_compare_calls_only_separate_ranges_a_difference() -> None:
    before, after = _run((1.0, 0.9, 1.1)), _run((1.15, 1.05, 1.3))
    assert "2 rows in both; 0 differ" in compare.compare(before, after)
    after = _run((2.0, 1.9, 2.1))
    text = compare.compare(before, after)
    assert "2 rows in both; 1 differ" in text
    assert "1 s -> 2 s, 2.00 times as slow" in text
    assert "0.50" not in text
    assert "2.00 times as fast" in compare.compare(after, before)


def test_stored_run_gives_report_plot_and_readme(tmp_path: Path) -> None:
    path = _run((2.0, 1.9, 2.1)).save(tmp_path)
    stored = load(path)
    assert [row.key for row, _ in slower_than_eager(stored.rows)] == [
        ("gelu", "4x8-bias", "fp32", "fwd", FASTGPT)
    ]
    text = report.markdown(stored)
    assert "2 s (1.9 s–2.1 s)" in text
    assert "| 0.25 of copy | 0.50 |" in text
    assert "2.00 times as long" in text
    assert "gelu 64x3072 bf16: the budget is spent" in text
    assert "| gelu | 4x8-bias | 0.50 / – (0.25) |" in report.readme(stored)
    pytest.importorskip("matplotlib")
    report.plot(stored, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"format": 999}'])
def test_a_file_that_is_no_result_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert command.main(["readme", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def _scaled_gradient(function: Callable[..., torch.Tensor], factor: float) -> Callable[..., torch.Tensor]:
    """Right forward, gradients scaled."""

    def wrong(**inputs: Any) -> torch.Tensor:
        y = function(**inputs)
        if y.requires_grad:
            y.register_hook(lambda dy: dy * factor)
        return y

    return wrong


def _run(ours: tuple[float, float, float]) -> Run:
    """One case, ours against an eager PyTorch that takes a second; the copy limit is 1 GB/s."""
    names = {"copy": 1e9, "read": 1e9, "float32": 1e9, "bfloat16": 1e9}
    measured: list[dict[str, Any]] = [
        {"when": "start", **{n: {"rate": r, "way": "w"} for n, r in names.items()}}
    ]
    environment = {
        "date": "2026-01-01T00:00:00+00:00",
        "allocator": "default",
        "device": "cpu",
        "cpu": "a cpu",
    }
    environment |= {"threads": "2", "torch": "2.13.0"}
    rows = [
        Row(
            "gelu", "4x8-bias", "fp32", "fwd", FASTGPT, Quantiles(*ours), backend="cpu", moved=5e8, error=0.5
        ),
        Row("gelu", "4x8-bias", "fp32", "fwd", EAGER, Quantiles(1.0, 0.95, 1.05), moved=5e8),
        Row("gelu", "4x8-bias", "fp32", "fwd", COMPILED, note="no C++ compiler for torch.compile"),
    ]
    return Run(
        environment, {"suite": "quick"}, measured, rows, ["gelu 64x3072 bf16: the budget is spent"], 1.0
    )
