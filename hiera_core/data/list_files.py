"""Read lists of files and labels, as spreadsheets, pandas, Kaggle, COCO and shells write them.

The rules, in order: what splits a line into cells; which row is a header; which column holds the
files, and which the labels; and where the files are. Files that exist decide more than names of
columns do. Where two columns could be the one that is looked for, nothing is guessed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..places.remote_requests import is_remote, is_web, path_of_file_url
from .lists.json_rows import JsonRows
from .lists.list_rows import PARTS, PROBED_ROWS, ListError, ListRows, Row
from .media_types import ENDINGS, JSON_ENDINGS

# Words of headers, in the form that `_word` gives them.
PATH_HEADERS = frozenset(
    "path paths file files filename filepath image images img imagepath imgpath imagename imgname "
    "imageid imagefile idcode name video videos videopath videoid videoname clip "
    "youtubeid".split()
)
# A list may have several of these: those in the first row are preferred, then those in the second.
RANKED_LABEL_HEADERS = tuple(
    frozenset(words.split())
    for words in (
        "label labels labelname labelnames classlabel groundtruth gt truelabel",
        "class classes classname category categoryname",
        "target targets targetname breed diagnosis species",
        "labelid labelidx labelindex classid classidx classindex classnumber categoryid "
        "categoryidx targetid targetidx",
        "choice",  # Label Studio
        "y",  # but not beside an `x`: then it is a coordinate
    )
)
LABEL_HEADERS = frozenset(("id",)).union(*RANKED_LABEL_HEADERS)
# pandas writes its index without a name, and reads it back under the second of these.
INDEX_HEADERS = frozenset(("", "unnamed0", "index", "idx", "no", "row"))
# Columns of these names hold facts about the files, not classes.
FACTS = frozenset("size filesize bytes width height".split())
# Cells of columns of which each is a class.
MARKS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
URL_HEADERS = frozenset("url urls uri imageurl imageuri videourl".split())  # where no path is
ENDINGS_OF_TABLES = (".csv", ".tsv")
Table = ListRows | JsonRows


@dataclass(frozen=True)
class ListedFile:
    """A file of a list, and its label: a class name or number; "" if there is none."""

    path: Path
    label: str


@dataclass(frozen=True)
class OpenedList:
    """A list that is read line by line.

    Attributes:
        base: Folder that the files are relative to.
        example: Path of the first file: it shows how names are completed.
        files: File within `base`, and label, of each line; see `ListedFile`.
    """

    base: Path
    example: str
    files: Iterator[tuple[str, str]]


def read_list(path: Path, labelled: bool = True) -> list[ListedFile]:
    """Read a list of files. Paths are relative to the folder of the list.

    Args:
        path: The list: .csv, .tsv, .txt or another text file, in UTF-8 or UTF-16, or in JSON.
        labelled: Whether every file must have a label.

    Raises:
        UsageError: The list cannot be read, a line has no label, or several columns may hold the
            files or the labels. The message quotes the line.
    """
    opened = open_list(path, labelled)
    return [ListedFile(opened.base / name, label) for name, label in opened.files]


def open_list(path: Path, labelled: bool = True) -> OpenedList:
    """Open a list of any length, of which one line at a time is in memory; see `read_list`.

    Where no header names the labels, all lines are read once more, to find their column, when the
    first file is asked for.

    Raises:
        UsageError: See `read_list`. Reading the files can raise it, too.
    """
    with _named(path):
        table = _open_table(path, labelled)
        header, probed = _probe(table, path.parent)
        file_column = _find_file_column(probed, header, path.parent)
        names = [_cell(row, file_column) for row in probed]
        finder = _FileFinder(path.parent, names)
    example = str(finder.base / finder.complete(next(iter(names), "")))

    def files() -> Iterator[tuple[str, str]]:
        with _named(path):
            label_of = _find_labels(table, header, file_column) if labelled else _no_label
            for row in _body(table, header):
                name, label = _cell(row, file_column), label_of(row)
                if not _has_file(name, table, row):
                    continue
                if labelled:
                    _check_label(row, label)
                if is_web(name) or is_remote(name):
                    raise ListError(
                        f": {row.place} is a URL ({name})", "download the files, and list them"
                    )
                yield finder.complete(name), label

    return OpenedList(finder.base, example, files())


def read_paths(path: Path) -> Iterator[str]:
    """Yield the paths and URLs of a table, in JSON or as in CSV, as they stand in it.

    Raises:
        UsageError: The list cannot be read, or several columns may hold the files.
    """
    with _named(path):
        is_json = is_json_list(path)
        table = _open_table(path, False) if is_json else ListRows(path, has_paths_alone=True)
        header, probed = _probe(table, Path())
        column = _find_file_column(probed, header, Path())
        for row in _body(table, header):
            if _has_file(name := _cell(row, column), table, row):
                yield name


def is_table(path: Path) -> bool:
    """Return whether a file is a list whose rows have cells, by its name."""
    return is_json_list(path) or path.suffix.lower() in ENDINGS_OF_TABLES


def is_json_list(path: Path) -> bool:
    """Return whether a file is a list in JSON, by its name."""
    return path.suffix.lower() in JSON_ENDINGS


def _open_table(path: Path, labelled: bool) -> Table:
    """Return the rows of a list, which is in JSON by its name or by its first line."""
    if not is_json_list(path):
        rows = ListRows(path)
        if not rows.is_json:
            return rows
    return JsonRows(path, _is_path_key, _is_label_key, labelled)


def _probe(table: Table, folder: Path) -> tuple[Sequence[str], Sequence[Row]]:
    """Return the header of a table, and the first rows below it."""
    probed = list(itertools.islice(table, 1 + PROBED_ROWS))
    has_header = table.has_header
    if has_header is None:
        has_header = bool(probed) and _is_header(probed, folder)
    header = probed.pop(0).cells if has_header and probed else ()
    return header, probed[:PROBED_ROWS]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the name of the list before the message of an error within the block."""
    try:
        yield
    except ListError as error:
        raise UsageError(f"{path}{error.message}", error.hint) from error


def as_class_number(text: str) -> int | None:
    """Return the class index that a label is: `3`, or `3.0` as pandas writes numbers in a column
    with gaps. None if it is a name."""
    match = re.fullmatch(r"([0-9]{1,9})(\.0+)?", text)
    return int(match[1]) if match else None


def _is_path_key(key: str) -> bool:
    """Return whether an object of JSON has a path or URL under this key."""
    return _word(key) in PATH_HEADERS | URL_HEADERS


def _is_label_key(key: str) -> bool:
    """Return whether an object of JSON has a label under this key."""
    return any(_word(key) in words for words in RANKED_LABEL_HEADERS)


def _word(cell: str) -> str:
    """Return a cell of a header in the form of the tables above: `Class ID` and `class_id` are
    `classid`."""
    return re.sub(r"[\W_]+", "", cell.lower())


def _quote_missing(row: Row) -> str:
    """`line 2`, and its cells if there are several."""
    return row.place if len(row.cells) < 2 else str(row)


def _has_file(name: str, table: Table, row: Row) -> bool:
    """Return whether a row names a file. Tables of spreadsheets have rows that do not.

    Raises:
        ListError: It does not, and the list is in JSON: its path is under another key, or no text.
    """
    if not name and isinstance(table, JsonRows):
        raise ListError(f": {row} has no path", "give each entry its path under the same key")
    return bool(name)


def _check_label(row: Row, label: str) -> None:
    """Check a label that is needed.

    Raises:
        ListError: It is missing, or no text.
    """
    if not label:
        hint = "write `path label`" if row.unit == "line" else 'give each path a "label"'
        raise ListError(f": {_quote_missing(row)} has no label", hint)
    try:
        label.encode()
    except UnicodeEncodeError:
        raise ListError(f": {row} has a label that is not UTF-8", "save it as UTF-8") from None


def _cell(row: Row, column: int | None) -> str:
    return row.cells[column] if column is not None and column < len(row.cells) else ""


# Columns ------------------------------------------------------------------------------------------


def _is_header(rows: Sequence[Row], folder: Path) -> bool:
    """Return whether the first row names the columns.

    It does if no cell of it is a file, and it either has usual names, or is unlike the rows below,
    in which there are files or numbers.
    """
    first = rows[0].cells
    if any(_may_be_file(cell, folder) for cell in first):
        return False
    words = [_word(cell) for cell in first]
    if words[0] in INDEX_HEADERS:
        words = words[1:]
    known = PATH_HEADERS | LABEL_HEADERS
    if words and words[0] in known and (len(words) < 2 or words[1] in known):
        return True
    below = rows[1 : 1 + PROBED_ROWS]
    if words and words[0] in PATH_HEADERS and below:
        others = [cell for row in below for cell in row.cells[-len(words) + 1 :]]
        if all(map(_is_number, others)) and not any(map(_is_number, first[1:])):
            return True
    return any(_may_be_file(cell, folder) for row in below for cell in row.cells)


def _is_number(cell: str) -> bool:
    return cell.lower() in MARKS or re.fullmatch(r"[-+]?\d+(\.\d*)?", cell) is not None


def _may_be_file(cell: str, folder: Path) -> bool:
    """Return whether a cell has the extension of an image or video, or is a file."""
    return Path(cell).suffix.lower() in ENDINGS or (bool(cell) and _is_file(folder / cell))


def _find_file_column(body: Sequence[Row], header: Sequence[str], folder: Path) -> int:
    """Return the column that holds files. If several or none do, the header says which; without a
    header, it is the first one that does not count the rows.

    Raises:
        ListError: Several hold files, and the header does not say which to take.
    """
    width = max((len(row.cells) for row in body), default=1)
    counts = [sum(_may_be_file(_cell(row, i), folder) for row in body) for i in range(width)]
    holding = [i for i, count in enumerate(counts) if count and 2 * count >= max(counts)]
    if len(holding) == 1:
        return holding[0]
    words = [_word(word) for word in header]
    named = [i for i, word in enumerate(words) if word in PATH_HEADERS]
    named += [i for i, word in enumerate(words) if word in URL_HEADERS]
    named += [i for i, word in enumerate(words) if word == "id"]  # Kaggle's `id,label`
    for i in named:
        if i in holding or not holding:
            return i
    if holding:
        second = (row for row in body if _cell(row, holding[1]))
        raise _doubt("files", holding, header, next(second))
    if header and words[0] in frozenset().union(*RANKED_LABEL_HEADERS):
        raise ListError(
            f": no column holds paths ({', '.join(header)})", "name it in the header: `path,label`"
        )
    return 1 if width > 2 and _is_index(body, header, 0) else 0


def _no_label(row: Row) -> str:
    return ""


def _find_labels(table: Table, header: Sequence[str], file_column: int) -> Callable[[Row], str]:
    """Return what gives the label of a row: the cell in the column whose header says so, else in
    the only one beside the files that is not empty and is not an index; or the name of the column
    with the 1, if each row has 0 in all others.

    Raises:
        ListError: Several columns may hold the labels.
    """
    words = [_word(word) for word in header]
    for ranked in RANKED_LABEL_HEADERS:
        for i, word in enumerate(words):
            if i != file_column and word in ranked and not (word == "y" and "x" in words):
                return functools.partial(_cell, column=i)
    filled, counting = _scan_columns(_body(table, header))
    facts = {i for i, word in enumerate(words) if word in FACTS}
    others = [i for i in sorted(filled - facts) if i != file_column]

    def is_index(column: int) -> bool:
        if column < len(header):
            return words[column] in INDEX_HEADERS
        return column in counting

    plain = [i for i in others if not (len(others) > 1 and is_index(i))]
    if len(plain) < 2:
        return functools.partial(_cell, column=next(iter(plain or others), None))
    # Columns of parts of a data set may hold 0 and 1, too.
    has_names = plain[-1] < len(header) and PARTS.isdisjoint(words[i] for i in plain)
    if has_names and all(_marked(row, plain) is not None for row in _body(table, header)):
        return lambda row: header[_marked(row, plain) or 0]
    both = (row for row in _body(table, header) if _cell(row, plain[0]) and _cell(row, plain[1]))
    raise _doubt("labels", plain, header, next(both, None) or next(_body(table, header)))


def _marked(row: Row, columns: Sequence[int]) -> int | None:
    """Return the column that holds 1, if all others hold 0."""
    marks = [MARKS.get(_cell(row, i).lower()) for i in columns]
    return columns[marks.index(True)] if None not in marks and sum(map(bool, marks)) == 1 else None


def _body(table: Table, header: Sequence[str]) -> Iterator[Row]:
    """Return the rows below the header."""
    return itertools.islice(table, int(bool(header)), None)


def _scan_columns(rows: Iterable[Row]) -> tuple[set[int], set[int]]:
    """Return the columns that are not empty, and those that only count the rows."""
    filled: set[int] = set()
    counting: dict[int, int] = {}  # columns that have counted so far, and their first number
    count = 0
    for count, row in enumerate(rows, start=1):
        cells = row.cells
        if count == 1:
            starts = {i: as_class_number(cell) for i, cell in enumerate(cells)}
            counting = {i: start for i, start in starts.items() if start in (0, 1)}
        filled.update(i for i, cell in enumerate(cells) if cell)
        for i, start in [*counting.items()]:
            if (cells[i] if i < len(cells) else "") != str(start + count - 1):
                del counting[i]
    return filled, set(counting) if count > 1 else set()


def _is_index(body: Sequence[Row], header: Sequence[str], column: int) -> bool:
    """Return whether a column only counts the rows."""
    if column < len(header):
        return _word(header[column]) in INDEX_HEADERS
    return column in _scan_columns(body)[1]


def _doubt(what: str, columns: Sequence[int], header: Sequence[str], row: Row) -> ListError:
    """Return the error that several columns may hold the files, or the labels."""
    first, second = (repr(header[i]) if i < len(header) else f"number {i + 1}" for i in columns[:2])
    message = f": columns {first} and {second} may both hold the {what}: {row}"
    return ListError(message, "name the columns in a header: `path,label`")


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

    def complete(self, name: str) -> str:
        """Return the path of a file within `base`, whether it exists or not."""
        if (path := path_of_file_url(name)) is not None:
            return path
        text = name.replace("\\", "/") if self.from_windows else name
        return text + self.ending

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
