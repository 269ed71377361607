"""Rows of `hiera bench` on standard output as they become final, and its progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .exit_codes import print_message
from .output_formats import Format, print_text, write_rows
from .text_tables import fit_table, stdout_width, wrap_line

if TYPE_CHECKING:
    from rich.status import Status

    from hiera_core.benchmarking.machine import Header
    from hiera_core.benchmarking.measurement import Measurement

# Columns that a narrow terminal does not show, the first to go first.
OPTIONAL = [
    "runs", "params", "GMACs", "MiB", "util.", "A100 (paper)", "p90 ms", "p99 ms", "dtype",
    "p50 ms",
]  # fmt: skip


class ShownRows:
    """Prints rows on standard output.

    Rows of jsonl and csv, and those of a table that is not for a terminal, are printed when they
    come. JSON, and a table on a terminal, whose columns depend on all rows, are printed at the end.

    Args:
        header: The machine and the settings.
        format: The format.
        names: What is measured, for the width of a column.
    """

    def __init__(self, header: Header, format: Format, names: Sequence[str]) -> None:
        self._header, self._format = header, format
        self._width = stdout_width()
        self._longest = max(map(len, names), default=0)
        self._rows: list[Measurement] = []
        self._printed = ""  # what has been printed of a text that only grows
        self._columns: list[str] | None = None  # of the table that has been begun

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Print the rows of a model and a batch size, or keep them for the end."""
        self._rows += measurements
        if self._format is Format.jsonl:
            print_text(render(list(measurements), self._header, self._format))
        elif self._format is Format.csv:
            text = render(self._rows, self._header, self._format)
            print_text(text.removeprefix(self._printed))
            self._printed = text
        elif self._streams_table:
            self._print_lines(len(measurements))

    def end(self) -> None:
        """Print what has been kept."""
        if self._rows and (self._format is Format.json or self._is_table_for_terminal):
            print_text(render(self._rows, self._header, self._format, self._width))

    @property
    def _is_table_for_terminal(self) -> bool:
        return self._format is Format.table and self._width is not None

    @property
    def _streams_table(self) -> bool:
        return self._format is Format.table and self._width is None

    def _print_lines(self, count: int) -> None:
        """Print the last lines of a table, under a header if the columns are not those before."""
        names, rows = _cells_with_reasons(self._rows)
        padded = [names[0].ljust(self._longest), *names[1:]]
        first, *lines = fit_table(padded, rows, None).splitlines(keepends=True)
        is_new, self._columns = names != self._columns, names
        print_text("".join([*([first] if is_new else []), *lines[-count:]]))


def render(
    measurements: list[Measurement], header: Header, format: Format, width: int | None = None
) -> str:
    """Return measurements as text in a format. A table is at most `width` characters wide."""
    from hiera_core.benchmarking import report

    if format is Format.table:
        return _table(measurements, width)
    if format is Format.json:
        return report.as_json(header, measurements)
    if format is Format.csv:
        return report.as_csv(header, measurements)
    return write_rows([m.to_json() for m in measurements], [], format)


def _table(measurements: Sequence[Measurement], width: int | None) -> str:
    """Return the measurements as a table. The error of a failed one is at the end of its line,
    where it does not widen a column, or below the table if the width is limited."""
    names, rows = _cells_with_reasons(measurements)
    if width is None:
        return fit_table(names, rows, None)
    reasons = [row.pop() for row in rows]
    lines = [
        part
        for measurement, reason in zip(measurements, reasons, strict=True)
        for part in wrap_line(f"{measurement.model} {measurement.label}: {reason[1:-1]}", width, 4)
        if reason
    ]
    return fit_table(names[:-1], rows, width, OPTIONAL) + "".join(f"{line}\n" for line in lines)


def _cells_with_reasons(
    measurements: Sequence[Measurement],
) -> tuple[list[str], list[list[str]]]:
    """Return the cells of a table, with a last column without a name for why a row has no speed."""
    from hiera_core.benchmarking import report

    names, rows = report.cells(measurements)
    position = names.index("inputs/s")
    for measurement, row in zip(measurements, rows, strict=True):
        has_reason = measurement.error is not None or measurement.unavailable is not None
        row.append(row[position] if has_reason else "")
        if has_reason:
            row[position] = "-"
    return [*names, ""], rows


def summary(measurement: Measurement) -> str:
    """Return a row as a line of text."""
    from hiera_core.benchmarking.measurement import significant

    name = f"{measurement.model}{measurement.at_size} {measurement.label}".rstrip()
    reason = measurement.error or measurement.unavailable
    speed = f"{significant(measurement.throughput)} {measurement.unit}/s"
    return f"{name}, batch {measurement.batch}: {reason or speed}"


class Progress:
    """Progress on stderr. Where it is no terminal, a line for each model or peer that is prepared.
    Call it with the text of what is being done."""

    def __call__(self, text: str) -> None:
        if "preparing" in text:
            print_message(text)

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Show rows that are final."""


class NoProgress(Progress):
    """With --quiet, nothing is shown."""

    def __call__(self, text: str) -> None: ...


class LiveProgress(Progress):
    """On a terminal, the rows so far, and a line below them that changes.

    Args:
        status: The line, of rich.
    """

    def __init__(self, status: Status) -> None:
        self._status = status

    def __call__(self, text: str) -> None:
        from rich.markup import escape

        self._status.update(escape(text))

    def add(self, measurements: Sequence[Measurement]) -> None:
        for measurement in measurements:
            self._status.console.print(summary(measurement), markup=False, highlight=False)


@contextlib.contextmanager
def progress_line(show: bool) -> Iterator[Progress]:
    """Yield what shows progress on stderr while the block runs."""
    if not (show and sys.stderr.isatty()):
        yield Progress() if show else NoProgress()
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield LiveProgress(status)
