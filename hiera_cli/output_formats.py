"""Records and listings as text: table, json, jsonl, csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from enum import StrEnum
from typing import IO, Any, Protocol

from hiera_core.records import Record


class Format(StrEnum):
    auto = "auto"
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Writer(Protocol):
    """Puts records on a stream in one format."""

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


class TableWriter:
    """For people: the input's name, then its classes."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream = stream
        self.bold, self.plain = ("\x1b[1m", "\x1b[0m") if stream.isatty() else ("", "")

    def write(self, record: Record) -> None:
        notes = f"  ({'; '.join(record.notes)})" if record.notes else ""
        failed = "  error" if record.error else ""
        print(f"{self.bold}{record.input}{self.plain}{failed}{notes}", file=self.stream)
        for guess in record.topk:
            label = guess.label if guess.label is not None else "class"
            print(f"  {guess.prob:6.1%}  {label} ({guess.id})", file=self.stream)
        for line in record.lines:
            print(f"  {line}", file=self.stream)
        for segment in record.segments or []:
            times = f"{_clock(segment.start)} - {_clock(segment.end)}"
            best = "  ".join(f"{g.prob:6.1%}  {g.label or g.id}" for g in segment.topk[:1])
            print(f"  {times}  {best}", file=self.stream)

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream = stream

    def write(self, record: Record) -> None:
        self.stream.write(json.dumps(record.to_json()) + "\n")

    def close(self) -> None: ...


class JsonWriter:
    """One JSON array, still written record by record."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        self.stream, self.lead = stream, "[\n"

    def write(self, record: Record) -> None:
        self.stream.write(f"{self.lead}  {json.dumps(record.to_json())}")
        self.lead = ",\n"

    def close(self) -> None:
        self.stream.write("[]\n" if self.lead == "[\n" else "\n]\n")


class CsvWriter:
    """One row an input, three columns a class; what a task says besides as JSON."""

    def __init__(self, stream: IO[str], topk: int, details: tuple[str, ...] = ()) -> None:
        columns = ["input", "index", "status", "kind", "model"]
        for rank in range(1, topk + 1):
            columns += [f"top{rank}_id", f"top{rank}_label", f"top{rank}_prob"]
        columns += ["notes", "error_type", "error_message", "error_hint", "segments", *details]
        self.details = details
        self.writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        self.writer.writeheader()

    def write(self, record: Record) -> None:
        values: dict[str, Any] = {**record.to_json()}
        row: dict[str, Any] = {k: values[k] for k in ("input", "index", "status", "kind", "model")}
        for rank, guess in enumerate(record.topk, start=1):
            row[f"top{rank}_id"] = guess.id
            row[f"top{rank}_label"] = guess.label or ""
            row[f"top{rank}_prob"] = guess.prob
        row["notes"] = "; ".join(record.notes)
        row |= {f"error_{k}": v for k, v in (values["error"] or {}).items()}
        for name in ("segments", *self.details):
            if name in values:
                row[name] = json.dumps(values[name])
        self.writer.writerow(row)

    def close(self) -> None: ...


WRITERS: dict[Format, Callable[[IO[str], int, tuple[str, ...]], Writer]] = {
    Format.table: TableWriter,
    Format.json: JsonWriter,
    Format.jsonl: JsonlWriter,
    Format.csv: CsvWriter,
}


def write_rows(rows: list[dict[str, Any]], columns: list[str], format: Format) -> str:
    """Rows of a listing (not records) as text in a format."""
    if format is Format.json:
        return json.dumps(rows, indent=2) + "\n"
    if format is Format.jsonl:
        return "".join(json.dumps(row) + "\n" for row in rows)
    if format is Format.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
        return text.getvalue()
    cells = [columns] + [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join((c or "-").ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _clock(seconds: float) -> str:
    """62.5 -> 0:01:02.5"""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02}:{rest:04.1f}"
