"""A run as it is stored: one JSON file, from which report, comparison and README tables are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.testing.timing import Quantiles, Timing

FORMAT = 1
FASTGPT, EAGER, COMPILED = "fastgpt", "torch eager", "torch compiled"


@dataclass
class Row:
    """One contender on one case. `seconds` is None if it was not timed: `note` says why.

    pass_: "fwd" (with autograd's bookkeeping, as in training), "fwd+bwd", "bwd" (their difference, round by
        round) or "step" (a whole training step).
    backend: which of ours ran, by name.
    error: largest error as a fraction of the bound on this very case; above 1 it is outside.
    moved, flops: what the op must move and compute at least.
    inputs: where a call found its inputs: cold, beyond L2, warm.
    """

    op: str
    case: str
    dtype: str
    pass_: str
    contender: str
    seconds: Quantiles | None = None
    host_seconds: Quantiles | None = None
    rounds: int = 0
    calls: int = 0
    backend: str | None = None
    error: float | None = None
    moved: float = 0.0
    flops: float = 0.0
    minor_faults: float | None = None
    peak_bytes: int | None = None
    inputs: str = ""
    sets: int = 1
    tokens: int = 0
    note: str = ""
    device_seconds: Quantiles | None = None  # where `seconds` is the wall clock's
    limits: dict[str, float] = field(default_factory=dict)  # measured in the same rounds: they beat the run's

    def __post_init__(self) -> None:
        self.seconds = Quantiles(*self.seconds) if self.seconds else None
        self.host_seconds = Quantiles(*self.host_seconds) if self.host_seconds else None
        self.device_seconds = Quantiles(*self.device_seconds) if self.device_seconds else None

    def take(self, timing: Timing) -> None:
        self.seconds, self.host_seconds = timing.seconds, timing.host_seconds
        self.device_seconds, self.minor_faults = timing.device_seconds, timing.minor_faults
        self.rounds, self.calls = len(timing.samples), timing.calls

    @property
    def case_key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.dtype, self.pass_

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return *self.case_key, self.contender


@dataclass
class Run:
    environment: dict[str, Any]
    settings: dict[str, Any]
    limits: list[dict[str, Any]] = field(default_factory=list)  # see limits.to_json
    rows: list[Row] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        stamp = self.environment["date"].replace(":", "").replace("+0000", "Z").replace("-", "")
        path = directory / f"{self.settings['suite']}-{self.environment['allocator']}-{stamp}.json"
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path


def load(path: Path) -> Run:
    """Raises ValueError if the file is not a run of this format."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a benchmark result, got {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: expected a benchmark result of format {FORMAT}")
    return Run(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Contender to row, for every case in the order of the run."""
    table: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row.case_key, {})[row.contender] = row
    return table


def beyond_noise(a: Quantiles, b: Quantiles) -> bool:
    """Whether the ranges from p20 to p80 are apart: only then is a difference called one."""
    return a.p20 > b.p80 or b.p20 > a.p80


def slower_than_eager(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Cases where ours is slower than eager PyTorch beyond the noise."""
    found = []
    for (*_, pass_), contenders in by_case(rows).items():
        if pass_ == "bwd":  # what a user waits for is the forward, or both
            continue
        ours, eager = contenders.get(FASTGPT), contenders.get(EAGER)
        if ours and eager and ours.seconds and eager.seconds and ours.seconds.p20 > eager.seconds.p80:
            found.append((ours, eager))
    return found
