"""Rows of Parquet files: only their footers are read to plan, and only the row groups that a
process needs to read its part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import UsageError, first_line

BATCH_ROWS = 1 << 14


class ParquetRows:
    """A Parquet file, or the files of a folder in the order of their names; see `Rows`.

    Args:
        path: The file or folder.
        name: Name of a file that is a copy, for messages.

    Raises:
        UsageError: A file is damaged, columns differ, or pyarrow is not installed.
        OSError: A file cannot be read.
    """

    def __init__(self, path: Path | IO[bytes], name: str = "") -> None:
        self._name = name  # of a single file
        self._files: list[Path | IO[bytes]] = [path]
        if isinstance(path, Path) and path.is_dir():
            found = (p for p in path.glob("*.parquet") if not p.name.startswith((".", "_")))
            self._files = [*sorted(found)]
        if not self._files:
            raise UsageError(f"manifest {path}: the folder holds no .parquet files", "check it")
        counts: list[int] = []
        groups: list[tuple[int, int]] = []  # file and row group
        self.columns: Sequence[str] = ()
        for number, file in enumerate(self._files):
            opened = _open(file, self._shown(file))
            names = opened.schema_arrow.names
            if number and not set(self.columns) <= set(names):
                raise UsageError(f"{file} lacks columns of {self._files[0]}", "write it again")
            self.columns = self.columns or names
            metadata = opened.metadata
            for group in range(metadata.num_row_groups):
                counts.append(metadata.row_group(group).num_rows)
                groups.append((number, group))
            _close(opened, file)
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.total = int(self._starts[-1])

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
        """Yield the values of the columns for each row in a range.

        Raises:
            UsageError: A file is damaged.
        """
        if not rows:
            return
        first = int(np.searchsorted(self._starts, rows.start, side="right")) - 1
        last = int(np.searchsorted(self._starts, rows.stop, side="left"))
        position, open_number, opened = int(self._starts[first]), -1, None
        for number, group in self._groups[first:last]:
            if number != open_number:
                if opened is not None:
                    _close(opened, self._files[open_number])
                file = self._files[number]
                open_number, opened = number, _open(file, self._shown(file))
            shown = self._shown(self._files[number])
            for batch in _batches(opened, shown, group, columns):
                begin = max(0, rows.start - position)
                end = min(len(batch), rows.stop - position)
                position += len(batch)
                if begin < end:
                    part = batch.slice(begin, end - begin)
                    values = [part.column(name).to_pylist() for name in columns]
                    yield from zip(*values, strict=True)
                if position >= rows.stop:
                    break
        if opened is not None:
            _close(opened, self._files[open_number])

    def _shown(self, file: Path | IO[bytes]) -> str:
        """Return the name of a file for messages."""
        return self._name or str(file if isinstance(file, Path) else getattr(file, "name", file))


def _close(opened: Any, file: Path | IO[bytes]) -> None:
    """Close a file that was opened here; one in memory is read again."""
    if isinstance(file, Path):
        opened.close()


def _batches(opened: Any, shown: str, group: int, columns: Sequence[str]) -> Iterator[Any]:
    try:
        yield from opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns))
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise UsageError(
            f"{shown} cannot be read ({first_line(error)})", "write it again, then use --resume"
        ) from error


def _open(file: Path | IO[bytes], shown: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "a Parquet manifest needs pyarrow, which is not installed",
            "pip install 'hiera-toolkit[parquet]', or use a .csv file",
        ) from error
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{shown} is no Parquet file, or is damaged", "write it again") from error
