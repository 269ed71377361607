"""Read lists of files and labels, as spreadsheets, pandas, Kaggle and shells write them.

The rules, in order: what splits a line into cells; which row is a header; which column holds the
files, and which the labels; and where the files are. Files that exist decide more than names of
columns do. Where two columns could be the one that is looked for, nothing is guessed.
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
# A list may have several of these: those in the first row are preferred, then those in the second.
RANKED_LABEL_HEADERS = tuple(
    frozenset(words.split())
    for words in (
        "label labels",
        "class classes class_name class_id classid classname category category_id category_name",
        "target targets breed diagnosis species",
        "y",  # but not beside an `x`: then it is a coordinate
    )
)
LABEL_HEADERS = frozenset(("id",)).union(*RANKED_LABEL_HEADERS)
# pandas writes its index without a name, and reads it back under the second of these.
INDEX_HEADERS = frozenset(("", "unnamed: 0", "index", "idx", "#", "no", "row"))
JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
SEPARATORS = ",;\t|"
PROBED_ROWS = 20  # rows in which files are looked for
PROBED_CHARACTERS = 1 << 16  # in which the separator is looked for
MAX_BYTES = 256 << 20
MAX_COLUMNS = 1000
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
        UsageError: The list cannot be read, a line has no label, or several columns may hold the
            files or the labels. The message quotes the line.
    """
    try:
        return _read_rows(path, labelled)
    except _ListError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from error


class _ListError(UsageError):
    """A list cannot be read. The message does not name it yet."""


def _read_rows(path: Path, labelled: bool) -> list[ListedFile]:
    if path.suffix.lower() in JSON_ENDINGS:
        raise UsageError(
            f"{path} is a list in JSON", "write a .csv with the columns path and label"
        )
    # Excel's first line may say what separates the cells: `sep=;`.
    text = re.sub(r"\A\ufeff?\"?sep=.\"?\r?\n", "", _read_text(path))
    rows = list(_split_rows(text, path.suffix.lower()))
    if not rows:
        return []
    folder = path.parent
    body = rows[1:] if _is_header(rows, folder) else rows
    header = rows[0].cells if len(body) < len(rows) else ()
    file_column = _find_file_column(body[:PROBED_ROWS], header, folder)
    label_column = _find_label_column(body, header, file_column) if labelled else None
    finder = _FileFinder(folder, [_cell(row, file_column) for row in body[:PROBED_ROWS]])
    listed = []
    for row in body:
        name, label = _cell(row, file_column), _cell(row, label_column)
        if not name:
            continue
        if labelled and not label:
            raise _ListError(f"{_quote_missing(row)} has no label", "write `path label`")
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
    lines = _first_lines(text)
    first = next(iter(lines), "")
    separator = _find_separator(lines)
    spaced = re.search(r"\s", first.replace("\t", "").strip()) is not None
    if separator and separator != "\t" and (ending == ".csv" or not spaced):
        rows: Iterable[Sequence[str]] = _csv_rows(text, separator)
    elif separator == "\t" and (ending == ".csv" or first.count("\t") > 1):
        rows = _csv_rows(text, "\t")
    else:
        separator = "\t" if "\t" in first else None
        lines_of_text = io.StringIO(text, newline=None)
        rows = (line.strip("\r\n").rsplit(separator, 1) for line in lines_of_text)
    for number, cells in enumerate(rows, start=1):
        if not any(cells):  # lists may have many empty lines
            continue
        if len(cells) > MAX_COLUMNS:
            raise _ListError(f"line {number} has {len(cells)} cells", "give lines of `path,label`")
        stripped = tuple(cell.strip() for cell in cells)
        if any(stripped):
            yield Row(number, stripped)


def _csv_rows(text: str, separator: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        yield from reader
    except csv.Error as error:  # a cell of more than 128 KiB: a quote that is never closed
        raise _ListError(
            f"line {reader.line_num} cannot be read ({error})", "check its quotes"
        ) from error


def _first_lines(text: str) -> list[str]:
    """Return the first lines that are not empty."""
    start = text.lstrip()[:PROBED_CHARACTERS]
    lines = [line for line in start.splitlines() if line.strip()]
    if len(start) == PROBED_CHARACTERS and len(lines) > 1:
        lines.pop()  # it may be cut
    return lines[:PROBED_ROWS]


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
    """Return the column that holds files. If several or none do, the header says which; without a
    header, it is the first one that does not count the rows.

    Raises:
        _ListError: Several hold files, and the header does not say which to take.
    """
    width = max((len(row.cells) for row in body), default=1)
    counts = [sum(_may_be_file(_cell(row, i), folder) for row in body) for i in range(width)]
    holding = [i for i, count in enumerate(counts) if count and 2 * count >= max(counts)]
    if len(holding) == 1:
        return holding[0]
    words = [word.lower() for word in header]
    named = [i for i, word in enumerate(words) if word in PATH_HEADERS]
    named += [i for i, word in enumerate(words) if word == "id"]  # Kaggle's `id,label`
    for i in named:
        if i in holding or not holding:
            return i
    if holding:
        second = (row for row in body if _cell(row, holding[1]))
        raise _doubt("files", holding, header, next(second))
    return 1 if width > 2 and _is_index(body, header, 0) else 0


def _find_label_column(body: Sequence[Row], header: Sequence[str], file_column: int) -> int | None:
    """Return the column that holds labels: the one whose header says so, else the only one beside
    the files that is not empty and is not an index. None if there is no other column.

    Raises:
        _ListError: There are several.
    """
    words = [word.lower() for word in header]
    for ranked in RANKED_LABEL_HEADERS:
        for i, word in enumerate(words):
            if i != file_column and word in ranked and not (word == "y" and "x" in words):
                return i
    width = max((len(row.cells) for row in body), default=1)
    others = [i for i in range(width) if i != file_column and any(_cell(row, i) for row in body)]
    plain = [i for i in others if not (len(others) > 1 and _is_index(body, header, i))]
    if len(plain) > 1:
        both = (row for row in body if _cell(row, plain[0]) and _cell(row, plain[1]))
        raise _doubt("labels", plain, header, next(both, body[0]))
    return next(iter(plain or others), None)


def _doubt(what: str, columns: Sequence[int], header: Sequence[str], row: Row) -> _ListError:
    """Return the error that several columns may hold the files, or the labels."""
    first, second = (repr(header[i]) if i < len(header) else f"number {i + 1}" for i in columns[:2])
    message = f"columns {first} and {second} may both hold the {what}: {row}"
    return _ListError(message, "name the columns in a header: `path,label`")


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
