"""Tables and plots, made from a stored run alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row, Run, by_case, slower_than_eager
from fastgpt.testing.timing import Quantiles

MACHINE = ("device", "cpu", "cores", "threads", "simd", "torch_simd", "cpu_mhz", "gpu_clocks", "memory_gib")
SETUP = (
    "allocator",
    "load_average",
    "system",
    "python",
    "torch",
    "triton",
    "numpy",
    "commit",
    "dirty",
    "date",
)
COLUMNS = (
    *("case", "dtype", "pass", "contender", "time", "GB/s", "GFLOP/s", "of limit", "×eager", "×compiled"),
    *("faults", "peak MiB", "inputs", "error", "note"),
)
NOTES = """\
- Times are medians, in brackets p20 to p80. All contenders of a case ran in one process, in random order each round.
- `fwd` is the forward as training runs it (inputs require gradients); `bwd` is (fwd+bwd) − fwd, round by round.
- *of limit*: the time that the bytes and operations a call cannot do without take at the measured limits, over the
  time it took. Which limit binds is named. Calls that move 16 MiB or more have that limit measured in their own
  rounds, between the contenders; for the others it is the best of the run. A call whose data lies in a cache can
  exceed the limit of copying.
- With `keep_large_blocks` the `cpu` suite first makes the process own 6 GiB, as one that has run for a while does:
  the page faults of a growing heap are nobody's time here. Without it every large output is faulted in anew.
- *×eager*, *×compiled*: their median time over this one; above 1 this one is faster.
- *error*: the largest error over the allowed one, on this very case; ours is not timed above 1.
"""


def markdown(run: Run) -> str:
    rates = limits.best(run.limits)
    sections = [f"# Benchmark: {run.settings['suite']}"]
    sections.append("\n".join(f"- {line}" for line in environment_lines(run.environment)))
    sections.append("## Limits, measured in this run\n\n" + limit_table(run))
    tables = by_case(run.rows)
    for op in dict.fromkeys(row.op for row in run.rows):
        lines = [
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        for key in sorted((key for key in tables if key[0] == op), key=_order):
            lines += [_line(row, tables[key], rates) for row in tables[key].values()]
        sections.append(f"## {op}\n\n" + "\n".join(lines))
    if run.not_run:
        sections.append("## Not run\n\n" + "\n".join(f"- {line}" for line in run.not_run))
    sections.append("## Slower than eager PyTorch, beyond the noise\n\n" + verdict(run))
    sections.append("## How to read this\n\n" + NOTES + _mfu_note(run))
    return "\n\n".join(sections) + "\n"


def readme(run: Run) -> str:
    """A short table, a row per op and case: times faster than PyTorch eager and compiled, and of the limit."""
    rates = limits.best(run.limits)
    tables = by_case(run.rows)
    columns = [(dtype, pass_) for dtype in ("fp32", "bf16") for pass_ in ("fwd", "fwd+bwd")]
    heads = ["op", "case", *(f"{dtype} {pass_}" for dtype, pass_ in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for op, case in dict.fromkeys(key[:2] for key in sorted(tables, key=_order)):
        cells = []
        for dtype, pass_ in columns:
            table = tables.get((op, case, dtype, pass_))
            if table is None and pass_ == "fwd+bwd":  # a training step is both at once
                table = tables.get((op, case, dtype, "step"))
            row = None if table is None else table.get(FASTGPT)
            if table is None or row is None or row.seconds is None:
                cells.append("–")
                continue
            share = of_limit(row, rates).split()[0]
            cells.append(f"{ratio(table, EAGER, row)} / {ratio(table, COMPILED, row)} ({share})")
        lines.append("| " + " | ".join([op, case, *cells]) + " |")
    lines += [
        "",
        "Each cell: times as fast as PyTorch eager / compiled (fraction of the limit measured in the same run: copy"
        " bandwidth, for attention and the training step the best matrix product).",
    ]
    env = run.environment
    machine = env["cpu"] if env["device"] == "cpu" else env["device"]
    where = f"{machine}, {env['threads']} threads, torch {env['torch']}"
    best = ", ".join(f"{name} {rate(name, value)}" for name, value in rates.items())
    lines += ["", f"Measured on {where}, allocator: {env['allocator']}, {env['date'][:10]}. Limits: {best}."]
    return "\n".join(lines) + "\n"


def plot(run: Run, path: Path) -> None:
    """Fraction of the limit, a panel per op; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = limits.best(run.limits)
    tables = {key: table for key, table in by_case(run.rows).items() if key[3] in ("fwd", "fwd+bwd", "step")}
    ops = list(dict.fromkeys(key[0] for key in tables))
    counts = [sum(key[0] == op for key in tables) for op in ops]
    height = sum(counts) * 0.32 + 0.9 * len(ops) + 0.5
    figure, axes = plt.subplots(
        len(ops),
        1,
        figsize=(10, height),
        squeeze=False,
        height_ratios=[n + 2 for n in counts],
        layout="constrained",
    )
    colours = {FASTGPT: "tab:blue", EAGER: "tab:gray", COMPILED: "tab:orange"}
    for op, axis in zip(ops, axes[:, 0], strict=True):
        keys = sorted((key for key in tables if key[0] == op), key=_order)
        for i, (contender, colour) in enumerate(colours.items()):
            rows = [tables[key].get(contender) for key in keys]
            values = [fraction(row, rates)[0] if row and row.seconds else 0.0 for row in rows]
            places = [n + (i - 1) * 0.27 for n in range(len(keys))]
            axis.barh(places, values, 0.27, color=colour, label=contender)
        axis.set_yticks(range(len(keys)), [" ".join(key[1:]) for key in keys], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(op, loc="left", fontsize=9)
        axis.axvline(1.0, color="black", linewidth=0.6)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("fraction of the limit measured in the same run")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def progress(rows: Iterable[Row], measured: list[dict[str, Any]]) -> str:
    """A line per case for the terminal, while the run goes on."""
    rates = limits.best(measured)
    lines = []
    for (op, case, dtype, pass_), table in by_case(rows).items():
        cells = []
        for row in table.values():
            name = row.contender + (f" [{row.backend}]" if row.backend and row.contender == FASTGPT else "")
            if row.seconds is None:
                cells.append(f"{name}: {row.note or 'not timed'}")
                continue
            cells.append(f"{name} {duration(row.seconds.median)}" + (f" ({row.note})" if row.note else ""))
        ours = table.get(FASTGPT)
        if ours and ours.seconds:
            cells.append(f"{ratio(table, EAGER, ours)}× eager, {of_limit(ours, rates)}")
        lines.append(f"{op} {case} {dtype} {pass_:<7} " + " | ".join(cells))
    return "\n".join(lines)


def verdict(run: Run) -> str:
    found = slower_than_eager(run.rows)
    if not found:
        timed = [row for row in run.rows if row.contender == FASTGPT and row.seconds and row.pass_ != "bwd"]
        return f"none of {len(timed)} timed cases."
    lines = []
    for ours, eager in found:
        assert ours.seconds is not None
        assert eager.seconds is not None
        times = f"{duration(ours.seconds.median)} [{ours.backend}] against {duration(eager.seconds.median)}"
        slower = ours.seconds.median / eager.seconds.median
        lines.append(f"- {' '.join(ours.case_key)}: {times}, {slower:.2f} times as long")
    return "\n".join(lines)


def limit_table(run: Run) -> str:
    lines = ["| limit | " + " | ".join(entry["when"] for entry in run.limits) + " | used |"]
    lines.append("|---" * (len(run.limits) + 2) + "|")
    best = limits.best(run.limits)
    for name, text in limits.NAMES.items():
        cells = [f"{rate(name, entry[name]['rate'])} ({entry[name]['way']})" for entry in run.limits]
        lines.append(f"| {text} | " + " | ".join(cells) + f" | {rate(name, best[name])} |")
    return "\n".join(lines)


def fraction(row: Row, rates: Mapping[str, float]) -> tuple[float, str]:
    """Of the binding limit, and its name."""
    assert row.seconds is not None
    name, seconds = limits.binding(row.moved, row.flops, row.dtype, {**rates, **row.limits})
    return seconds / row.seconds.median, name if name == "copy" else "product"


def environment_lines(environment: Mapping[str, object]) -> list[str]:
    return [
        f"{name}: {environment[name]}" for name in (*MACHINE, *SETUP) if environment.get(name) is not None
    ]


def of_limit(row: Row, rates: Mapping[str, float]) -> str:
    value, name = fraction(row, rates)
    return f"{value:.2f} of {name}"


def ratio(table: Mapping[str, Row], other: str, row: Row) -> str:
    """The other contender's time over this one's."""
    reference = table.get(other)
    if reference is None or reference.seconds is None or row.seconds is None:
        return "–"
    return f"{reference.seconds.median / row.seconds.median:.2f}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def rate(name: str, value: float) -> str:
    return f"{value * 1e-9:.4g} {'GB/s' if name in ('copy', 'read') else 'GFLOP/s'}"


def _line(row: Row, table: Mapping[str, Row], rates: Mapping[str, float]) -> str:
    name = row.contender + (f" [{row.backend}]" if row.backend and row.contender == FASTGPT else "")
    cells = [row.case, row.dtype, row.pass_, name]
    if row.seconds is None:
        cells += ["–"] * 8
    else:
        cells.append(
            _time(row.seconds) + (f", host {duration(row.host_seconds.median)}" if row.host_seconds else "")
        )
        cells.append(f"{row.moved / row.seconds.median * 1e-9:.1f}" if row.moved else "–")
        cells.append(f"{row.flops / row.seconds.median * 1e-9:.1f}")
        cells += [of_limit(row, rates), ratio(table, EAGER, row), ratio(table, COMPILED, row)]
        cells.append("–" if row.minor_faults is None else f"{row.minor_faults:.0f}")
        cells.append("–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}")
    tokens = f"{row.tokens / row.seconds.median:,.0f} tokens/s" if row.tokens and row.seconds else ""
    note = "; ".join(filter(None, (tokens, row.note)))
    cells += [row.inputs, "–" if row.error is None else f"{row.error:.2g}", note]
    return "| " + " | ".join(cells) + " |"


def _time(seconds: Quantiles) -> str:
    return f"{duration(seconds.median)} ({duration(seconds.p20)}–{duration(seconds.p80)})"


def _mfu_note(run: Run) -> str:
    if not any(row.tokens for row in run.rows):
        return ""
    return (
        "- *of limit* of a training step is its MFU: 6·N·tokens / seconds / best matrix product measured in that\n"
        "  dtype, where N counts the parameters without the positions' table.\n"
    )


def _order(key: tuple[str, str, str, str]) -> tuple[str, str, list[int], str, int]:
    """Small shapes before large ones within a form."""
    op, case, dtype, pass_ = key
    shape, _, form = case.partition("-")
    sizes = [int(size) for size in shape.split("x")] if shape.replace("x", "").isdigit() else []
    return op, form, sizes, dtype, ("fwd", "bwd", "fwd+bwd", "step").index(pass_)
