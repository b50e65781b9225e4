"""Interleaved timing: every round times every contender once, in random order, on buffers that rotate.

A busy machine slows all contenders of a round alike, so that ratios hold where absolute times do not.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

try:
    import resource
except ImportError:  # Windows has no page-fault counts
    resource = None  # type: ignore[assignment]

Step = Callable[[int], object]  # one call on the i-th set of inputs; what it returns is dropped at once

SAMPLE_SECONDS = 2e-3  # a sample repeats the call until it lasts so long: the clock's own cost vanishes
MIN_ROUNDS, MAX_ROUNDS = 5, 60
MAX_CALLS = {"cpu": 5000, "cuda": 20}  # on a GPU a whole sample must fit into the launch queue


class Quantiles(NamedTuple):
    median: float
    p20: float
    p80: float


class Sample(NamedTuple):
    """Per call. seconds: what is judged; host_seconds: what the caller waited, where that differs.

    device_seconds: what the device took, where `seconds` is the wall clock's.
    """

    seconds: float
    host_seconds: float | None = None
    minor_faults: float | None = None
    device_seconds: float | None = None


@dataclass(frozen=True)
class Timing:
    """One contender's samples, one per round: sample n of two contenders comes from the same round."""

    samples: tuple[Sample, ...]
    calls: int  # per sample

    @property
    def seconds(self) -> Quantiles:
        return quantiles([sample.seconds for sample in self.samples])

    @property
    def host_seconds(self) -> Quantiles | None:
        values = [sample.host_seconds for sample in self.samples if sample.host_seconds is not None]
        return quantiles(values) if values else None

    @property
    def device_seconds(self) -> Quantiles | None:
        values = [sample.device_seconds for sample in self.samples if sample.device_seconds is not None]
        return quantiles(values) if values else None

    @property
    def minor_faults(self) -> float | None:
        values = [sample.minor_faults for sample in self.samples if sample.minor_faults is not None]
        return quantiles(values).median if values else None

    def minus(self, other: Timing) -> Quantiles:
        """Quantiles of the differences round by round: forward+backward minus forward is the backward."""
        pairs = zip(self.samples, other.samples, strict=True)
        return quantiles([ours.seconds - theirs.seconds for ours, theirs in pairs])

    def over(self, other: Timing) -> Quantiles:
        """Quantiles of the ratios round by round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return quantiles([ours.seconds / theirs.seconds for ours, theirs in pairs])


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, p20 and p80, linear between neighbours."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Quantiles(at(0.5), at(0.2), at(0.8))


class Clock(Protocol):
    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        """Time `calls` calls, beginning with input set `first % sets`."""
        ...


class CpuClock:
    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        faults = _minor_faults()
        start = time.perf_counter()
        for i in range(first, first + calls):
            step(i % sets)
        seconds = (time.perf_counter() - start) / calls
        faults_after = _minor_faults()
        taken = None if faults is None or faults_after is None else (faults_after - faults) / calls
        return Sample(seconds, None, taken)


class CudaClock:
    """Device time between two events, and beside it the host's time to launch.

    The device spins first for as long as the host needs to launch the sample. Without that, events around calls
    that launch slower than they run would measure the host.
    """

    CYCLES_PER_SECOND = 2.5e9  # above any GPU's clock, so that the spin is never too short for it

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launch_seconds: dict[int, float] = {}  # by id of the step: what a call took to launch last time

    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        spin = self.launch_seconds.get(id(step), 1e-4) * calls * 1.5 + 1e-4
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(spin * self.CYCLES_PER_SECOND))
        start.record()
        began = time.perf_counter()
        for i in range(first, first + calls):
            step(i % sets)
        host = (time.perf_counter() - began) / calls
        end.record()
        torch.cuda.synchronize(self.device)
        # A step that waits for the device waits for the spin too; without the cap the spin would feed itself.
        self.launch_seconds[id(step)] = min(host, 0.02)
        return Sample(start.elapsed_time(end) * 1e-3 / calls, host, None)


class WallClock:
    """Wall time from an idle device to an idle device, and beside it what another clock says of the same calls.

    For whole steps of training, where a device that waits for its host is slow and must look slow.
    """

    def __init__(self, beside: Clock) -> None:
        self.beside = beside

    def sample(self, step: Step, first: int, calls: int, sets: int) -> Sample:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for i in range(first, first + calls):
            step(i % sets)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / calls
        other = self.beside.sample(step, first, calls, sets)
        return Sample(seconds, other.host_seconds, None, other.seconds)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def step_clock(device: torch.device) -> Clock:
    """For a whole training step: the host's part counts."""
    return WallClock(CudaClock(device)) if device.type == "cuda" else CpuClock()


def measure(
    contenders: Mapping[str, Step],
    device: torch.device,
    *,
    sets: int = 1,
    seconds: float = 1.0,
    min_rounds: int = MIN_ROUNDS,
    min_calls: int = 1,
    clock: Clock | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time all contenders for about `seconds` altogether; `sets` is how many sets of inputs a step can take."""
    clock = clock or clock_for(device)
    max_calls = MAX_CALLS[device.type]
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, step in contenders.items():
        clock.sample(step, 0, 1, sets)  # builds, allocates, tunes
        estimate = clock.sample(step, 1, 1, sets).seconds
        if estimate < 10 * SAMPLE_SECONDS:
            estimate = min(estimate, *(clock.sample(step, i, 1, sets).seconds for i in range(2, 4)))
        calls[name] = min(max(math.ceil(SAMPLE_SECONDS / max(estimate, 1e-9)), min_calls), max_calls)
        if calls[name] > 1:
            clock.sample(step, 4, calls[name], sets)  # warm-up in the form that is timed
        round_seconds += estimate * calls[name]
    rounds = min(max(int(seconds / max(round_seconds, 1e-9)), min_rounds), MAX_ROUNDS)

    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    names, shuffle, position = list(contenders), random.Random(seed).shuffle, 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(names)
            for name in names:
                samples[name].append(clock.sample(contenders[name], position, calls[name], sets))
                position += calls[name]  # nobody finds his inputs warmed by the one before
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples[name]), calls[name]) for name in contenders}


def _minor_faults() -> int | None:
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
