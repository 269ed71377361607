"""Charts of training curves and of measurements, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import UsageError

SHADES = ("#1f77b4", "#f2a23a", "#b8322b")  # of the series in a chart of bars
MAX_HEIGHT = 200.0  # of a chart, in inches
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
    """Write a PNG with two bar charts on linear axes that begin at 0: one bar for each row on the
    left, and a bar for each series of a row on the right, one below the other.

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
    series = times[1]
    # In inches; a row on the right has a bar of a readable height for each series.
    row_height = 0.16 * len(series) + 0.14
    height = min(MAX_HEIGHT, 1.6 + row_height * max(2, len(labels)))
    figure.set_size_inches(13, height)
    rows = range(len(labels))
    left, right = figure.axes
    colours = ["tab:blue" if mark else "tab:gray" for mark in marked]
    bars = left.barh(rows, rates[1], color=colours, height=0.7)
    left.bar_label(bars, fmt=_plain_number, padding=2, fontsize=8)
    thickness = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * thickness
        places = [row + offset for row in rows]
        shade = SHADES[number % len(SHADES)]
        bars = right.barh(places, values, height=thickness, label=name, color=shade)
        right.bar_label(bars, fmt=_plain_number, padding=2, fontsize=7)
    if labels:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    for axes, x_label in ((left, rates[0]), (right, times[0])):
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.set_yticks(rows, labels if axes is left else [""] * len(labels), fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _plain_number(value: float) -> str:
    """Format a number with three digits and no exponent: 0.123, 1.23, 123, 1234."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


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
