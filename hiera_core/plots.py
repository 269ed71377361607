"""Figures of runs and measurements, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str) -> None:
    """A PNG with a panel for each quantity and a line for each of its curves.

    Raises:
        OutputError: it cannot be written.
    """
    figure = _figure(len(panels))
    for axes, (title, lines) in zip(figure.axes, panels.items(), strict=True):
        for label, (x, y) in lines.items():
            axes.plot(x, y, label=label, marker="o" if len(x) < 40 else None, markersize=3)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
        axes.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _figure(panels: int) -> Any:
    """Without pyplot: no window system is asked for, and nothing outlives the call."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels)
    return figure
