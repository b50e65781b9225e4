"""What a part has found so far, on disk after every row: a part that is cut short has still been worth its time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, limits
from benchmarks.results import Row, Run


class Recorder:
    """A file of JSON lines: {"environment"}, then {"limits"}, {"row"}, {"finding"}, {"not_run"} as they come."""

    def __init__(self, path: Path, settings: dict[str, Any], device: torch.device) -> None:
        self.path = path
        self.file = path.open("w")
        self.rates: dict[str, float] = {}
        stamp = environment.stamp(device)
        stamp["commit"] = stamp["commit"] or os.environ.get("COMMIT")  # a copy without .git
        self._write(environment=stamp, settings=settings)

    def limits(self, measured: limits.Limits, when: str) -> None:
        entry = limits.to_json(measured, when)
        self.rates = limits.best([entry])
        self._write(limits=entry)

    def rows(self, rows: Iterable[Row]) -> None:
        from benchmarks import report

        for row in rows:
            self._write(row=asdict(row))
            if row.seconds is None:
                said = row.note or "not timed"
            else:
                share = f", {report.of_limit(row, self.rates)}" if self.rates else ""
                said = report.duration(row.seconds.median) + share + (f" ({row.note})" if row.note else "")
            print(f"{' '.join(row.key)}: {said}", flush=True)

    def finding(self, **values: Any) -> None:
        """A result that is no timing: of the check, of a race, of a sanitizer."""
        self._write(finding=values)
        print(" ".join(f"{key}={value}" for key, value in values.items()), flush=True)

    def not_run(self, what: str, why: str) -> None:
        self._write(not_run=f"{what}: {why}")
        print(f"not run: {what}: {why}", flush=True)

    def _write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def load(path: Path) -> tuple[Run, list[dict[str, Any]]]:
    """(run, findings); a last line that was cut off is left out."""
    run, findings = Run({}, {}), list[dict[str, Any]]()
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "environment" in line:
            run.environment, run.settings = line["environment"], line["settings"]
        elif "limits" in line:
            run.limits.append(line["limits"])
        elif "row" in line:
            run.rows.append(Row(**line["row"]))
        elif "finding" in line:
            findings.append(line["finding"])
        else:
            run.not_run.append(line["not_run"])
    return run, findings
