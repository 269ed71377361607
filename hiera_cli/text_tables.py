"""Tables and lines of text that fit the width of a terminal."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

GAP = 2  # spaces between columns
MIN_CELL = 8  # a column is not made narrower than this
ELLIPSIS = "…"


def stdout_width() -> int | None:
    """Return the number of columns for text on standard output; None if it is no terminal, and the
    environment variable COLUMNS sets no width either."""
    return stream_width(sys.stdout.isatty())


def stderr_width() -> int | None:
    """The same as `stdout_width`, for standard error."""
    return stream_width(sys.stderr.isatty())


def stream_width(is_terminal: bool) -> int | None:
    """Return the number of columns of a terminal, or what COLUMNS says; see `stdout_width`."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if is_terminal else None


def fit_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    optional: Sequence[str] = (),
) -> str:
    """Return a table that is at most `width` characters wide.

    If it is too wide, optional columns are left out, and a line below the table names them. If that
    is not enough, the widest cells are shortened in their middle.

    Args:
        columns: Headers of the columns.
        rows: Cells of each row, as many as there are columns.
        width: Number of characters in a line, or None for any number.
        optional: Headers of columns that may be left out, the first one first.
    """
    kept, left_out = list(range(len(columns))), []
    for name in optional:
        if width is None or _width_of(columns, rows, kept) <= width:
            break
        if name in columns:
            kept.remove(columns.index(name))
            left_out.append(name)
    headers = [columns[i] for i in kept]
    cells = [[row[i].expandtabs() for i in kept] for row in rows]
    if width is not None:
        cells = _shorten_columns(headers, cells, width)
    text = format_table(headers, cells)
    if left_out:
        names = ", ".join(name for name in columns if name in left_out)
        note = f"(left out at this width: {names}; -f csv has all columns)"
        text += "".join(f"{line}\n" for line in wrap_line(note, width, 1))
    return text


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

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
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


def wrap_line(text: str, width: int | None, indent: int = 0) -> list[str]:
    """Return a line as lines of at most `width` characters, broken between words. A word that is
    longer stays whole. `indent` is the indentation of all lines but the first."""
    if width is None or len(text) <= width:
        return [text]
    start = len(text) - len(text.lstrip())
    lines = textwrap.wrap(
        text.strip(),
        max(width, indent + MIN_CELL),
        initial_indent=" " * start,
        subsequent_indent=" " * min(indent, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return lines or [text]


def shorten(text: str, width: int) -> str:
    """Return a text with an ellipsis in its middle if it is longer than `width`."""
    shown = text
    for count in range(min(len(text), width), 0, -1):  # a character may be two columns wide
        if cells_of(shown) <= width:
            break
        end = (count - 1) // 2
        shown = text[: count - 1 - end] + ELLIPSIS + text[len(text) - end :]
    return shown


def cells_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _width_of(columns: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    widths = [max(cells_of(t.expandtabs()) for t in _column(columns, rows, i)) for i in kept]
    return sum(widths) + GAP * (len(widths) - 1)


def _column(columns: Sequence[str], rows: Sequence[Sequence[str]], number: int) -> list[str]:
    return [columns[number], *(row[number] for row in rows)]


def _shorten_columns(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[list[str]]:
    """Return the rows with the cells of the widest columns shortened, so that the table fits."""
    widths = [max(map(cells_of, _column(columns, rows, i))) for i in range(len(columns))]
    least = [max(MIN_CELL, len(name)) for name in columns]
    while sum(widths) + GAP * (len(widths) - 1) > width:
        shrinkable = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1
    return [[shorten(cell, widths[i]) for i, cell in enumerate(row)] for row in rows]
