"""Read lists of files and labels, as spreadsheets, pandas, Kaggle and shells write them.

The rules, in order: what splits a line into cells; which row is a header; which column holds the
files, and which the labels; and where the files are. Files that exist decide more than names of
columns do.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .media_types import ENDINGS

PATH_HEADERS = frozenset(
    "path paths file files filename file_name filepath file_path image images img image_path "
    "img_path image_name image_id image_file imageid id_code name video videos video_path "
    "video_id video_name clip youtube_id".split()
)
LABEL_HEADERS = frozenset(
    "label labels class classes class_name class_id classid classname category category_id "
    "category_name target targets breed diagnosis species id y".split()
)
# pandas writes its index without a name, and reads it back under the second of these.
INDEX_HEADERS = frozenset(("", "unnamed: 0", "index", "idx", "#", "no", "row"))
SEPARATORS = ",;\t|"
PROBED_ROWS = 20  # rows in which files are looked for
MAX_BYTES = 1 << 30
BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


@dataclass(frozen=True)
class Row:
    """A row of a list."""

    line: int  # counted from 1
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"line {self.line} ({', '.join(map(repr, self.cells))})"


@dataclass(frozen=True)
class ListedFile:
    """A file of a list, and its label: a class name or number; "" if there is none."""

    path: Path
    label: str


def read_list(path: Path, labelled: bool = True) -> list[ListedFile]:
    """Read a list of files. Paths are relative to the folder of the list.

    Args:
        path: The list: .csv, .tsv, .txt or another text file, in UTF-8 or UTF-16.
        labelled: Whether every file must have a label.

    Raises:
        UsageError: The list cannot be read, or a line has no label. The message quotes the line.
    """
    rows = list(_split_rows(_read_text(path), path.suffix.lower()))
    if not rows:
        return []
    folder = path.parent
    body = rows[1:] if _is_header(rows, folder) else rows
    header = rows[0].cells if len(body) < len(rows) else ()
    file_column = _find_file_column(body[:PROBED_ROWS], header, folder)
    label_column = _find_label_column(body, header, file_column)
    finder = _FileFinder(folder, [_cell(row, file_column) for row in body[:PROBED_ROWS]])
    listed = []
    for row in body:
        name, label = _cell(row, file_column), _cell(row, label_column)
        if not name:
            continue
        if labelled and not label:
            raise UsageError(f"{path}: {_quote_missing(row)} has no label", "write `path label`")
        listed.append(ListedFile(finder.find(name), label))
    return listed


def as_class_number(text: str) -> int | None:
    """Return the class index that a label is: `3`, or `3.0` as pandas writes numbers in a column
    with gaps. None if it is a name."""
    match = re.fullmatch(r"([0-9]{1,9})(\.0+)?", text)
    return int(match[1]) if match else None


def _quote_missing(row: Row) -> str:
    """`line 2`, and its cells if there are several."""
    return f"line {row.line}" if len(row.cells) < 2 else str(row)


def _cell(row: Row, column: int | None) -> str:
    return row.cells[column] if column is not None and column < len(row.cells) else ""


# Lines and cells ----------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    """Return the text of a list. File names that are not UTF-8 keep their bytes (surrogateescape).

    Raises:
        UsageError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB", "split it")
    encoding = next((BOMS[bom] for bom in BOMS if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file", "save it as UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{path} is not a text file", "give lines of `path label`")
    return text


def _split_rows(text: str, ending: str) -> Iterator[Row]:
    """Yield the rows that are not empty, split into cells.

    In a .csv, and where the first line has a separator and no space, cells are separated as in CSV,
    by the separator that splits the first rows alike. Otherwise the last tab, or the last space,
    ends the path, because paths may hold spaces.
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = _find_separator(text)
    spaced = re.search(r"\s", first.replace("\t", "").strip()) is not None
    if separator and separator != "\t" and (ending == ".csv" or not spaced):
        rows: Iterable[Sequence[str]] = _csv_rows(text, separator)
    elif separator == "\t" and (ending == ".csv" or first.count("\t") > 1):
        rows = _csv_rows(text, "\t")
    else:
        separator = "\t" if "\t" in first else None
        rows = (line.strip("\r\n").rsplit(separator, 1) for line in io.StringIO(text, newline=None))
    for number, cells in enumerate(rows, start=1):
        stripped = tuple(cell.strip() for cell in cells)
        if any(stripped):
            yield Row(number, stripped)


def _csv_rows(text: str, separator: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        yield from reader
    except csv.Error as error:  # a cell of more than 128 KiB: a quote that is never closed
        raise UsageError(
            f"line {reader.line_num} cannot be read ({error})", "check its quotes"
        ) from error


def _find_separator(text: str) -> str | None:
    """Return what separates cells: what splits the first lines into the same number of cells."""
    lines = [line for line in text.splitlines()[: PROBED_ROWS * 2] if line.strip()][:PROBED_ROWS]
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


# Columns ------------------------------------------------------------------------------------------


def _is_header(rows: Sequence[Row], folder: Path) -> bool:
    """Return whether the first row names the columns.

    It does if no cell of it is a file, and it either has usual names, or is unlike the rows below,
    in which there are files.
    """
    first = rows[0].cells
    if any(_may_be_file(cell, folder) for cell in first):
        return False
    words = [cell.lower() for cell in first]
    if words[0] in INDEX_HEADERS:
        words = words[1:]
    known = PATH_HEADERS | LABEL_HEADERS
    if words and words[0] in known and (len(words) < 2 or words[1] in known):
        return True
    below = rows[1 : 1 + PROBED_ROWS]
    return any(_may_be_file(cell, folder) for row in below for cell in row.cells)


def _may_be_file(cell: str, folder: Path) -> bool:
    """Return whether a cell has the extension of an image or video, or is a file."""
    return Path(cell).suffix.lower() in ENDINGS or (bool(cell) and _is_file(folder / cell))


def _find_file_column(body: Sequence[Row], header: Sequence[str], folder: Path) -> int:
    """Return the column that holds files: the one with the most of them, else the one whose header
    says so, else the first."""
    width = max((len(row.cells) for row in body), default=1)
    counts = [sum(_may_be_file(_cell(row, i), folder) for row in body) for i in range(width)]
    if max(counts, default=0):
        return counts.index(max(counts))
    named = [i for i, word in enumerate(header) if word.lower() in PATH_HEADERS]
    named += [i for i, word in enumerate(header) if word.lower() == "id"]  # Kaggle's `id,label`
    if named:
        return named[0]
    return 1 if width > 2 and _is_index(body, header, 0) else 0


def _find_label_column(body: Sequence[Row], header: Sequence[str], file_column: int) -> int | None:
    """Return the column that holds labels: the one whose header says so, else the first one beside
    the files that is not an index."""
    words = [word.lower() for word in header]
    for i, word in enumerate(words):
        if i != file_column and word in LABEL_HEADERS - {"id"}:
            return i
    width = max((len(row.cells) for row in body), default=1)
    others = [i for i in (*range(file_column + 1, width), *range(file_column)) if i != file_column]
    plain = [i for i in others if not (len(others) > 1 and _is_index(body, header, i))]
    return next(iter(plain or others), None)


def _is_index(body: Sequence[Row], header: Sequence[str], column: int) -> bool:
    """Return whether a column only counts the rows."""
    if column < len(header):
        return header[column].lower() in INDEX_HEADERS
    cells = [_cell(row, column) for row in body]
    start = as_class_number(cells[0]) if cells else None
    counted = [str(n) for n in range(start or 0, (start or 0) + len(cells))]
    return len(cells) > 1 and start in (0, 1) and cells == counted


# Files --------------------------------------------------------------------------------------------


class _FileFinder:
    """Finds the files of a list.

    Lists give them relative to their own folder, to a folder in it (`train/`, `images/`), without
    their extension (Kaggle), or with the backslashes of Windows. The first names that are tried
    show which.

    Args:
        folder: Folder of the list.
        names: The first files of the list, as it names them.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.base, self.ending, self.from_windows = folder, "", False
        if any(_is_file(folder / name) for name in names):
            return
        for name, from_windows in itertools.product(names, (False, True)):
            text = name.replace("\\", "/") if from_windows else name
            for base in self._bases():
                for ending in ("", *sorted(ENDINGS)):
                    if _is_file(base / (text + ending)):
                        self.base, self.ending, self.from_windows = base, ending, from_windows
                        return

    def find(self, name: str) -> Path:
        """Return the path of a file, whether it exists or not."""
        text = name.replace("\\", "/") if self.from_windows else name
        return self.base / (text + self.ending)

    def _bases(self) -> list[Path]:
        """Return the folder of the list, and the folders in it."""
        try:
            with os.scandir(self.folder) as entries:
                inner = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            inner = []
        return [self.folder, *(self.folder / name for name in inner[:100])]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False
