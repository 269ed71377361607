"""Write measurements as text, JSON with every sample, CSV, Markdown, or a chart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import UsageError
from ..plain_data import to_json
from ..viz import charts
from .job import OURS
from .machine import Header
from .measurement import Measurement, significant

PLOT_ENDING = ".png"
MAX_READ_BYTES = 256 << 20  # a file for --compare holds every sample
# Maps a column name to the function that returns its text. The variant's column has no name.
COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "model": lambda m: m.model + m.at_size,
    "": lambda m: m.label,
    "dtype": lambda m: m.dtype,
    "batch": lambda m: str(m.batch),
    "inputs/s": lambda m: significant(m.throughput),
    "unreadable": lambda m: str(m.unreadable) if m.unreadable else "",
    "waiting": lambda m: "" if m.waiting is None else f"{m.waiting:.0%}",
    "x eager": lambda m: "" if m.speedup is None else f"{m.speedup:.2f}",
    "ours / peer": lambda m: (
        "" if m.ratio is None else f"{m.ratio:.2f}x ({m.ratio_low:.2f}-{m.ratio_high:.2f})"
    ),
    "p50 ms": lambda m: significant(m.latency_ms(50)),
    "p90 ms": lambda m: significant(m.latency_ms(90)),
    "p99 ms": lambda m: significant(m.latency_ms(99)),
    "MiB": lambda m: "" if m.memory_mib is None else f"{m.memory_mib:.0f}",
    "params": lambda m: "" if m.params is None else f"{m.params / 1e6:.1f}M",
    "GMACs": lambda m: significant(m.gmacs),
    "util.": lambda m: "" if m.utilisation is None else f"{m.utilisation:.0%}",
    "A100 (paper)": lambda m: "" if m.published is None else f"{m.published:g}",
    "runs": lambda m: str(len(m.samples_s)),
}
# Columns that are left out if they are empty in every row.
OPTIONAL = (
    "unreadable", "waiting", "x eager", "ours / peer", "p50 ms", "p90 ms", "p99 ms", "GMACs",
    "A100 (paper)", "MiB", "util.",
)  # fmt: skip


def cells(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row of text for each measurement. The row of a
    measurement that failed shows its error, and that of a peer without the model says so."""
    names = [
        name
        for name, show in COLUMNS.items()
        if name not in OPTIONAL or any(show(m) for m in measurements)
    ]
    rows = []
    for measurement in measurements:
        row = [COLUMNS[name](measurement) for name in names]
        if reason := measurement.error or measurement.unavailable:
            row[names.index("inputs/s")] = f"({reason})"
        rows.append(row)
    return names, rows


def notes(measurements: Sequence[Measurement]) -> list[str]:
    """Return the notes as lines of text, one for each measurement that has any."""
    return [f"{m.model} {m.label}: {'; '.join(m.notes)}" for m in measurements if m.notes]


def rows_as_markdown(measurements: Sequence[Measurement]) -> str:
    """Return a Markdown table."""
    names, rows = cells(measurements)
    return "".join("| " + " | ".join(row) + " |\n" for row in [names, ["---"] * len(names), *rows])


def markdown(header: Header, measurements: Sequence[Measurement]) -> str:
    """Return the header, a Markdown table and the notes."""
    text = "".join(f"{line}\n" for line in header.lines()) + "\n" + rows_as_markdown(measurements)
    return text + "".join(f"\n{note}\n" for note in notes(measurements))


def as_csv(header: Header, measurements: Sequence[Measurement]) -> str:
    """Return CSV with a row for each measurement, without its samples."""
    text = io.StringIO()
    values = [_flatten(measurement) for measurement in measurements]
    writer = csv.DictWriter(text, list(values[0]) if values else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def as_json(header: Header, measurements: Sequence[Measurement]) -> str:
    """Return JSON with the header and all measurements, with their samples."""
    document = {"header": header.to_json(), "rows": [m.to_json() for m in measurements]}
    return to_json(document, indent=1) + "\n"


# Maps a file extension to the function that returns the text of a file.
WRITERS: dict[str, Callable[[Header, Sequence[Measurement]], str]] = {
    ".json": as_json,
    ".csv": as_csv,
    ".md": markdown,
}


def check_ending(path: Path) -> None:
    """Check that the extension of a file to export is known.

    Raises:
        UsageError: The extension is unknown.
    """
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"unknown file extension in {path.name!r}", f"end it in {', '.join(WRITERS)}"
        )


def export(path: Path, header: Header, measurements: Sequence[Measurement]) -> None:
    """Write all measurements to a file, in the format of its extension.

    Raises:
        OutputError: The file cannot be written.
    """
    text = WRITERS[path.suffix.lower()](header, measurements)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: Path) -> list[Measurement]:
    """Read the measurements in a JSON file that `export` wrote.

    Raises:
        UsageError: The file does not exist, or `export` did not write it.
    """
    try:
        with path.open("rb") as file:
            document: Any = json.loads(file.read(MAX_READ_BYTES))
        measurements = [Measurement.from_json(values) for values in document["rows"]]
        if all(sample > 0 for m in measurements for sample in m.samples_s):
            return measurements
        raise ValueError("a sample is not above 0 seconds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{str(path)!r} holds no measurements", "give a file that --export NAME.json wrote"
        ) from error


def check_plot(path: Path) -> None:
    """Check that `plot` can draw to a file, before time is spent on measurements.

    Raises:
        UsageError: matplotlib is not installed, or the extension of the file is not .png.
    """
    if path.suffix.lower() != PLOT_ENDING:
        raise UsageError(f"unknown file extension in {path.name!r}", f"end it in {PLOT_ENDING}")
    charts.check_matplotlib()


def plot(path: Path, header: Header, measurements: Sequence[Measurement]) -> None:
    """Draw a chart of throughput and of latency (p50, p90, p99). Failed measurements are left out.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    good = [m for m in measurements if m.samples_s]
    labels = [f"{m.model.removeprefix('hiera_')} {m.label}, batch {m.batch}" for m in good]
    latencies = {f"p{p}": [m.latency_ms(p) or 0.0 for m in good] for p in (50, 90, 99)}
    charts.draw_bars(
        path,
        labels,
        [m.implementation == OURS for m in good],
        ("inputs/s", [m.throughput or 0.0 for m in good]),
        ("latency of a batch, ms", latencies),
        header.lines()[0],
    )


def _flatten(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement for a table: without samples, and with its notes as text."""
    values = measurement.to_json()
    del values["samples_s"], values["together_s"], values["rounds"]
    return {**values, "notes": "; ".join(measurement.notes)}
