"""A plot per suite: the fraction of the limit over the size, a panel per form and pass."""

from __future__ import annotations

from pathlib import Path

from benchmarks import limits, report
from benchmarks.results import FASTGPT, Row, Run


def draw(suite: str, run: Run, path: Path) -> bool:
    """False where there is nothing to draw, or no matplotlib."""
    rows = [row for row in run.rows if row.seconds and row.pass_ in ("fwd", "bwd")]
    if suite not in ("memory", "attention", "decode") or not rows:
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    rates = limits.best(run.limits)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        size, form = _place(suite, row)
        line = panels.setdefault(f"{form} {row.pass_}", {}).setdefault(row.contender, [])
        line.append((size, report.fraction(row, rates)[0]))
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.2 * across, 3.0 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for (title, lines), axis in zip(panels.items(), axes.flat, strict=False):
        for name, points in lines.items():
            ours = name.startswith(FASTGPT)
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, marker="o", markersize=3, linewidth=2.2 if ours else 1.0, label=name)
        axis.set_title(title, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0.0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    figure.supylabel("fraction of the limit measured in the same run", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _place(suite: str, row: Row) -> tuple[int, str]:
    """(position on the axis, panel) from a case such as "32768x4096-residual" or "1x16x4096x128-causal"."""
    shape, _, form = row.case.partition("-")
    sizes = [int(size) for size in shape.split("x")]
    if suite == "attention":
        return sizes[2], f"head dim {sizes[3]} {form}"
    if suite == "decode":
        batch, _, kv_heads, queries, context = sizes[:5]
        return context, f"batch {batch}, {kv_heads} K/V heads, {queries} queries"
    return sizes[-1], f"{row.op} {form}"
