"""What `check` found: rows, failures by hazard, and the table of the worst errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastgpt.testing.bounds import Comparison

HAZARDS = {
    "raised": "the call raised",
    "shape": "a result has the wrong shape, or is missing",
    "dtype": "a result has the wrong dtype",
    "bound": "a result is outside its error bound",
    "not written": "an element is NaN where the exact result is not",
    "input mutated": "an input or an incoming gradient was changed",
    "out of bounds": "memory outside of a tensor was written",
    "alias": "a result shares memory with an input or an output",
    "layout": "wrong for inputs or gradients that are not contiguous or not aligned",
    "expanded gradient": "wrong for an expanded incoming gradient, as .sum() sends it",
    "stale": "wrong when the same tensors come again with other values: something was cached",
    "not repeatable": "the same call gives other bits",
    "no-grad differs": "the call gives other bits under no_grad",
    "leak": "a result changes with elements that it does not depend on",
}


class Row(NamedTuple):
    """One output or gradient of one case; pytorch: what a PyTorch user's own code gives, None where it cannot."""

    case: str
    dtype: str
    output: str
    kernel: Comparison
    pytorch: Comparison | None


class Failure(NamedTuple):
    """A hazard (a key of HAZARDS) that one case ran into."""

    case: str
    dtype: str
    hazard: str
    detail: str


@dataclass
class Report:
    """What `check` found; `ok` if nothing failed and something was checked. Printable."""

    op: str
    implementation: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # (case, dtype, reason)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.failures

    @property
    def hazards(self) -> set[str]:
        return {failure.hazard for failure in self.failures}

    def worst(self) -> list[Row]:
        """For each dtype and output the row that comes closest to its bound or is furthest past it."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            known = found.get((row.dtype, row.output))
            if known is None or row.kernel.ratio > known.kernel.ratio:
                found[row.dtype, row.output] = row
        return list(found.values())

    def __str__(self) -> str:
        lines = [f"{self.op} by {self.implementation}: {'ok' if self.ok else 'FAILED'}"]
        lines += table([self])
        lines += [f"  {f.case} {f.dtype}: {f.hazard}: {f.detail}" for f in self.failures]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} of its cases not run, e.g. {' '.join(self.skipped[0])}")
        return "\n".join(lines)


def table(reports: Iterable[Report]) -> list[str]:
    """The worst element of each op, implementation, dtype and output, with PyTorch's own error beside it."""
    lines = [
        ("op", "by", "dtype", "result", "error", "bound", "ratio", "PyTorch error", "ratio", "worst case", "")
    ]
    for report in reports:
        for row in report.worst():
            kernel, pytorch = row.kernel, row.pytorch
            lines.append((
                report.op, report.implementation.removeprefix("backend "), row.dtype, row.output,
                f"{kernel.error:.2e}", f"{kernel.bound:.2e}", f"{kernel.ratio:.2f}",
                "-" if pytorch is None else f"{pytorch.error:.2e}",
                "-" if pytorch is None else f"{pytorch.ratio:.2f}",
                row.case, "" if kernel.ok else "MISS",
            ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
