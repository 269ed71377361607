"""Charts of training curves and of measurements, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import UsageError

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def check_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    _make_figure(1)


def draw_curves(path: Path, plots: Mapping[str, Mapping[str, Curve]], x_label: str) -> None:
    """Write a PNG with plots side by side, one for each quantity.

    Args:
        path: The file.
        plots: Maps the title of each plot to its curves, by label.
        x_label: Label of all x axes.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: The disk is full, or the folder cannot be written.
    """
    figure = _make_figure(len(plots))
    for axes, (title, curves) in zip(figure.axes, plots.items(), strict=True):
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label, marker="o" if len(x) < 40 else None, markersize=3)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_bars(
    path: Path,
    labels: Sequence[str],
    marked: Sequence[bool],
    rates: tuple[str, Sequence[float]],
    times: tuple[str, Mapping[str, Sequence[float]]],
    title: str,
) -> None:
    """Write a PNG with two plots on logarithmic axes: bars on the left, points on the right.

    Args:
        path: The file.
        labels: A label for each row.
        marked: Whether the bar of each row has the accent colour.
        rates: Label of the left axis, and the length of each row's bar.
        times: Label of the right axis, and a mapping from the name of each series to its values,
            one for each row.
        title: Title of the figure.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: The disk is full, or the folder cannot be written.
    """
    figure = _make_figure(2)
    figure.set_size_inches(12, 1.5 + 0.28 * max(4, len(labels)))
    rows = range(len(labels))
    left, right = figure.axes
    colours = ["tab:blue" if mark else "tab:gray" for mark in marked]
    left.bar_label(left.barh(rows, rates[1], color=colours), fmt="%.3g", padding=2, fontsize=8)
    for name, values in times[1].items():
        right.plot(values, rows, "o", markersize=4, label=name)
    right.legend()
    for axes, x_label in ((left, rates[0]), (right, times[0])):
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(x_label)
        axes.set_yticks(rows, labels, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _make_figure(plots: int) -> Any:
    """Return a figure with plots side by side.

    It does not use pyplot, which would ask for a window system and keep the figure in memory.

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
    figure = matplotlib.figure.Figure(figsize=(5.5 * plots, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, plots)
    return figure
