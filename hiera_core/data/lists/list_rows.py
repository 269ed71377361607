"""The rows of a list of files, one at a time, and what splits them into cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from ...errors import UsageError

SEPARATORS = ",;\t|"
PROBED_ROWS = 20  # rows in which files are looked for
PROBED_CHARACTERS = 1 << 16  # in which the separator is looked for
MAX_LINE = 1 << 20  # characters
EXCEL_LINE = re.compile(r"\ufeff?\"?sep=.\"?\r?\n")
MAX_COLUMNS = 1000
BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


class ListError(UsageError):
    """A list cannot be read. The message is what follows its name."""


class Row(NamedTuple):
    """A row of a list."""

    line: int  # counted from 1
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"line {self.line} ({', '.join(map(repr, self.cells))})"


class ListRows:
    """The rows of a list that are not empty, split into cells. They can be gone through again.

    In a .csv, and where the first line has a separator and no space, cells are separated as in CSV,
    by the separator that splits the first rows alike. Otherwise the last tab, or the last space,
    ends the path, because paths may hold spaces.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open_text(path) as file:
            lines = _first_lines(_lines(file))
        first = next(iter(lines), "")
        separator = _find_separator(lines)
        spaced = re.search(r"\s", first.replace("\t", "").strip()) is not None
        is_csv = path.suffix.lower() == ".csv"
        # What `csv.reader` splits at, and what `str.rsplit` does, where cells are not as in CSV.
        self._csv_separator, self._last_separator = None, None
        if separator and separator != "\t" and (is_csv or not spaced):
            self._csv_separator = separator
        elif separator == "\t" and (is_csv or first.count("\t") > 1):
            self._csv_separator = "\t"
        else:
            self._last_separator = "\t" if "\t" in first else None

    def __iter__(self) -> Iterator[Row]:
        with _open_text(self.path) as file:
            for number, cells in enumerate(self._split(_lines(file)), start=1):
                if not any(cells):  # lists may have many empty lines
                    continue
                if len(cells) > MAX_COLUMNS:
                    raise ListError(
                        f": line {number} has {len(cells)} cells", "give lines of `path,label`"
                    )
                stripped = tuple([cell.strip() for cell in cells])
                if any(stripped):
                    yield Row(number, stripped)

    def _split(self, lines: Iterator[str]) -> Iterator[list[str]]:
        if self._csv_separator is None:
            return (line.strip("\r\n").rsplit(self._last_separator, 1) for line in lines)
        return _csv_rows(lines, self._csv_separator)


def _open_text(path: Path) -> TextIO:
    """Open a list. File names that are not UTF-8 keep their bytes (surrogateescape).

    Raises:
        ListError: It cannot be opened.
    """
    try:
        file = path.open("rb")
        start = file.read(4)
        file.seek(0)
    except OSError as error:
        raise ListError(f" cannot be read ({error.strerror})") from error
    encoding = next((BOMS[bom] for bom in BOMS if start.startswith(bom)), "utf-8")
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(file, encoding, errors, newline="")


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines with their ends, but for Excel's first one, which may say what separates the
    cells: `sep=;`.

    Raises:
        ListError: This is no text, or a line is longer than a list has.
    """
    try:
        number, line = 1, file.readline(MAX_LINE)
        if not EXCEL_LINE.fullmatch(line):
            yield _checked(line, number)
        while line := file.readline(MAX_LINE):
            number += 1
            yield _checked(line, number)
    except UnicodeDecodeError as error:
        raise ListError(" is not a text file", "save it as UTF-8") from error
    except OSError as error:
        raise ListError(f" cannot be read ({error.strerror})") from error


def _checked(line: str, number: int) -> str:
    if "\0" in line:
        raise ListError(" is not a text file", "give lines of `path label`")
    if len(line) == MAX_LINE:
        raise ListError(f": line {number} cannot be read (too long)", "give lines of `path,label`")
    return line


def _csv_rows(lines: Iterator[str], separator: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        yield from reader
    except csv.Error as error:  # a cell of more than 128 KiB: a quote that is never closed
        raise ListError(
            f": line {reader.line_num} cannot be read ({error})", "check its quotes"
        ) from error


def _first_lines(lines: Iterator[str]) -> list[str]:
    """Return the first lines that are not empty, without their ends."""
    found: list[str] = []
    left = PROBED_CHARACTERS
    for text in lines:
        for line in (text if found else text.lstrip()).splitlines():
            if line.strip():
                found.append(line[:left])
                left -= len(line)
        if left <= 0 or len(found) >= PROBED_ROWS:
            break
    if left < 0 and len(found) > 1:
        found.pop()  # it is cut
    return found[:PROBED_ROWS]


def _find_separator(lines: Sequence[str]) -> str | None:
    """Return what separates cells: what splits the first lines into the same number of cells."""
    counts = {
        separator: {len(next(csv.reader([line], delimiter=separator), [])) for line in lines}
        for separator in SEPARATORS
    }
    alike = [
        separator
        for separator in SEPARATORS
        if len(counts[separator]) == 1 and counts[separator] != {1}
    ]
    some = [separator for separator in SEPARATORS if lines and separator in lines[0]]
    return next(iter(alike + some), None)
