"""`make gpu` rehearsed without a GPU: every suite leaves its rows, and a part that fails loses only itself."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checking, contest, fake_cuda, memory, races, record, sanitizer, summary, training
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.schedule import Outcome, Part, run_parts
from benchmarks.results import EAGER, FASTGPT, Row, slower_than_eager
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Case, Draw
from fastgpt.testing import Failure, Report, check
from fastgpt.testing.cli import repro, run_check
from fastgpt.testing.inputs import leaf_names
from fastgpt.testing.timing import Quantiles, Sample, Step, WallClock, measure

ROOT = Path(__file__).parents[1]
SUITES = {"small": "layer_norm", "memory": "softmax", "attention": "attention", "decode": "attention"}

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    words = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), "--budget", "240"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTGPT_")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "\n".join(f"{path.name}\n{path.read_text()[-3000:]}" for path in out.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{logs}"
    return out


@pytest.mark.parametrize("suite", [*SUITES, "training"])
def test_every_suite_times_ours_and_pytorchs(rehearsed: Path, suite: str) -> None:
    run, _ = record.load(rehearsed / f"{suite}.jsonl")
    assert not run.not_run
    assert run.environment["torch"] == torch.__version__
    timed = {(row.op, row.pass_, row.contender) for row in run.rows if row.seconds}
    op, pass_ = ("gpt_step", "step") if suite == "training" else (SUITES[suite], "fwd")
    contenders = {FASTGPT, EAGER}
    if suite in ("attention", "decode"):
        contenders |= {"sdpa flash", "sdpa cudnn", "sdpa efficient"}
    if suite == "attention":
        contenders.add("flex compiled")
    if suite == "training":
        contenders = set(training.CONTENDERS)
    assert {(op, pass_, name) for name in contenders} <= timed
    if suite in ("small", "memory", "attention"):
        assert (op, "fwd+bwd", FASTGPT) in timed
    ours = [row for row in run.rows if row.contender == FASTGPT]
    assert all(row.error is not None and row.error <= 1.0 for row in ours), [row.note for row in ours]
    assert {entry["when"] for entry in run.limits} >= {"start"}


def test_all_contenders_of_the_training_step_learn_alike(rehearsed: Path) -> None:
    found = {f["contender"]: f["losses"] for f in record.load(rehearsed / "training.jsonl")[1]}
    assert set(found) == set(training.CONTENDERS)
    for losses in found.values():
        assert len(losses) == training.LOSSES
        assert losses == pytest.approx(found[EAGER], abs=training.LOSS_TOLERANCE)


def test_the_check_judges_the_gpu_backends(rehearsed: Path) -> None:
    found = [f for path in rehearsed.glob("check-*.jsonl") for f in record.load(path)[1]]
    assert {f["backend"] for f in found} >= {"triton"}
    assert all(f["ok"] and 0.0 < f["ratio"] <= 1.0 for f in found)


def test_races_cover_every_op(rehearsed: Path) -> None:
    found = record.load(rehearsed / "races.jsonl")[1]
    assert {f["op"] for f in found} == {spec.name for spec in registry.ops()}
    assert all(f["ok"] and f["repeats"] for f in found)


def test_the_archive_holds_report_results_plots_and_logs(rehearsed: Path) -> None:
    with tarfile.open(rehearsed / command.ARCHIVE) as tar:
        names = {name.removeprefix("fastgpt-gpu/") for name in tar.getnames()}
    parts = {part.name for part in command.parts_of(command.parse(["--dry"]), rehearsed)}
    assert len(parts) >= 5
    assert {f"{part}.log" for part in parts} <= names
    assert {"report.md", "memory.json", "memory.md", "attention.json", "training.json"} <= names
    text = (rehearsed / "report.md").read_text()
    for heading in ("## Parts", "## Check", "## memory", "## attention", "## training", "## Races"):
        assert heading in text
    assert "A rehearsal" in text
    pytest.importorskip("matplotlib")
    assert {"memory.png", "attention.png"} <= names


def test_a_part_that_crashes_or_hangs_loses_only_itself(tmp_path: Path) -> None:
    found = {"kind": "race", "ok": True, "op": "o", "case": "c", "backend": "b", "differing": {}}
    row = json.dumps({"finding": found})
    write = f"f = open({str(tmp_path)!r} + '/' + NAME, 'w'); f.write({row + chr(10)!r}); f.flush()"

    def part(name: str, then: str) -> Part:
        return Part(name, (sys.executable, "-c", write.replace("NAME", repr(f"{name}.jsonl")) + then), 1.0)

    parts = [
        part("crashes", "; import os; os.abort()"),
        part("hangs", '; f.write(\'{"row": {"op\'); f.flush(); import time; time.sleep(60)'),
        part("works", ""),
    ]
    outcomes = run_parts(parts, tmp_path, 6.0, {}, grace=0.5)
    assert [outcome.ok for outcome in outcomes] == [False, False, True]
    assert "crashed" in outcomes[0].what
    assert "killed" in outcomes[1].what
    for name in ("crashes", "hangs", "works"):  # what was found before is kept, half a line is not
        assert len(record.load(tmp_path / f"{name}.jsonl")[1]) == 1
    summary.write(tmp_path, outcomes, dry=False)
    assert summary.verdict(tmp_path, outcomes).startswith("FAILED")
    assert (
        summary.verdict(tmp_path, outcomes[1:])
        == "incomplete: 0 calls not judged; parts that did not end: hangs"
    )


def test_side_by_side_all_run_and_time_is_kept(tmp_path: Path) -> None:
    sleep = (sys.executable, "-c", "import time; time.sleep(0.3)")
    parts = [Part(f"p{i}", sleep, 1.0, group="g") for i in range(4)]
    outcomes = run_parts(parts, tmp_path, 20.0, {}, workers=4)
    assert [outcome.ok for outcome in outcomes] == [True] * 4
    assert run_parts([Part("late", sleep, 1.0)], tmp_path, 0.0, {})[0].what == "no time left"


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    parts = [Part("works", (sys.executable, "-c", ""), 1.0)]
    parts.append(Part("sleeps", (sys.executable, "-c", "import time; time.sleep(60)"), 1.0))
    outcomes: list[Outcome] = []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_parts(parts, tmp_path, 60.0, {}, outcomes=outcomes)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert [(outcome.name, outcome.what) for outcome in outcomes] == [
        ("works", "ok"),
        ("sleeps", "interrupted"),
    ]


def test_every_op_is_checked_raced_and_sanitized() -> None:
    """By the lists of the real run; an op is on them because it is registered."""
    ops = {spec.name for spec in registry.ops()}
    parts = [part.name for part in command.parts_of(command.parse([]), ROOT)]
    judged = {tuple(name.split("-")[1:3]) for name in parts if name.startswith("check-")}
    assert judged == {(b, op) for b in command.BACKENDS for op in ops if registry.is_written(op, b)}
    assert {f"matrix-{op}" for op in ops} | {"large"} <= set(parts)
    shards = {
        (s, b) for s in range(99) for b in ("triton",) if f"check-{b}-attention-{s}of" in " ".join(parts)
    }
    assert len(shards) == command.shards()["attention"] > 1
    raced = {(spec.name, case.name) for spec, case, _ in races.cases()}
    for spec in registry.ops():
        mine = [case for case in spec.cases if (spec.name, case.name) in raced]
        assert {frozenset(case.options) for case in mine} >= {
            frozenset(case.options) for case in spec.cases if math.prod(case.shape) > 20
        }
        assert {case.name for case in spec.bench_cases} <= {name for op, name in raced if op == spec.name}
    assert any(
        case.shape[2] == 1 < case.shape[3] for spec, case, _ in races.cases() if spec.name == "attention"
    )


def test_the_matrix_of_an_op_is_its_own() -> None:
    """pytest's -k finds "attention" in the names of all its forms."""
    chosen = {op: command.matrix_part(op, False, "").command[-1] for op in command.shards()}
    assert chosen["attention_qkv"].startswith("attention_qkv and not test_case")
    for other in ("attention_qkv", "attention_varlen"):
        assert f" and not {other} and " in chosen["attention"]


def test_a_refusal_or_nothing_judged_is_no_success() -> None:
    report = Report("gelu", "backend triton")
    assert not checking.verdict(report)["ok"]
    report.skipped.append(("5x33", "bf16", "needs a newer GPU"))
    assert checking.verdict(report) == {"ok": False, "failures": ["refused: needs a newer GPU"]}
    judged = check("gelu", backend="torch", dtypes=["bf16"], cases=["5x33"], thorough=False)
    assert checking.verdict(judged)["ok"]


def test_what_time_did_not_allow_is_incomplete(tmp_path: Path) -> None:
    machine = Gpu.__new__(Gpu)
    machine.device = torch.device("cpu")
    machine.backends = lambda op: ["torch"]  # type: ignore[method-assign]
    recorder = record.Recorder(tmp_path / "check.jsonl", {}, machine.device)
    ended = [Outcome("check", "ok", 1.0)]
    assert summary.verdict(tmp_path, ended) == summary.PROVEN
    checking.run("torch", "gelu", "0of1", machine, recorder, Budget(-1.0))
    assert re.match(r"incomplete: [1-9]\d+ calls", summary.verdict(tmp_path, ended))
    assert summary.verdict(tmp_path, [Outcome("check", "killed after 9 s", 9.0)]).startswith("incomplete")
    recorder.finding(kind="race", ok=False)
    assert summary.verdict(tmp_path, ended).startswith("FAILED")


CLEAN = "========= ERROR SUMMARY: 0 errors\n"
SAID = [
    (0, f"{sanitizer.DONE} 4 of 4, 0 failed\n{CLEAN}", True),
    (0, f"{sanitizer.DONE} 4 of 4, 0 failed\n", False),  # the tool did not say
    (0, f"{sanitizer.DONE} 4 of 4, 0 failed\n========= ERROR SUMMARY: 2 errors\n", False),
    (0, f"{sanitizer.DONE} 3 of 4, 1 failed\n{CLEAN}", False),
    (0, f"{sanitizer.DONE} 0 of 4, 0 failed\n{CLEAN}", False),
    (1, f"{sanitizer.DONE} 4 of 4, 0 failed\n{CLEAN}", False),
    (0, CLEAN, False),
    (None, f"{sanitizer.DONE} 4 of 4, 0 failed\n{CLEAN}", False),
]


@pytest.mark.parametrize(("code", "said", "clean"), SAID)
def test_the_sanitizer_is_clean_only_when_it_says_so(code: int | None, said: str, clean: bool) -> None:
    assert sanitizer.verdict("memcheck", code, said, dry=False)["ok"] is clean
    assert (
        sanitizer.verdict("memcheck", 0, f"{sanitizer.DONE} 3 of 4, 0 failed\n{CLEAN}", False)["missing"] == 1
    )


def test_past_its_time_the_sanitizer_dies_with_all_it_started() -> None:
    program = "sleep 60 & echo $!; sleep 60"
    code, said = sanitizer.run_limited(["sh", "-c", program], 0.5, {})
    assert code is None
    for _ in range(50):
        state = Path(f"/proc/{said.split()[0]}/stat")
        if not state.is_file() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("its child lives on")


def test_a_training_step_takes_what_its_host_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    class Device:
        def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
            return Sample(1e-3, 2e-3)

    steps: dict[str, Step] = {"slow to launch": lambda i: time.sleep(0.01)}
    timing = measure(steps, torch.device("cpu"), seconds=0.0, min_calls=4, clock=WallClock(Device()))[
        "slow to launch"
    ]
    assert timing.calls == 4
    assert 0.01 <= timing.seconds.median < 0.1
    row = Row("gpt_step", "c", "bf16", "step", EAGER)
    row.take(timing)
    assert row.device_seconds == (1e-3, 1e-3, 1e-3)


def test_at_a_small_shape_a_slow_launch_is_slow() -> None:
    def row(contender: str, device: float, host: float) -> Row:
        found = Row("gelu", "5x33", "bf16", "fwd", contender, seconds=Quantiles(*[device] * 3))
        found.host_seconds = Quantiles(*[host] * 3)
        return found

    rows = [row(FASTGPT, 1e-6, 9e-6), row(EAGER, 2e-6, 4e-6)]
    assert not slower_than_eager(rows)
    assert slower_than_eager([summary.waited(one) for one in rows])


@pytest.mark.parametrize(
    ("eager", "ours", "timed"),
    [
        (0.5, 0.9, True),
        (0.5, 1.1, False),
        (1.2, 2.3, True),
        (1.2, 2.5, False),
        (math.inf, 3.0, False),
        (1.2, math.inf, False),
    ],
)
def test_ours_is_left_out_only_where_clearly_worse_than_eager(
    tmp_path: Path, eager: float, ours: float, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Gpu.__new__(Gpu)
    monkeypatch.setattr(machine, "peak_bytes", lambda call: 0)
    machine.device = torch.device("cpu")
    recorder = record.Recorder(tmp_path / "training.jsonl", {}, machine.device)
    heats = training.Heats(training.TINY, 1, [], machine, recorder)
    for name, error in ((EAGER, eager), (FASTGPT, ours)):
        heats.errors[name], heats.losses[name] = error, [10.0]
        heats.admit(name, training.Contender(torch.nn.Identity(), None, lambda batch: batch))  # type: ignore[arg-type]
    assert list(heats.steps) == [EAGER, FASTGPT][: 1 + timed]
    assert ours <= 1.0 or f"eager's ×{eager:.3g}" in heats.notes[FASTGPT]


def test_a_replay_leaves_the_result_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = torch.zeros(())

    class Graph(fake_cuda.CUDAGraph):
        def replay(self) -> None:
            fixed.add_(1.0)

    for name, fake in (*fake_cuda.FAKES.items(), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = Gpu.graphed(Gpu.__new__(Gpu), lambda: fixed)
    assert [value.item() for value in (replay(), replay())] == [1.0, 2.0]


def test_a_failed_case_can_be_repeated_by_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = checking.repro({"op": "gelu", "backend": "torch", "dtype": "bf16", "case": "5x33"})
    program = line.partition('"')[2].rpartition('"')[0].replace("device='cuda'", "device='cpu'")
    exec(program, {})
    assert "gelu by backend torch: ok" in capsys.readouterr().out


CHUNKED = [
    ("layer_norm", Case((70, 24), {"residual": True})),
    ("gelu", Case((70, 24), {"bias": True})),
    ("softmax", Case((3, 20, 24), {"causal": True, "scale": 0.125})),
]


@pytest.mark.parametrize(("op", "case"), CHUNKED, ids=[op for op, _ in CHUNKED])
@pytest.mark.parametrize("elements", [24 * 7, 2**25], ids=["chunks", "whole"])
def test_errors_by_chunks_catch_what_the_whole_catches(
    op: str, case: Case, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right implementation passes; one wrong element of any result, in any chunk, does not."""
    monkeypatch.setattr(memory, "CHUNK", elements)
    spec, draw, dtype = registry.get(op), Draw(0), torch.bfloat16
    inputs = spec.make_inputs(case, dtype, draw)
    outputs = spec.function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = {name: draw.normal(y.shape, y.dtype) for name, y in zip(spec.outputs, outputs, strict=False)}
    got = contest.once(spec.function, inputs, leaf_names(spec, inputs), grads, spec)
    assert 0.0 < memory.worst_error(spec, dtype, inputs, grads, got) <= 1.0
    for name, value in got.items():
        for place in (0, 23, value.numel() // 2 + 3, value.numel() - 1):  # 23: hidden, when causal
            wrong = value.clone()
            wrong.view(-1)[place] = wrong.view(-1)[place] * 1.05 + 0.05
            error = memory.worst_error(spec, dtype, inputs, grads, {**got, name: wrong})
            assert error > 1.0, (name, place)
            assert not math.isnan(error)


def test_the_command_line_checks_on_a_device() -> None:
    with pytest.raises(ValueError, match="cpu cannot run gelu: does not run on cuda tensors"):
        run_check("gelu", "cpu", device="cuda:0")
    line = repro(Report("gelu", "backend triton"), Failure("5x33", "bf16", "bound", ""), device="cuda")
    assert line == "fastgpt check --op gelu --backend triton --dtype bf16 --case 5x33 --device cuda"


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match="sees no GPU"):
        Gpu()
