"""Measurements as files: json with every sample, csv, markdown, and a figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import UsageError
from ..viz import charts
from .job import OURS, Measurement
from .machine import Header

COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "model": lambda r: r.model,
    "": lambda r: r.label,
    "dtype": lambda r: r.dtype,
    "batch": lambda r: str(r.batch),
    "inputs/s": lambda r: _significant(r.throughput),
    "x eager": lambda r: "" if r.speedup is None else f"{r.speedup:.2f}",
    "ours is": lambda r: (
        "" if r.ratio is None else f"{r.ratio:.2f}x ({r.ratio_low:.2f}-{r.ratio_high:.2f})"
    ),
    "p50 ms": lambda r: _significant(r.latency_ms(50)),
    "p90 ms": lambda r: _significant(r.latency_ms(90)),
    "p99 ms": lambda r: _significant(r.latency_ms(99)),
    "MiB": lambda r: "" if r.memory_mib is None else f"{r.memory_mib:.0f}",
    "params": lambda r: "" if r.params is None else f"{r.params / 1e6:.1f}M",
    "GMACs": lambda r: _significant(r.gmacs),
    "util.": lambda r: "" if r.utilisation is None else f"{r.utilisation:.0%}",
    "A100 (paper)": lambda r: "" if r.published is None else f"{r.published:g}",
    "runs": lambda r: str(len(r.samples_s)),
}
# What the rows have nothing to say in is left out.
OPTIONAL = ("x eager", "ours is", "A100 (paper)", "MiB", "util.")


def cells(rows: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Column names and a row of text for each; rows that failed say why."""
    names = [
        name
        for name, show in COLUMNS.items()
        if name not in OPTIONAL or any(show(row) for row in rows)
    ]
    lines = []
    for row in rows:
        line = [COLUMNS[name](row) for name in names]
        if row.error is not None:
            line[names.index("inputs/s")] = f"({row.error})"
        lines.append(line)
    return names, lines


def table(rows: Sequence[Measurement]) -> str:
    """Aligned columns."""
    names, lines = cells(rows)
    for row, line in zip(rows, lines, strict=True):
        if row.error is not None:  # at the end, where it widens no column
            line.append(line[names.index("inputs/s")])
            line[names.index("inputs/s")] = "-"
    widths = [max(len(line[i]) for line in [names, *lines]) for i in range(len(names))]
    text = ""
    for line in [names, *lines]:
        padded = [cell.ljust(w) for cell, w in zip(line, widths, strict=False)]
        text += "  ".join([*padded, *line[len(names) :]]).rstrip() + "\n"
    return text


def notes(rows: Sequence[Measurement]) -> list[str]:
    return [f"{r.model} {r.label}: {'; '.join(r.notes)}" for r in rows if r.notes]


def rows_as_markdown(rows: Sequence[Measurement]) -> str:
    names, lines = cells(rows)
    table = [names, ["---"] * len(names), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def markdown(header: Header, rows: Sequence[Measurement]) -> str:
    text = "".join(f"{line}\n" for line in header.lines()) + "\n" + rows_as_markdown(rows)
    return text + "".join(f"\n{note}\n" for note in notes(rows))


def as_csv(header: Header, rows: Sequence[Measurement]) -> str:
    text = io.StringIO()
    values = [_flat(row) for row in rows]
    writer = csv.DictWriter(text, list(values[0]) if values else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def as_json(header: Header, rows: Sequence[Measurement]) -> str:
    document = {"header": header.to_json(), "rows": [row.to_json() for row in rows]}
    return json.dumps(document, indent=1) + "\n"


WRITERS: dict[str, Callable[[Header, Sequence[Measurement]], str]] = {
    ".json": as_json,
    ".csv": as_csv,
    ".md": markdown,
}


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending names a format."""
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"cannot tell a format from {path.name!r}", f"end it in {', '.join(WRITERS)}"
        )


def export(path: Path, header: Header, rows: Sequence[Measurement]) -> None:
    """Write all rows in the format of the file's ending.

    Raises:
        OutputError: it cannot be written.
    """
    text = WRITERS[path.suffix.lower()](header, rows)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: Path) -> list[Measurement]:
    """Rows of an earlier export.

    Raises:
        UsageError: no json that `export` wrote.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        return [Measurement.from_json(values) for values in document["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{str(path)!r} holds no measurements", "give a file that --export NAME.json wrote"
        ) from error


def plot(path: Path, header: Header, rows: Sequence[Measurement]) -> None:
    """Bars of throughput, and latency with its tail.

    Raises:
        OutputError: it cannot be written.
    """
    good = [row for row in rows if row.samples_s]
    labels = [f"{_short(row)}, {row.batch}" for row in good]
    times = {f"p{p}": [row.latency_ms(p) or 0.0 for row in good] for p in (50, 90, 99)}
    charts.draw_bars(
        path,
        labels,
        [row.implementation == OURS for row in good],
        ("inputs a second", [row.throughput or 0.0 for row in good]),
        ("latency of a batch, ms", times),
        header.lines()[0],
    )


def _short(row: Measurement) -> str:
    return f"{row.model.removeprefix('hiera_')} {row.label}"


def _flat(row: Measurement) -> dict[str, Any]:
    values = row.to_json()
    del values["samples_s"], values["rounds"]
    return {**values, "notes": "; ".join(row.notes)}


def _significant(value: float | None) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
