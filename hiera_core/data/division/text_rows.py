"""Rows of CSV files and lists: the file is scanned once for line ends, and its part is then parsed.

A line end within quotes ends no row. It is enough to count the quotes before it for that: it is
within quotes if their number is odd. Quotes within a cell that does not begin with one are plain
text for a parser; a file in which such a quote would hide a line end is refused.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError, UsageError, first_line
from ...plain_data import PROBED_BYTES, TABLE_PREAMBLE, text_encoding
from ..url_content import keep_file

BLOCK_BYTES = 8 << 20
SEPARATORS = (",", "\t", ";")
QUOTE, LINE_END = ord('"'), ord("\n")


class TextRows:
    """The rows of a CSV file below its header, or the lines of a list; see `Rows`. A row is what
    ends with a line end, also if it is empty: `read` yields () for an empty one.

    Args:
        path: The file, in UTF-8 or UTF-16; of the latter, a copy in UTF-8 is read. Names that are
            not UTF-8 keep their bytes.
        has_columns: Whether it is a CSV file with a header.
        name: Its URL, if it is a copy; `.tsv` at the end means tabs.

    Raises:
        UsageError: There is no header, a quote is not closed or ambiguous, or the file begins like
            UTF-16 and is not, or its copy cannot be stored.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, has_columns: bool, name: Path | str = "") -> None:
        self._has_columns, self.name = has_columns, name or path
        with path.open("rb") as file:
            start = file.read(PROBED_BYTES)
        encoding = text_encoding(start)
        is_wide = encoding.startswith("utf-16")
        self._path = self._copy_in_utf8(path, encoding) if is_wide else path
        self._begin = len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0
        self._is_stray = False  # whether the last quote was within a cell
        self._separator = ","
        self.columns: Sequence[str] = self._read_header() if has_columns else []
        # What comes before the first byte of a cell.
        self._cell_begins = (self._separator.encode(), b"\n")
        # Row numbers, counted from the beginning of the file, and the offsets at which they begin.
        self._marks, lines = self._scan()
        self.total = max(0, lines - 1) if has_columns else lines

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
        """Yield the values of the columns for each row in a range.

        Raises:
            UsageError: The file has changed, a row cannot be parsed, or has too few cells.
        """
        offset = int(self._has_columns)
        first = rows.start + offset
        mark = bisect.bisect_right(self._marks, (first, 1 << 62)) - 1
        number, place = self._marks[mark]
        where = [self.columns.index(name) for name in columns]
        found = itertools.islice(self._parsed(place), first - number, rows.stop + offset - number)
        count = 0
        for count, cells in enumerate(found, start=1):
            if not cells or not any(cell.strip() for cell in cells):
                yield ()
            elif len(cells) <= max(where, default=0):
                line = rows.start + count + offset
                raise UsageError(
                    f"manifest {self.name}: row {line} has {len(cells)} cells", "check its quotes"
                )
            else:
                yield tuple(cells[i] for i in where) if where else (cells[0],)
        if count < len(rows):
            raise UsageError(f"manifest {self.name} has become shorter", "use the same file")

    def _parsed(self, place: int) -> Iterator[list[str]]:
        """Yield the rows from an offset on, as cells."""
        with self._path.open("rb") as file:
            file.seek(place)
            text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="\n")
            if not self._has_columns:
                yield from ([line.rstrip("\r\n")] for line in text)
                return
            reader = csv.reader(text, delimiter=self._separator)
            try:
                yield from reader
            except csv.Error as error:
                raise UsageError(
                    f"manifest {self.name} cannot be parsed ({error})", "check its quotes"
                ) from error

    def _copy_in_utf8(self, path: Path, encoding: str) -> Path:
        """Return the path of a temporary file in UTF-8, which goes when it is used no more."""

        def chunks() -> Iterator[bytes]:
            with path.open(encoding=encoding, newline="") as file:
                while text := file.read(BLOCK_BYTES):
                    yield text.encode()

        try:
            return keep_file(chunks())
        except UnicodeDecodeError as error:
            message = f"manifest {self.name} is not in UTF-16 as it begins"
            raise UsageError(message, "save it as UTF-8") from error
        except InputError as error:
            raise UsageError(f"manifest {self.name} {error.message}", error.hint) from error

    def _read_header(self) -> list[str]:
        with self._path.open("rb") as file:
            file.seek(self._begin)
            line = file.readline(1 << 16).decode("utf-8", "surrogateescape")
            if TABLE_PREAMBLE.fullmatch(line):
                self._begin = file.tell()
                line = file.readline(1 << 16).decode("utf-8", "surrogateescape")
        counts = {separator: line.count(separator) for separator in SEPARATORS}
        self._separator = max(SEPARATORS, key=lambda separator: counts[separator])
        name = self.name.partition("?")[0] if isinstance(self.name, str) else str(self.name)
        if name.lower().endswith(".tsv"):
            self._separator = "\t"
        try:
            cells = next(csv.reader([line], delimiter=self._separator), [])
        except csv.Error as error:  # lines that end with CR alone
            reason = first_line(error).partition(" - ")[0]
            raise UsageError(
                f"manifest {self.name}: its header cannot be parsed ({reason})",
                "end its lines with LF or CR LF",
            ) from error
        header = [cell.strip() for cell in cells]
        if not any(header):
            raise UsageError(f"manifest {self.name} has no header", "name its columns")
        return header

    def _scan(self) -> tuple[list[tuple[int, int]], int]:
        """Return where some rows begin, one in each block of the file, and the number of rows."""
        marks, number, place, in_quotes, last = [(0, self._begin)], 0, self._begin, False, b"\n"
        with self._path.open("rb") as file:
            file.seek(self._begin)
            while block := file.read(BLOCK_BYTES):
                count, first, in_quotes = self._line_ends(block, in_quotes)
                if first is not None:
                    marks.append((number + 1, place + first + 1))
                number, place, last = number + count, place + len(block), block[-1:]
        if in_quotes:
            raise self._bad_quote()
        is_open = place > self._begin and last != b"\n"
        return marks, number + is_open

    def _line_ends(self, block: bytes, in_quotes: bool) -> tuple[int, int | None, bool]:
        """Return the number of line ends outside of quotes in a block, the place of the first of
        them, and whether the block ends within quotes."""
        if not self._has_columns or (not in_quotes and b'"' not in block):
            self._is_stray = block[-1:] not in self._cell_begins
            first = block.find(b"\n")
            return block.count(b"\n"), first if first >= 0 else None, in_quotes
        found = np.frombuffer(block, np.uint8)
        quotes, ends = np.flatnonzero(found == QUOTE), np.flatnonzero(found == LINE_END)
        before = np.searchsorted(quotes, ends)  # how many quotes there are before each line end
        is_inside = (before + in_quotes) % 2 == 1
        strays = self._strays(found, quotes[int(in_quotes) :: 2])
        # strays[0] is that of the quote that the block before has left open.
        openings = (before[is_inside] + 1 - in_quotes) // 2 if len(strays) > 1 else 0
        if is_inside.any() and strays[openings].any():
            raise self._bad_quote()
        ends_inside = (len(quotes) + in_quotes) % 2 == 1
        self._is_stray = bool(strays[-1])
        if not ends_inside and block[-1:] != b'"':
            self._is_stray = block[-1:] not in self._cell_begins
        outside = ends[~is_inside]
        return len(outside), int(outside[0]) if len(outside) else None, ends_inside

    def _strays(self, block: np.ndarray, openings: np.ndarray) -> np.ndarray:
        """Return for each opening quote whether it is within a cell, after that of the last block.

        Two quotes side by side are one, so the second says nothing new. -> bool [1 + openings]
        """
        previous = block[openings - 1]
        begins = np.frombuffer(b"".join(self._cell_begins), np.uint8)
        is_new = (openings > 0) & (previous != QUOTE)
        is_stray = np.concatenate([[self._is_stray], ~np.isin(previous, begins)])
        numbers = np.arange(len(is_stray))
        numbers[1:][~is_new] = 0
        return is_stray[np.maximum.accumulate(numbers)]

    def _bad_quote(self) -> UsageError:
        return UsageError(
            f"manifest {self.name} has a quote that is not closed, or is within a cell",
            'write cells with quotes as "a ""b"" c"',
        )
