"""The report of a whole run, made from the parts' files alone: whatever is there is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import limits, report
from benchmarks.gpu import plots, record
from benchmarks.gpu.schedule import Outcome
from benchmarks.results import COMPILED, EAGER, FASTGPT, FORMAT, Row, Run, by_case
from fastgpt.testing.timing import Quantiles

Findings = list[dict[str, Any]]
PROVEN = "complete, and nothing failed"


def write(out: Path, outcomes: Sequence[Outcome], dry: bool) -> None:
    """report.md, and for every part with timings PART.json, as `python -m benchmarks` stores it, and PART.md."""
    names = [name for outcome in outcomes for name in outcome.name.split(",")]  # a rehearsal's run together
    paths = {name: out / f"{name}.jsonl" for name in names}
    loaded = {name: record.load(path) for name, path in paths.items() if path.is_file()}
    findings = [finding for _, found in loaded.values() for finding in found]
    lines = ["# fastgpt on a GPU", "", f"**{verdict(out, outcomes)}**", ""]
    if dry:
        lines += ["**A rehearsal without a GPU: no figure here means anything.**", ""]
    environment = next((run.environment for run, _ in loaded.values() if run.environment), {})
    lines += [f"- {line}" for line in report.environment_lines(environment)]
    rows = [(o.name, o.what, f"{o.seconds:.0f}") for o in outcomes]
    lines += ["", "## Parts", "", *table(("part", "what became of it", "seconds"), rows)]
    for outcome in outcomes:
        log = out / f"{outcome.name}.log"
        if not outcome.ok and log.is_file():
            said = log.read_text(errors="replace").splitlines()[-12:]
            lines += ["", f"{outcome.name} ended with:", "", *(f"    {line[:200]}" for line in said)]
    lines += ["", "## Check", "", *check_lines(findings)]
    for name, (run, _) in loaded.items():
        if not run.rows or not run.limits:
            continue
        stored = {"format": FORMAT, **asdict(run)}
        (out / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
        (out / f"{name}.md").write_text(report.markdown(run))
        lines += ["", f"## {name} ({name}.md has every row)", "", *suite_lines(name, run)]
        if plots.draw(name, run, out / f"{name}.png"):
            lines += ["", f"![{name}]({name}.png)"]
    lines += ["", "## Races and sanitizer", "", *race_lines(findings)]
    not_run = [f"- {name}: {line}" for name, (run, _) in loaded.items() for line in run.not_run]
    if not_run:
        lines += ["", "## Not run", "", *not_run]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def verdict(out: Path, outcomes: Sequence[Outcome]) -> str:
    """PROVEN, or what failed, or else what was not judged: what time did not allow is not proven."""
    findings = [finding for path in out.glob("*.jsonl") for finding in record.load(path)[1]]
    wrong = sum(not finding.get("ok", True) for finding in findings)
    broken = [outcome.name for outcome in outcomes if not outcome.ok]
    if wrong or any(outcome.what.startswith("crashed") for outcome in outcomes):
        return f"FAILED: {wrong} findings; parts that did not end well: {', '.join(broken) or 'none'}"
    missing = sum(finding.get("missing") or 0 for finding in findings)
    if missing or broken or not outcomes:
        return (
            f"incomplete: {missing} calls not judged; parts that did not end: {', '.join(broken) or 'none'}"
        )
    return PROVEN


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def check_lines(findings: Findings) -> list[str]:
    """The worst element of each op, backend and dtype, then every failure with a line that repeats it."""
    groups: dict[tuple[str, str, str], Findings] = {}
    for found in findings:
        if found["kind"] == "check":
            groups.setdefault((found["op"], found["backend"], found["dtype"]), []).append(found)
    rows = []
    for key, group in groups.items():
        judged = [found for found in group if "ratio" in found]
        counts = [f"{len(group)}", f"{sum(not found['ok'] for found in group)}"]
        if judged:
            worst = max(judged, key=lambda found: found["ratio"])
            figures = [f"{worst['ratio']:.2f}", f"{worst['error']:.2e}", f"{worst['bound']:.2e}"]
            rows.append([*key, *figures, f"{worst['case']} {worst['result']}", *counts])
        else:
            rows.append([*key, "–", "–", "–", "–", *counts])
    heads = ("op", "backend", "dtype", "error/bound", "error", "bound", "where", "cases", "failed")
    lines = table(heads, rows)
    for found in findings:
        if found["kind"] == "check" and not found["ok"]:
            lines += ["", f"FAILED {found['op']} {found['backend']} {found['dtype']} {found['case']}: "]
            lines += [*(f"- {failure}" for failure in found["failures"][:4]), f"- `{found['repro']}`"]
    lines += [
        f"\nNOT JUDGED {found['what']}: {found['missing']} {found['why']}"
        for found in findings
        if found["kind"] == "incomplete"
    ]
    return lines


def race_lines(findings: Findings) -> list[str]:
    rows = []
    for found in findings:
        if found["kind"] == "race":
            what = found.get("why") or ", ".join(f"{k}: {n}" for k, n in found["differing"].items() if n)
            done = f"{found.get('repeats', 0)} repeats"
            rows.append([found["op"], found["case"], found["backend"], done, what or "every bit the same"])
        elif found["kind"] == "sanitizer":
            said = (
                "FAILED, see its file" if not found["ok"] else "incomplete" if found["missing"] else "clean"
            )
            rows.append(["all", "one case of each form", found["tool"], found["summary"], said])
    return table(("op", "case", "by", "", "differing results, of so many repeats"), rows)


def suite_lines(name: str, run: Run) -> list[str]:
    rates = limits.best(run.limits)
    run = replace(run, rows=[waited(row) for row in run.rows]) if name == "small" else run
    figures = {
        "memory": (lambda row: f"{report.fraction(row, rates)[0]:.2f}", "fraction of the copy bandwidth"),
        "attention": (
            lambda row: (
                f"{row.flops / _median(row) * 1e-12:.0f} ({row.flops / _median(row) / rates['bfloat16']:.2f})"
            ),
            "TFLOP/s (of the best bf16 matrix product); 4·B·H·T²·D forward, 2.5 times that backward, half if causal",
        ),
        "decode": (lambda row: f"{row.moved / _median(row) * 1e-9:.0f}", "GB/s of K and V, each read once"),
        "training": (
            lambda row: (
                f"{row.tokens / _median(row):,.0f} tokens/s, MFU {report.fraction(row, rates)[0]:.3f}"
                + (f", device {report.duration(row.device_seconds.median)}" if row.device_seconds else "")
            ),
            "wall clock over consecutive steps, launching included; device: its time alone. MFU by 6·N·tokens over"
            " the best bf16 matrix product, N without the positions' table",
        ),
        "small": (
            _with_host,
            "the larger of device and host time, which is what is judged here (a caller waits for either); host time",
        ),
    }
    figure, text = figures.get(name, (_with_host, "device time, host time"))
    lines = [report.limit_table(run), "", text, "", *grid(run.rows, figure)]
    lines += ["", "Slower than eager PyTorch, beyond the noise:", "", report.verdict(run), ""]
    for finding in (row for row in run.rows if row.note and row.contender.startswith(FASTGPT)):
        lines.append(f"- {' '.join(finding.key)}: {finding.note}")
    return lines


def waited(row: Row) -> Row:
    """The row with the larger of device and host time as its time: at a small size launching is what takes."""
    if row.seconds is None or row.host_seconds is None:
        return row
    larger = Quantiles(*(max(pair) for pair in zip(row.seconds, row.host_seconds, strict=True)))
    return replace(row, seconds=larger, device_seconds=row.seconds)


def grid(rows: Iterable[Row], figure: Callable[[Row], str]) -> list[str]:
    """A line per case and pass, a column per contender; ours also as a multiple of eager's and compiled's speed."""
    rows = list(rows)
    contenders = list(dict.fromkeys(row.contender for row in rows))
    lines = []
    for (op, case, dtype, pass_), found in by_case(rows).items():
        cells = [figure(found[c]) if c in found and found[c].seconds else "–" for c in contenders]
        first = found.get(FASTGPT)
        ratios = [report.ratio(found, other, first) if first else "–" for other in (EAGER, COMPILED)]
        lines.append([op, case, dtype, pass_, *cells, *ratios])
    return table(("op", "case", "dtype", "pass", *contenders, "×eager", "×compiled"), lines)


def _with_host(row: Row) -> str:
    host = f", host {report.duration(row.host_seconds.median)}" if row.host_seconds else ""
    return report.duration(_median(row)) + host


def _median(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds.median
