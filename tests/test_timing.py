"""How the benchmarks time: statistics, interleaved rounds, inputs that are not warm, peak memory."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks import buffers, suites
from fastgpt._core.spec import Case, Draw
from fastgpt.testing import rotation
from fastgpt.testing.timing import CpuClock, Quantiles, Sample, Step, Timing, measure, quantiles

CPU = torch.device("cpu")


class FakeClock:
    """Calls nothing; takes the time that each step is said to take, and remembers who was asked when."""

    def __init__(self, costs: dict[Step, float]) -> None:
        self.costs, self.log = costs, list[tuple[Step, int, int]]()

    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        self.log.append((step, first, calls))
        return Sample(self.costs[step], None, 3.0)


def test_quantiles_of_known_samples() -> None:
    values = [float(v) for v in range(1, 12)]
    random.Random(0).shuffle(values)
    assert quantiles(values) == Quantiles(6.0, 3.0, 9.0)
    assert quantiles([2.0, 1.0]) == pytest.approx((1.5, 1.2, 1.8))
    assert quantiles([7.0]) == Quantiles(7.0, 7.0, 7.0)


def test_backward_is_the_difference_round_by_round() -> None:
    forward = Timing(tuple(Sample(s) for s in (1.0, 5.0, 2.0)), 1)
    both = Timing(tuple(Sample(s) for s in (3.0, 8.0, 6.0)), 1)
    assert both.minus(forward) == pytest.approx((3.0, 2.4, 3.6))


def test_rounds_are_interleaved_and_shuffled() -> None:
    steps: dict[str, Step] = {name: _nothing() for name in "abc"}
    clock = FakeClock({steps["a"]: 1e-3, steps["b"]: 1e-4, steps["c"]: 5e-3})
    timings = measure(steps, CPU, sets=4, seconds=1.0, clock=clock)
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 2, "b": 20, "c": 1}
    rounds = len(timings["a"].samples)
    assert rounds == 60  # capped
    timed = clock.log[-3 * rounds :]
    orders = [tuple(step for step, _, _ in timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(set(order) == set(steps.values()) for order in orders)
    assert len(set(orders)) == 6  # every order occurs
    positions = [first for _, first, _ in timed]
    assert all(b - a == calls for a, b, (_, _, calls) in zip(positions, positions[1:], timed, strict=False))
    assert timings["b"].seconds.median == 1e-4
    assert timings["b"].minor_faults == 3.0


def test_time_limit_governs_the_number_of_rounds() -> None:
    steps: dict[str, Step] = {name: _nothing() for name in "ab"}
    clock = FakeClock(dict.fromkeys(steps.values(), 0.02))
    assert len(measure(steps, CPU, seconds=0.8, clock=clock)["a"].samples) == 20
    assert len(measure(steps, CPU, seconds=0.0, clock=clock)["a"].samples) == 5


def test_cpu_clock_counts_page_faults_and_visits_every_set() -> None:
    visited: list[int] = []
    CpuClock().sample(visited.append, 2, 5, 3)
    assert visited == [2, 0, 1, 2, 0]
    taken = CpuClock().sample(lambda _: bytearray(8 << 20), 0, 1, 1)
    assert taken.seconds > 0
    assert taken.minor_faults is None or taken.minor_faults >= 0


def test_rotation_until_cold_or_large_enough() -> None:
    small, huge = rotation.Caches(1 << 20, 8 << 20), rotation.Caches(2 << 20, 1 << 30)
    assert rotation.how_many(1 << 20, small) == (16, "cold")
    assert rotation.how_many(64 << 20, small) == (1, "cold")
    assert rotation.how_many(1 << 20, huge) == (256, "beyond L2")
    assert rotation.how_many(3 << 20, rotation.Caches(2 << 20, 1 << 30)._replace(inner=1 << 30)) == (
        85,
        "warm",
    )
    assert rotation.how_many(4 * 64 * 4, small) == (1, "warm")


def test_rotated_inputs_are_separate_memory_and_not_zero() -> None:
    case = suites.op_cases(("layer_norm",), ("bf16",))[0]
    inputs = case.spec.make_inputs(Case((4, 8)), case.dtype, Draw(0, CPU))
    sets = rotation.copies(inputs, 3, ("x", "weight"))
    assert len({one["x"].data_ptr() for one in sets}) == 3
    assert all(one["x"].requires_grad and one["x"].ne(0).any() for one in sets)
    assert not sets[0]["bias"].requires_grad


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1 << 18)
    assert (1 << 20) <= buffers.peak_bytes(lambda: x + 1, CPU) < (1 << 20) + 4096
    assert (2 << 20) <= buffers.peak_bytes(lambda: (x + 1) * 2, CPU) < (2 << 20) + 4096


def _nothing() -> Step:
    return lambda _: None
