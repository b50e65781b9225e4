"""Runs the parts: each a process with a log and a time limit, and what became of each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GRACE = 20.0  # seconds beyond its share after which a part is taken to hang


@dataclass(frozen=True)
class Part:
    """One process.

    command: `flag N` is appended, the seconds it may take, unless the flag is empty.
    share: of the time there is, against the parts after it.
    group: parts of one group that follow one another run side by side.
    """

    name: str
    command: tuple[str, ...]
    share: float
    flag: str = "--seconds"
    group: str = ""


@dataclass(frozen=True)
class Outcome:
    name: str
    what: str  # "ok", "crashed (exit code …)", "killed after … s", "no time left", "interrupted"
    seconds: float

    @property
    def ok(self) -> bool:
        return self.what == "ok"


def run_parts(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    environment: Mapping[str, str],
    workers: int = 1,
    grace: float = GRACE,
    outcomes: list[Outcome] | None = None,
) -> list[Outcome]:
    """All parts in their order, within about `seconds`; time that a part leaves goes to those after it.

    Outcomes are appended to the list as they come: an interrupted run has those up to then.
    """
    end = time.monotonic() + seconds
    outcomes = [] if outcomes is None else outcomes
    waiting = list(parts)
    while waiting:
        together = [waiting.pop(0)]
        while together[0].group and waiting and waiting[0].group == together[0].group:
            together.append(waiting.pop(0))
        left = end - time.monotonic()
        mine = sum(part.share for part in together)
        share = left * mine / (mine + sum(part.share for part in waiting))
        _side_by_side(together, out, share, environment, workers, grace, outcomes)
    return outcomes


class _Running:
    def __init__(self, part: Part, out: Path, seconds: float, environment: Mapping[str, str]) -> None:
        self.part, self.began, self.seconds = part, time.monotonic(), seconds
        self.log: IO[bytes] = (out / f"{part.name}.log").open("wb")
        command = [*part.command, *([part.flag, f"{seconds:.1f}"] if part.flag else [])]
        # A session of its own: what it has started dies with it.
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip

    def outcome(self, grace: float) -> Outcome | None:
        """None while it may go on."""
        code, took = self.process.poll(), time.monotonic() - self.began
        if code is None and took <= self.seconds + grace:
            return None
        if code is None:
            self.kill()
        self.log.close()
        what = (
            f"killed after {took:.0f} s"
            if code is None
            else "ok"
            if code == 0
            else f"crashed (exit code {code})"
        )
        return Outcome(self.part.name, what, took)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _side_by_side(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    environment: Mapping[str, str],
    workers: int,
    grace: float,
    outcomes: list[Outcome],
) -> None:
    end = time.monotonic() + seconds
    waiting, running = list(parts), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                left, part = end - time.monotonic(), waiting.pop(0)
                if left < 1.0:
                    outcomes.append(Outcome(part.name, "no time left", 0.0))
                else:
                    running.append(_Running(part, out, left, environment))
            for one in list(running):
                outcome = one.outcome(grace)
                if outcome is not None:
                    running.remove(one)
                    outcomes.append(outcome)
                    now = time.strftime("%H:%M:%S")
                    print(f"[{now}] {outcome.name}: {outcome.what}, {outcome.seconds:.0f} s", flush=True)
            time.sleep(0.05)
    finally:  # interrupted
        for one in running:
            one.kill()
            outcomes.append(Outcome(one.part.name, "interrupted", time.monotonic() - one.began))
