"""Records and listings as text: table, json, jsonl, csv."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal, Protocol

from hiera_core.errors import OutputError, UsageError
from hiera_core.plain_data import to_json
from hiera_core.records import Record, error_json

from .exit_codes import ReaderGone, printable
from .text_tables import fit_table, format_table, stdout_width, wrap_line


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


ID = "id"  # the field of records from a manifest with such a column
FIXED = ("status", "kind", "model")  # columns of csv after those that say which input it is


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


class TableWriter:
    """Text for a terminal: the name of each input, and its results below it.

    Lines are broken between words where the terminal ends. Names of files stay whole, so that they
    can be copied.
    """

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream = stream
        self.width = stdout_width() if stream is sys.stdout else None
        self.bold, self.plain = ("\x1b[1m", "\x1b[0m") if stream.isatty() else ("", "")

    def write(self, record: Record) -> None:
        name = printable(record.input)
        failed = "  error" if record.error else ""
        if record.id is not None:
            name += f"  id {printable(str(record.id))}"
        notes = printable(f"({'; '.join(record.notes)})") if record.notes else ""
        fits = self.width is None or len(f"{name}{failed}  {notes}") <= self.width
        beside = f"  {notes}" if notes and fits else ""
        print(f"{self.bold}{name}{self.plain}{failed}{beside}", file=self.stream)
        if notes and not fits:
            self._print(notes)
        for prediction in record.topk:
            label = prediction.label if prediction.label is not None else "class"
            self._print(f"{prediction.prob:6.1%}  {label} ({prediction.id})", indent=10)
        for line in record.lines:
            self._print(line)
        for segment in record.segments or []:
            times = f"{_format_time(segment.start)} - {_format_time(segment.end)}"
            best = "  ".join(f"{p.prob:6.1%}  {p.label or p.id}" for p in segment.topk[:1])
            self._print(f"{times}  {best}", indent=len(times) + 12)

    def _print(self, text: str, indent: int = 4) -> None:
        """Print a line below the name of the input. `indent` is that of its further lines."""
        for line in wrap_line(f"  {printable(text)}", self.width, indent):
            print(line, file=self.stream)

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

    Segments and the task's own fields are JSON within their cell. `id` is one of these fields, and
    has a column of plain text beside the name of the input.
    """

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.named = ["input", "index", *([ID] if ID in details else []), *FIXED]
        columns = list(self.named)
        for rank in range(1, topk + 1):
            columns += [f"top{rank}_id", f"top{rank}_label", f"top{rank}_prob"]
        self.details = tuple(name for name in details if name != ID)
        columns += ["notes", "error_type", "error_message", "error_hint", "segments", *self.details]
        self.writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        self.writer.writeheader()
        # Python's writer quotes no carriage return, which is a line end to those who read it.
        self.quoting = csv.DictWriter(
            stream, columns, restval="", lineterminator="\n", quoting=csv.QUOTE_ALL
        )

    def write(self, record: Record) -> None:
        values: Mapping[str, object] = record.to_json()
        row = {name: values.get(name, "") for name in self.named}
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
        has_return = any("\r" in str(value) for value in row.values())
        (self.quoting if has_return else self.writer).writerow(row)

    def close(self) -> None: ...


WRITERS: dict[Format, Callable[[IO[str], int, tuple[str, ...]], Writer]] = {
    Format.table: TableWriter,
    Format.json: JsonWriter,
    Format.jsonl: JsonlWriter,
    Format.csv: CsvWriter,
}


def write_rows(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    format: Format,
    *,
    width: int | None = None,
    optional: Sequence[str] = (),
) -> str:
    """Return the rows of a listing (not records) as text.

    Args:
        rows: Rows with the same keys.
        columns: Keys that a table shows. The other formats hold all keys.
        format: Any format but `auto`.
        width, optional: See `fit_table`, for a table.
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
    cells = [[printable(_cell_text(row[c])) or "-" for c in columns] for row in rows]
    if width is None:
        return format_table(columns, cells)
    return fit_table(columns, cells, width, optional)


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
