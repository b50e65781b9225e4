"""What `check` found: rows, failures by hazard, and the table of the worst errors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastgpt._core import registry
from fastgpt._core.spec import BACKENDS, Case
from fastgpt.testing.bounds import Comparison
from fastgpt.testing.explain import pattern

# What a backend's kernels were emulated by, if they were; an implementation of one's own may be in Triton.
EMULATORS = {
    "triton": ("TRITON_INTERPRET",), "cuda": ("FASTGPT_CUDA_EMULATION",), "cpu": (), "torch": (), "reference": ()
}  # fmt: skip

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
    "stale": "wrong when the same tensors come again with other values: cached, or outside its bound on them",
    "not repeatable": "the same call gives other bits",
    "no-grad differs": "the call gives other bits under no_grad",
    "leak": "a result changes with elements that it does not depend on",
}


# Judged by the bound as well: where a plain call is outside of it already, these say nothing new.
BEYOND_BOUND = ("stale", "expanded gradient", "layout")
SHOWN = 3  # failures of one hazard that are printed


class Row(NamedTuple):
    """One output or gradient of one case; pytorch: what a PyTorch user's own code gives, None where it cannot."""

    case: str
    dtype: str
    output: str
    kernel: Comparison
    pytorch: Comparison | None


class Failure(NamedTuple):
    """A hazard (a key of HAZARDS) that one case ran into; meaning: what the wrong elements have in common, or ""."""

    case: str
    dtype: str
    hazard: str
    detail: str
    meaning: str = ""


@dataclass
class Report:
    """What `check` found; `ok` if nothing failed and something was checked. Printable.

    path: "module:function" of an implementation that can be imported. cases: those checked, by name.
    """

    op: str
    implementation: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # (case, dtype, reason)
    cases: dict[str, Case] = field(default_factory=dict)
    path: str | None = None
    device: str = "cpu"

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

    @property
    def telling(self) -> dict[str, list[Failure]]:
        """The failures by hazard, without those that follow from a plain call outside its bound."""
        outside = {failure[:2] for failure in self.failures if failure.hazard in ("bound", "not written")}
        found: dict[str, list[Failure]] = {}
        for failure in self.failures:
            if failure.hazard not in BEYOND_BOUND or failure[:2] not in outside:
                found.setdefault(failure.hazard, []).append(failure)
        return found

    @property
    def following(self) -> str:
        """A line on the failures left out of `telling`; "" if there are none."""
        told = {failure for failures in self.telling.values() for failure in failures}
        hazards = dict.fromkeys(f.hazard for f in self.failures if f not in told)
        return f"where the bound is missed already, so are: {', '.join(hazards)}" if hazards else ""

    def pattern(self, hazard: str) -> str:
        """What all cases with this hazard have and no other case has, in a few words; "" if nothing is found."""
        failed = {failure[:2] for failure in self.telling.get(hazard, ())}
        passed = {(row.case, row.dtype) for row in self.rows} - failed
        calls = ([(self.cases[case], dtype) for case, dtype in sorted(some)] for some in (failed, passed))
        return pattern(self.op, *calls)

    def __str__(self) -> str:
        lines = [f"{self.op} by {self.implementation}: {'ok' if self.ok else 'FAILED'}"]
        lines += table([self])
        telling = self.telling
        for hazard, failures in telling.items():
            found = self.pattern(hazard)
            lines.append(f"  {hazard}: {HAZARDS[hazard]}{f'; {found}' if found else ''}")
            for f in failures[:SHOWN]:
                lines += [
                    f"    {f.case} {f.dtype}: {f.detail}",
                    *([f"      {f.meaning}"] if f.meaning else []),
                ]
            if len(failures) > SHOWN:
                lines.append(f"    and {len(failures) - SHOWN} more")
        lines += [f"  {self.following}"] if self.following else []
        shown = (f for failures in telling.values() for f in failures[:SHOWN])
        lines += [f"  {line}" for line in dict.fromkeys(repro(self, f) for f in shown) if line]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} of its cases not run, e.g. {' '.join(self.skipped[0])}")
        return "\n".join(lines)


def repro(report: Report, failure: Failure, implementation: str | None = None, device: str = "cpu") -> str:
    """The command that runs a failed case alone; "" for a function that cannot be imported or a case of one's own.

    implementation: "module:function", where the report does not know it.
    """
    words, device = ["fastgpt", "check", "--op", report.op], report.device if device == "cpu" else device
    path, backend = implementation or report.path, report.implementation.removeprefix("backend ")
    if path is not None:
        words += ["--implementation", path]
    elif backend in BACKENDS:
        words += ["--backend", backend]
    else:
        return ""
    if failure.case not in {case.name for case in registry.get(report.op).cases}:
        return ""
    words += ["--dtype", failure.dtype, "--case", failure.case]
    emulated = [name for name in EMULATORS.get(backend, ("TRITON_INTERPRET",)) if os.environ.get(name) == "1"]
    words = [*(f"{name}=1" for name in emulated if device == "cpu"), *map(shlex.quote, words)]
    return " ".join(words if device == "cpu" else [*words, "--device", device])


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
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, two spaces between."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
