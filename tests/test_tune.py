"""The tuner with a clock of known times: what it chooses, what it refuses, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fastgpt_kernels.triton import common, device
from fastgpt_kernels.triton.common import LaunchConfig, Tunable

from benchmarks import tune
from fastgpt._core import registry
from fastgpt.testing.timing import Sample, Step

CPU = torch.device("cpu")
FAST, SLOW, SAME = (LaunchConfig(num_warps=warps) for warps in (2, 4, 8))


@dataclass
class Machine:
    """A kernel that takes a known time for each configuration, and the clock that reads it."""

    seconds: dict[LaunchConfig | None, float]  # None: the rule
    taken: float = 0.0
    launches: int = 0

    def run(self, where: torch.device) -> Callable[[], object]:
        return self.launch

    def launch(self) -> None:
        self.launches += 1
        self.taken = self.seconds[common._forced.get("toy_fwd")]

    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        step(first % sets)
        return Sample(self.taken, 1e-6, None)

    def problem(self, key: str = "bf16-64") -> Tunable:
        return Tunable("toy_fwd", key, tuple(config for config in self.seconds if config), self.run)


@pytest.fixture
def machine() -> Machine:
    return Machine({None: 2e-3, FAST: 1e-3, SLOW: 3e-3, SAME: 2e-3})


def tuned(entry: tune.Entry, machine: Machine) -> tune.Outcome:
    outcome = tune.Outcome(None, 1.0)
    sound = tune.screen(entry, outcome)
    for problem in entry.problems:
        tune.time_problem(problem, [machine.launch], sound, outcome, CPU, machine)
    tune.choose(outcome, sound)
    return outcome


def test_the_fastest_candidate_wins(machine: Machine) -> None:
    outcome = tuned(tune.Entry("toy", [machine.problem()]), machine)
    assert outcome.best == FAST
    assert outcome.speedup == pytest.approx(2.0)
    assert set(outcome.times) == {tune.RULE, *map(tune.describe, (FAST, SLOW, SAME))}
    assert not common._forced  # nothing stays forced


def test_the_rule_stays_where_nothing_beats_it(machine: Machine) -> None:
    del machine.seconds[FAST]
    outcome = tuned(tune.Entry("toy", [machine.problem()]), machine)
    assert outcome.best is None
    assert outcome.speedup == 1.0


def test_a_candidate_outside_its_bound_is_not_timed(machine: Machine) -> None:
    errors = {FAST: 1.5, SLOW: 0.1, SAME: 0.1}
    outcome = tuned(tune.Entry("toy", [machine.problem()], errors.__getitem__), machine)
    assert outcome.best is None
    assert outcome.refused == {tune.describe(FAST): "outside bound ×1.5"}
    assert tune.describe(FAST) not in outcome.times


def test_a_candidate_that_does_not_run_is_refused_not_fatal(machine: Machine) -> None:
    def check(config: LaunchConfig) -> float:
        if config == FAST:
            raise RuntimeError("out of resource: shared memory")
        return 0.0

    outcome = tuned(tune.Entry("toy", [machine.problem()], check), machine)
    assert outcome.refused == {tune.describe(FAST): "RuntimeError: out of resource: shared memory"}
    del machine.seconds[FAST]
    entry = tune.Entry("toy", [Tunable("toy_fwd", "k", (FAST, SLOW), machine.run)])
    assert set(tuned(entry, machine).refused) == {tune.describe(FAST)}  # KeyError at the launch itself


def test_an_entry_that_no_case_reaches_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real run; a dry run, which times nothing, goes through it."""
    monkeypatch.setattr(tune, "cases_by_lookup", lambda spec, arch: {})
    entry = next(tune.entries(["gelu"], "sm_90", CPU))
    outcome = tune.Outcome(None, 1.0)
    assert tune.screen(entry, outcome) == {}
    assert set(outcome.refused) == set(entry.candidates)
    entry = next(tune.entries(["gelu"], "sm_90", CPU, check=False))
    assert tune.screen(entry, tune.Outcome(None, 1.0))


def test_an_entry_of_two_problems_must_gain_on_both(machine: Machine) -> None:
    """768 and 1024 columns share the key 1024: what is faster for one and slower for the other is not taken."""
    outcome = tune.Outcome(None, 1.0)
    other = Machine({None: 1e-3, FAST: 1.1e-3, SLOW: 0.9e-3, SAME: 0.5e-3})
    sound = {tune.describe(config): config for config in (FAST, SLOW, SAME)}
    for one in (machine, other):
        tune.time_problem(one.problem(), [one.launch], sound, outcome, CPU, one)
    tune.choose(outcome, sound)
    assert outcome.best is None
    machine.seconds[SAME] = 1.9e-3
    outcome = tune.Outcome(None, 1.0)
    for one in (machine, other):
        tune.time_problem(one.problem(), [one.launch], sound, outcome, CPU, one)
    tune.choose(outcome, sound)
    assert outcome.best == SAME
    assert outcome.speedup == pytest.approx((2 / 1.9 * 2) ** 0.5)


def test_the_table_is_what_the_launchers_read(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = {"device": "a GPU", "arch": "sm_00", "versions": {"triton": "9"}}
    path, entry = tmp_path / "sm_00.json", tune.Entry("toy", [machine.problem()])
    table = tune.load(path, stamp)
    tune.note(table, entry, tuned(entry, machine))
    tune.note(table, tune.Entry("toy", [machine.problem("bf16-128")]), tuned(entry, machine))
    tune.save(path, table)
    monkeypatch.setattr(device, "TABLES", tmp_path)
    device.table.cache_clear()
    assert device.tuned("sm_00", "toy_fwd", "bf16-64") == {"num_warps": 2, "num_stages": 1}
    assert common.configured("sm_00", "toy_fwd", "bf16-64", SLOW) == FAST
    assert common.configured("sm_00", "toy_fwd", "bf16-999", SLOW) == SLOW
    with tune.rules_only():
        assert common.configured("sm_00", "toy_fwd", "bf16-64", SLOW) == SLOW
    assert common.configured("sm_00", "toy_fwd", "bf16-64", SLOW) == FAST
    stored = json.loads(path.read_text())
    assert stored["device"] == "a GPU"
    measured = stored["measurements"]["toy_fwd"]["bf16-64"]
    assert measured["microseconds"][tune.RULE] == [2000.0]
    assert measured["speedup"] == 2.0

    # A later run keeps what it does not reach, and takes out what is no longer better than the rule.
    machine.seconds[FAST] = 2e-3
    table = tune.load(path, stamp)
    tune.note(table, entry, tuned(entry, machine))
    tune.save(path, table)
    device.table.cache_clear()
    assert device.tuned("sm_00", "toy_fwd", "bf16-64") is None
    assert device.tuned("sm_00", "toy_fwd", "bf16-128") is not None
    device.table.cache_clear()


OF_OTHERS = ("mlp", "linear_cross_entropy")  # whose kernels are those of linear, gelu and cross_entropy
WITH_TRITON = [
    s.name
    for s in registry.ops()
    if not s.kernels and registry.is_written(s.name, "triton") and s.name not in OF_OTHERS
]


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_entry_of_an_op_can_be_checked_and_rehearsed(op: str, tmp_path: Path) -> None:
    """Each key that an op offers for tuning is looked up by its own problem, and by a case that can check it."""
    spec = registry.get(op)
    reached = tune.cases_by_lookup(spec, "sm_90")
    entries = list(tune.entries([op], "sm_90", CPU, check=False))
    assert entries, f"{op} offers nothing for tuning"
    assert not {entry.name for entry in entries} - set(reached)
    with tune.rules_only():
        for entry in entries:
            outcome = tune.rehearse(entry, CPU, "sm_90")
            assert not outcome.refused, (entry.name, outcome.refused)
            assert len(outcome.times) == 1 + len(entry.candidates)


def test_the_command_rehearses_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match="sees no GPU"):
        tune.main(["--op", "gelu"])
    before = sorted(device.TABLES.glob("*"))
    assert tune.main(["--op", "gelu", "--dry-run", "--arch", "sm_80", "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "sm_80.json").read_text())
    assert table["device"] == "none: rehearsed"
    assert "gelu_fwd" in table["measurements"]
    assert table["configurations"] == {}  # made-up times beat nothing
    assert "gelu_bwd" in capsys.readouterr().out
    assert sorted(device.TABLES.glob("*")) == before


def test_budget_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["--op", "gelu", "--dry-run", "--budget", "-1"])
    assert "not tuned within -1 s: gelu_" in capsys.readouterr().out
