"""The rows of a list of files, one at a time, and what splits them into cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from ...errors import UsageError
from ...plain_data import PROBED_BYTES, TABLE_PREAMBLE, text_encoding
from ..media_types import ENDINGS

SEPARATORS = ",;\t|"
PROBED_ROWS = 20  # rows in which files are looked for
PROBED_CHARACTERS = 1 << 16  # in which the separator is looked for
MAX_LINE = 1 << 20  # characters
MAX_COLUMNS = 1000
# Parts of a data set: columns and lists of these names are no classes.
PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "holdout"))
JSON_START = re.compile(r"\s*(\{\s*\"|\[\s*[\[{\"]|[\[{]\s*$)")
SPACE = re.compile(r"\s+")
KNOWN_ENDINGS = tuple(ENDINGS)  # the form that `str.endswith` takes
LONGEST_ENDING = max(map(len, ENDINGS))
# What spreadsheets are, if they are not text.
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


class ListError(UsageError):
    """A list cannot be read. The message is what follows its name."""


class Row(NamedTuple):
    """A row of a list."""

    number: int  # counted from 1
    cells: tuple[str, ...]
    unit: str = "line"  # what is counted

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"

    def __str__(self) -> str:
        return f"{self.place} ({', '.join(map(repr, self.cells))})"


class ListRows:
    """The rows of a list that are not empty, split into cells. They can be gone through again.

    In a .csv, and where the first line has a separator and no space, cells are separated as in CSV,
    by the separator that splits the first rows alike. Otherwise the last tab ends the path, or the
    last space behind an extension of images and videos, because paths and labels may hold spaces,
    or else the last space.

    Args:
        path: The list.
        has_paths_alone: Whether a line that is not separated as in CSV is a path, also with spaces.
    """

    has_header: bool | None = None  # that is to be found out

    def __init__(self, path: Path, has_paths_alone: bool = False) -> None:
        self.path, self._has_paths_alone = path, has_paths_alone
        with _open_text(path) as file:
            lines = _first_lines(_lines(file))
        first = next(iter(lines), "")
        separator = _find_separator(lines)
        self.is_json = JSON_START.match(first) is not None
        spaced = re.search(r"\s", first.replace("\t", "").strip()) is not None
        spaced = spaced and not (separator and _separates_paths(lines, separator))
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
        is_tabbed = self._last_separator is not None
        if self._csv_separator is None and self._has_paths_alone and not is_tabbed:
            return ([line] for line in lines)
        if self._csv_separator is None:
            return (_split_path(line.strip("\r\n"), self._last_separator) for line in lines)
        return _csv_rows(lines, self._csv_separator)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of a list, from 1, and the line with its end.

    Raises:
        ListError: It cannot be opened, or is no text.
    """
    with _open_text(path) as file:
        yield from enumerate(_lines(file), start=1)


def _split_path(line: str, separator: str | None) -> list[str]:
    """`my cat.png golden retriever` -> [`my cat.png`, `golden retriever`]"""
    if separator is not None:
        return line.rsplit(separator, 1)
    text, end = line.strip(), None
    for space in SPACE.finditer(text):
        start = space.start()
        if text[max(0, start - LONGEST_ENDING) : start].lower().endswith(KNOWN_ENDINGS):
            end = space
    return [text[: end.start()], text[end.end() :]] if end else text.rsplit(None, 1)


def _open_text(path: Path) -> TextIO:
    """Open a list. File names that are not UTF-8 keep their bytes (surrogateescape).

    Raises:
        ListError: It cannot be opened.
    """
    try:
        file = path.open("rb")
        start = file.read(PROBED_BYTES)
        file.seek(0)
    except OSError as error:
        raise ListError(f" cannot be read ({error.strerror})") from error
    if start[:4] in SPREADSHEETS:
        file.close()
        raise ListError(" is a spreadsheet or an archive, not a text file", "save it as CSV")
    encoding = text_encoding(start)
    errors = "strict" if encoding.startswith("utf-16") else "surrogateescape"
    return io.TextIOWrapper(file, encoding, errors, newline="")


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines with their ends, but for a first one that is no row; see `TABLE_PREAMBLE`.

    Raises:
        ListError: This is no text, or a line is longer than a list has.
    """
    try:
        number, line = 1, file.readline(MAX_LINE)
        if not TABLE_PREAMBLE.fullmatch(line):
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


def _separates_paths(lines: Sequence[str], separator: str) -> bool:
    """Return whether each line below the first has a path with a known extension as one of its
    cells. So it has if the paths have spaces, but not if a label has the separator."""
    rows = [next(csv.reader([line], delimiter=separator), []) for line in lines]
    return all(
        any(Path(cell).suffix.lower() in ENDINGS for cell in row) for row in rows[1:] or rows
    )


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
