"""Manifests: tables with a row for each input, as Parquet, CSV, JSON lines or lines of text.

A manifest may have a hundred million rows. So nothing of it is held in memory: planning finds out
how many rows there are and where they begin, and a process then reads its own part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ...errors import HubError, InputError, UsageError, did_you_mean
from ...places.remote_requests import is_remote, is_web
from ..media_types import JSON_LINE_ENDINGS
from ..sources import Source, from_name
from ..url_content import fetch_file
from .json_line_rows import JsonLineRows
from .text_rows import TextRows

PATH_COLUMNS = ("path", "url", "uri", "file", "filename", "image", "image_path", "image_url")
ID_COLUMN = "id"
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
LINES = (".txt", ".list", ".lst")
Row = tuple[object, object]  # path and id


class Rows(Protocol):
    """The rows of a manifest in one format.

    Attributes:
        total: Number of rows.
        columns: Names of the columns; empty for lines of text.
    """

    total: int
    columns: Sequence[str]

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
        """Yield the values of the columns for each row in a contiguous range."""


class Manifest:
    """A table of inputs.

    Args:
        path: A `.parquet`, `.csv`, `.tsv`, `.jsonl` or `.txt` file, or a folder of `.parquet`
            files, which are one table in the order of their names. A `.txt` file has a path or URL
            on each line. A file may be named by its URL; it is copied to a temporary file then.
        path_column: Column of paths and URLs; None for the one of `PATH_COLUMNS` that exists.
        id_column: Column whose values come through to the results; None for `id`, if it exists.
        private_urls: Whether http(s) URLs may lead into private networks. A table from somebody
            else could otherwise make this machine ask servers that only it can reach.

    Raises:
        UsageError: The file cannot be read, is of another format, or has no such column.
        HubError: The file at a URL cannot be fetched.
    """

    def __init__(
        self,
        path: Path | str,
        path_column: str | None = None,
        id_column: str | None = None,
        *,
        private_urls: bool = False,
    ) -> None:
        self.path = path = path if _is_url(path) else Path(path)
        self.private_urls = private_urls
        self._copy: Path | None = None
        self._rows = self._open_rows(path)
        names = self._rows.columns
        if not names and (path_column or id_column):
            raise UsageError(f"{path} is a list without columns", "name a .csv or .parquet file")
        self._columns = [_find(path, names, path_column, PATH_COLUMNS)] if names else []
        id_name = id_column or (ID_COLUMN if ID_COLUMN in names else None)
        if id_name is not None:
            self._columns.append(_find(path, names, id_name, ()))

    def __len__(self) -> int:
        return self._rows.total

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """Columns of the paths and of the ids; None where there is none."""
        path, identity, *_ = (*self._columns, None, None)
        return path, identity

    def digest_of_copy(self) -> str | None:
        """Return the SHA-256 of the copy of the file at a URL; None for a file of this machine."""
        if self._copy is None:
            return None
        with self._copy.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, rows: range) -> Iterator[Source]:
        """Yield the inputs in a contiguous range of rows. Empty lines of a text file are left out.

        Raises:
            UsageError: The file is damaged, or has changed since this object was made.
        """
        found = self._rows.read(rows, self._columns)
        for position, values in zip(rows, found, strict=True):
            if values:
                path, identity = values[0], values[1] if len(values) > 1 else None
                yield self._source(path, identity, position)

    def _open_rows(self, path: Path | str) -> Rows:
        """Return the rows of a file, or of a copy of the file at a URL."""
        name = Path(path.partition("?")[0] if isinstance(path, str) else path)
        ending = name.suffix.lower()
        is_folder = isinstance(path, Path) and path.is_dir()
        try:
            if is_folder or ending == ".parquet":
                from .parquet_rows import ParquetRows

                return ParquetRows(self._local(path), str(path))
            if ending in JSON_LINE_ENDINGS:
                return JsonLineRows(self._local(path), path)
            if ending in (".csv", ".tsv", *LINES):
                return TextRows(self._local(path), ending not in LINES, path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsageError(f"manifest {path}: {reason}", "check the path") from error
        if ending == ".json":
            raise UsageError(f"manifest {name.name!r} is in JSON", f"name it as an input: @{path}")
        raise UsageError(
            f"manifest {name.name!r} is of no known format",
            f"name a file that ends in {', '.join((*TABLES, LINES[0]))}, or a folder of Parquet "
            "files on this machine",
        )

    def _local(self, path: Path | str) -> Path:
        """Return the path of a file, or of a copy of the file at a URL.

        Raises:
            HubError: It cannot be fetched.
        """
        if isinstance(path, Path):
            return path
        try:
            self._copy = fetch_file(path)
        except InputError as error:
            raise HubError(f"manifest {path}: {error.message}", error.hint) from error
        return self._copy

    def _source(self, path: object, identity: object, position: int) -> Source:
        if identity is not None and type(identity) is not int:
            identity = str(identity)
        if not isinstance(path, str) or not path.strip():
            error = InputError("the manifest has no path in this row", "fill it, or remove the row")
            return Source(f"row {position}", error=error, id=identity, position=position)
        public_only = not self.private_urls
        found = from_name(path)
        return replace(found, id=identity, position=position, public_only=public_only)


def _is_url(path: Path | str) -> bool:
    return isinstance(path, str) and (is_remote(path) or is_web(path))


def _find(path: Path | str, names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str:
    """Return the name of a column.

    Raises:
        UsageError: There is no such column, or none or several of the usual ones.
    """
    if wanted is not None:
        if wanted not in names:
            hint = did_you_mean(wanted, names) or f"there are {', '.join(names)}"
            raise UsageError(f"manifest {path} has no column {wanted!r}", hint)
        return wanted
    found = [name for name in usual if name in names]
    if len(found) != 1:
        what = "several columns may hold paths" if found else "no column is named as one of paths"
        raise UsageError(
            f"manifest {path}: {what} ({', '.join(found or names)})", "name it: --path-column NAME"
        )
    return found[0]
