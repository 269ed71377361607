"""Records and listings as text: table, json, jsonl, csv."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal, Protocol

from hiera_core.errors import OutputError, UsageError
from hiera_core.plain_data import to_json
from hiera_core.records import Record, error_json

from .exit_codes import ReaderGone


class Format(StrEnum):
    """Values of --format."""

    auto = "auto"
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


ENDINGS = {
    ".jsonl": Format.jsonl,
    ".json": Format.json,
    ".csv": Format.csv,
    ".txt": Format.table,
}


def resolve_format(format: Format, path: Path | None) -> Format:
    """Return the format that `auto` stands for; other formats are returned as they are.

    For a file, its extension decides. Standard output gets a table if it is a terminal, else jsonl.

    Raises:
        UsageError: The extension is unknown.
    """
    if format is not Format.auto:
        return format
    if path is None:
        return Format.table if sys.stdout.isatty() else Format.jsonl
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(
            f"unknown file extension in {path.name!r}",
            f"end it in {', '.join(ENDINGS)}, or give --format",
        )
    return ENDINGS[path.suffix.lower()]


def print_text(text: str) -> None:
    """Write text to standard output.

    Raises:
        ReaderGone: The reader has closed it.
        OutputError: It cannot be written, for example because a disk is full.
    """
    with _stdout_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def flush_stdout() -> None:
    """Write what standard output still holds back. For errors, see `print_text`."""
    with _stdout_errors():
        sys.stdout.flush()


@contextlib.contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error
    except OSError as error:
        raise OutputError(
            f"standard output cannot be written ({error.strerror or error})"
        ) from error


def open_text(path: Path, mode: Literal["r", "w", "a"]) -> IO[str]:
    """Open a file of results. File names that are not UTF-8 are kept byte for byte. A link is not
    followed, because somebody else may have made it."""
    return open(
        path, mode, encoding="utf-8", errors="surrogateescape", newline="", opener=_open_no_link
    )


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Writer(Protocol):
    """Writes records to a stream in one format.

    Writers are created with the stream, the number of classes in a record, and the names of the
    task's own fields, for formats with fixed columns.
    """

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


def printable(name: str) -> str:
    """Return a name without control characters, which could drive a terminal: `\\x1b[31m.png`."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], name)


class TableWriter:
    """Text for a terminal: the name of each input, and its results below it."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream = stream
        self.bold, self.plain = ("\x1b[1m", "\x1b[0m") if stream.isatty() else ("", "")

    def write(self, record: Record) -> None:
        notes = f"  ({'; '.join(record.notes)})" if record.notes else ""
        failed = "  error" if record.error else ""
        name = printable(record.input)
        print(f"{self.bold}{name}{self.plain}{failed}{notes}", file=self.stream)
        for prediction in record.topk:
            label = prediction.label if prediction.label is not None else "class"
            print(f"  {prediction.prob:6.1%}  {label} ({prediction.id})", file=self.stream)
        for line in record.lines:
            print(f"  {line}", file=self.stream)
        for segment in record.segments or []:
            times = f"{_format_time(segment.start)} - {_format_time(segment.end)}"
            best = "  ".join(f"{p.prob:6.1%}  {p.label or p.id}" for p in segment.topk[:1])
            print(f"  {times}  {best}", file=self.stream)

    def close(self) -> None: ...


class JsonlWriter:
    """JSON lines: one object per record."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream = stream

    def write(self, record: Record) -> None:
        self.stream.write(to_json(record.to_json()) + "\n")

    def close(self) -> None: ...


class JsonWriter:
    """One JSON array, which is also written record by record."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream, self.separator = stream, "[\n"

    def write(self, record: Record) -> None:
        self.stream.write(f"{self.separator}  {to_json(record.to_json())}")
        self.separator = ",\n"

    def close(self) -> None:
        self.stream.write("[]\n" if self.separator == "[\n" else "\n]\n")


class CsvWriter:
    """CSV with one row per record and three columns per class.

    Segments and the task's own fields are JSON within their cell.
    """

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        columns = ["input", "index", "status", "kind", "model"]
        for rank in range(1, topk + 1):
            columns += [f"top{rank}_id", f"top{rank}_label", f"top{rank}_prob"]
        columns += ["notes", "error_type", "error_message", "error_hint", "segments", *details]
        self.details = details
        self.writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        self.writer.writeheader()

    def write(self, record: Record) -> None:
        values: Mapping[str, object] = record.to_json()
        row = {name: values[name] for name in ("input", "index", "status", "kind", "model")}
        for rank, prediction in enumerate(record.topk, start=1):
            row[f"top{rank}_id"] = prediction.id
            row[f"top{rank}_label"] = prediction.label or ""
            row[f"top{rank}_prob"] = prediction.prob
        row["notes"] = "; ".join(record.notes)
        if record.error is not None:
            row |= {f"error_{key}": value for key, value in error_json(record.error).items()}
        for name in ("segments", *self.details):
            if name in values:
                row[name] = to_json(values[name])
        self.writer.writerow(row)

    def close(self) -> None: ...


WRITERS: dict[Format, Callable[[IO[str], int, tuple[str, ...]], Writer]] = {
    Format.table: TableWriter,
    Format.json: JsonWriter,
    Format.jsonl: JsonlWriter,
    Format.csv: CsvWriter,
}


def write_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str], format: Format) -> str:
    """Return the rows of a listing (not records) as text.

    Args:
        rows: Rows with the same keys.
        columns: Keys that a table shows. The other formats hold all keys.
        format: Any format but `auto`.
    """
    if format is Format.json:
        return to_json(rows, indent=2) + "\n"
    if format is Format.jsonl:
        return "".join(to_json(row) + "\n" for row in rows)
    if format is Format.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell_text(value) for key, value in row.items()} for row in rows)
        return text.getvalue()
    return format_table(columns, [[_cell_text(row[c]) or "-" for c in columns] for row in rows])


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns, without borders. Lines are never wrapped.

    Args:
        columns: Headers of the columns.
        rows: Cells of each row, as many as there are columns.
    """
    # rich is imported here, because `hiera --help` must start fast and prints no table.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for column in columns:
        table.add_column(Text(column), no_wrap=True, overflow="ignore")
    for row in rows:
        # `Text` keeps brackets, which rich would take for markup in a plain string.
        table.add_row(*(Text(cell.expandtabs()) for cell in row))
    text = io.StringIO()
    # The width is beyond that of any table, so that rich does not cut it. With all these arguments,
    # the environment (FORCE_COLOR, TERM, COLUMNS) has no influence.
    console = Console(
        file=text,
        width=100_000,
        height=100,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().split("\n"))


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _format_time(seconds: float) -> str:
    """Return a position in a video: 62.5 -> 0:01:02.5."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02}:{rest:04.1f}"
