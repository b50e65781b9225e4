"""Loss curves as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

Curve = tuple[str, Sequence[float], Sequence[float], str]  # label, steps, losses, matplotlib format


def loss_plot(curves: Sequence[Curve], title: str, level: tuple[str, float] | None = None) -> bytes:
    """One line per curve over the steps; `level` is a labelled horizontal line. Losses in nats a token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, steps, losses, style in curves:
        axes.plot(steps, losses, style, label=label)
    if level is not None:
        axes.axhline(level[1], color="grey", linestyle=":", label=f"{level[0]}: {level[1]:.2f}")
    axes.set(title=title, xlabel="step", ylabel="loss, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
