"""Figures of runs and measurements, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import UsageError

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str) -> None:
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
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _figure(panels: int) -> Any:
    """Return a figure with `panels` axes in a row.

    pyplot is not used, so there is no window system and no global state.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UsageError(
            "drawing charts needs matplotlib, which is not installed",
            "pip install 'hiera-toolkit[plots]'",
        ) from error
    figure = matplotlib.figure.Figure(figsize=(5.5 * panels, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels)
    return figure


def draw_bars(
    path: Path,
    labels: Sequence[str],
    marked: Sequence[bool],
    rates: tuple[str, Sequence[float]],
    times: tuple[str, Mapping[str, Sequence[float]]],
    title: str,
) -> None:
    """A PNG with two logarithmic panels: a bar of `rates` for each label (marked ones in another
    colour), and beside it a point for each of `times`.

    Raises:
        OutputError: it cannot be written.
    """
    figure = _figure(2)
    figure.set_size_inches(12, 1.5 + 0.28 * max(4, len(labels)))
    places = range(len(labels))
    left, right = figure.axes
    colours = ["tab:blue" if mark else "tab:gray" for mark in marked]
    left.bar_label(left.barh(places, rates[1], color=colours), fmt="%.3g", padding=2, fontsize=8)
    for name, values in times[1].items():
        right.plot(values, places, "o", markersize=4, label=name)
    right.legend()
    for axes, what in ((left, rates[0]), (right, times[0])):
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(what)
        axes.set_yticks(places, labels, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
