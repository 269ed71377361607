"""A folder of Parquet files with the rows of a run, where an interrupted run goes on.

A file appears whole or not at all, and holds the `index` of each of its rows. So the files
themselves say what is done: there is no other list that could say something else after a crash.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.sources import Source
from ..errors import UsageError, first_line
from ..inference import fingerprint
from ..places.places import Place
from ..records import Record
from .result_rows import RowLayout, printable

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_FILE = 4096
BYTES_PER_FILE = 64 << 20
SECONDS_PER_FILE = 300.0  # after which a file is written before it is full, so that little is lost
Facts = dict[str, dict[str, Any]]  # what rows depend on: settings, and the model of each kind
HINT = "resume with the same inputs, options and weights, or write to another folder"


class RowFolder:
    """Writes rows to files in a folder, and knows the rows that are in them.

    Args:
        place: The folder.
        layout: The columns.
        prefix: Begins the names of the files, `shard-00003-of-00016-`. Others are not looked at.
        rows_per_file: Maximum number of rows in a file.
    """

    def __init__(
        self,
        place: Place,
        layout: RowLayout,
        prefix: str = "",
        rows_per_file: int = ROWS_PER_FILE,
    ) -> None:
        self.place, self.layout, self.prefix = place, layout, prefix
        self.rows_per_file = rows_per_file
        self.drops_failed = False  # whether failed rows are removed before the next file is written

    def files(self) -> list[str]:
        """Return the names of the files of this run, in order."""
        return self.place.names(f"{self.prefix}part-", ".parquet")

    def write(self, table: pa.Table, facts: Facts) -> int:
        """Write rows to a new file, atomically. The same rows have the same file name, so a worker
        that was killed after the write, and whose task runs again, doubles nothing.

        Returns:
            The size of the file in bytes.

        Raises:
            OutputError: The disk is full, or the folder cannot be written.
        """
        if self.drops_failed:
            self.drops_failed = False
            self.read_done(drop_failed=True)
        indices = table["index"].to_numpy()
        digest = hashlib.sha256(np.sort(indices).tobytes()).hexdigest()[:8]
        name = f"{self.prefix}part-{int(indices.min()):012}-{digest}.parquet"
        table = table.replace_schema_metadata({"hiera": json.dumps(fingerprint.plain(facts))})
        with self.place.writing(name) as temporary:
            _write_table(table, temporary)
            return temporary.stat().st_size

    def read_done(
        self, total: int | None = None, *, drop_failed: bool = False, changes_files: bool = True
    ) -> DoneRows:
        """Return which rows are written, and what they depend on. Rows that are in two files are
        removed from the second: workers of a killed run may have written them while the next run
        began.

        Args:
            total: Number of all rows, if it is known.
            drop_failed: Also remove the rows of inputs that failed, so that they are missing, and
                are computed again.
            changes_files: Whether rows are removed from files, or only left out of the result.

        Raises:
            UsageError: A file is damaged, or holds a row that does not exist.
            OutputError: A file cannot be read, or cannot be written again.
        """
        import pyarrow.parquet as pq

        done = DoneRows()
        for name in self.files():
            where = f"{self.place.text}/{name}"
            with _damage(where), self.place.open(name) as file:
                table = pq.read_table(file, columns=["index", "input", "status"])
                facts: Facts = json.loads((table.schema.metadata or {})[b"hiera"])
            # A file holds the model of each kind of input that was seen until then.
            done.where, done.facts = where, {**facts, **done.facts}
            indices = table["index"].to_numpy()
            if total is not None and len(indices) and indices.max() >= total:
                raise UsageError(
                    f"{where} holds row {indices.max()}, and there are {total} inputs", HINT
                )
            statuses = table["status"].to_numpy(zero_copy_only=False)
            is_kept = statuses != "error" if drop_failed else np.ones(len(indices), bool)
            kept = table.filter(is_kept)
            is_kept[is_kept] = done.add(
                indices[is_kept], kept["input"].to_pylist(), kept["status"].to_pylist()
            )
            if changes_files and not is_kept.all():
                self._keep_rows(name, is_kept)
        return done

    def _keep_rows(self, name: str, keep: np.ndarray) -> None:
        import pyarrow.parquet as pq

        if not keep.any():
            self.place.remove(name)
            return
        with self.place.open(name) as file:
            table = pq.read_table(file).filter(keep)
        with self.place.writing(name) as temporary:
            _write_table(table, temporary)

    def remove(self) -> None:
        """Remove the files of an earlier run.

        Raises:
            OutputError: One of them cannot be removed.
        """
        for name in self.files():
            self.place.remove(name)

    def write_records(
        self, records: Iterable[Record], facts: Facts
    ) -> Generator[Record, None, None]:
        """Yield the records, after adding each to the rows. Files are written as they fill, and at
        the end or when an error ends the stream. `facts` may be filled in until then.

        Raises:
            OutputError: See `write`.
        """
        waiting: list[Record] = []
        size, begin = 0, time.monotonic()
        try:
            for record in records:
                waiting.append(record)
                size += sum(v.nbytes for v in (record.result or {}).values())
                is_late = time.monotonic() - begin >= SECONDS_PER_FILE
                if len(waiting) >= self.rows_per_file or size >= BYTES_PER_FILE or is_late:
                    rows, waiting = waiting, []
                    self.write(self.layout.table(rows), facts)
                    size, begin = 0, time.monotonic()
                yield record
        finally:
            if waiting:
                self.write(self.layout.table(waiting), facts)


class DoneRows:
    """The rows that are written: a bit for each, and a checksum of its input's name.

    Attributes:
        ok, failed: Numbers of rows.
        facts: What they depend on.
        where: A file with such rows, for messages; None if there are none.
    """

    def __init__(self) -> None:
        self._checksums = np.zeros(0, np.uint32)
        self._is_done = np.zeros(0, bool)
        self.ok = self.failed = 0
        self.facts: Facts = {}
        self.where: str | None = None

    def __len__(self) -> int:
        return self.ok + self.failed

    def add(self, indices: np.ndarray, names: list[str], statuses: list[str]) -> np.ndarray:
        """Add rows, and return which of them are new. -> bool [rows]"""
        if len(indices) and int(indices.max()) >= len(self._is_done):
            size = max(2 * len(self._is_done), int(indices.max()) + 1)
            self._is_done = np.concatenate(
                [self._is_done, np.zeros(size - len(self._is_done), bool)]
            )
            self._checksums = np.concatenate(
                [self._checksums, np.zeros(size - len(self._checksums), np.uint32)]
            )
        is_new = ~self._is_done[indices]
        self._is_done[indices] = True
        self._checksums[indices] = [_checksum(name) for name in names]
        failed = sum(s == "error" for s, new in zip(statuses, is_new, strict=True) if new)
        self.failed += failed
        self.ok += int(is_new.sum()) - failed
        return is_new

    def missing(self, rows: range) -> np.ndarray:
        """Return the rows of a range that are not written. -> int64 [n]"""
        known = self._is_done[rows.start : rows.stop]
        is_done = np.zeros(len(rows), bool)
        is_done[: len(known)] = known
        return rows.start + np.flatnonzero(~is_done)

    def some(self, count: int) -> np.ndarray:
        """Return a few of the rows that are written, spread over all of them. -> int64 [n]"""
        found = np.flatnonzero(self._is_done)
        return found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(np.int64)]

    def skip(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yield the sources that are not written.

        Raises:
            UsageError: A row was written for another input.
        """
        for source in sources:
            index = source.position
            assert index is not None
            if index >= len(self._is_done) or not self._is_done[index]:
                yield source
            elif self._checksums[index] != _checksum(printable(source.name)):
                raise UsageError(f"--resume: input {index} is {source.name!r} now", HINT)


def _write_table(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with path.open("wb") as file:  # pyarrow takes no path that is not UTF-8
        pq.write_table(table, file)


def check_facts(where: str | None, earlier: Facts, now: Facts) -> None:
    """Check that rows can be added to those of an earlier run.

    Raises:
        UsageError: They depend on something else.
    """
    for what, values in now.items():
        if where is not None and what in earlier:
            fingerprint.check_same(Path(where), earlier[what], values, HINT)


class _damage:
    """Converts the errors of reading a damaged file to a UsageError."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError | ValueError | KeyError | TypeError):
            raise UsageError(
                f"{self.where} is damaged, or no file of results ({first_line(error)})", "remove it"
            ) from error


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))
