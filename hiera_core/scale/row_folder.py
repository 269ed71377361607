"""A folder of Parquet files with the rows of a run, where an interrupted run goes on.

A file appears whole or not at all, and holds the `index` of each of its rows. So the files
themselves say what is done: there is no other list that could say something else after a crash.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import HieraError, UsageError, first_line
from ..inference import fingerprint
from ..places.places import Place
from ..records import Record
from .done_rows import HINT, MOST_ROWS, DoneRows, Facts, beyond_end
from .result_rows import RowLayout

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_FILE = 4096
BYTES_PER_FILE = 64 << 20
SECONDS_PER_FILE = 300.0  # after which a file is written before it is full, so that little is lost
DEEPEST = 16  # levels of facts
RETRY = re.compile(r"-retry([0-9]{1,9})\.parquet$")  # ends the names of files of --retry-failed


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
        self.retry = 0  # number of this retry; 0 if failed rows stay

    def files(self) -> list[str]:
        """Return the names of the files of this run: those of the last retry first, whose rows
        replace earlier ones, and else in order."""
        names = self.place.names(f"{self.prefix}part-", ".parquet")
        return sorted(names, key=lambda name: (-_retry_of(name), name))

    def begin_retry(self) -> None:
        """Compute the rows again that failed before. Their new rows go to files of this retry. The
        failed ones are removed by `read_done`, each when its new row is there."""
        self.retry = 1 + max(map(_retry_of, self.files()), default=0)

    def write(self, table: pa.Table, facts: Facts) -> int:
        """Write rows to a new file, atomically. The same rows have the same file name, so a worker
        that was killed after the write, and whose task runs again, doubles nothing.

        Returns:
            The size of the file in bytes.

        Raises:
            OutputError: The disk is full, or the folder cannot be written.
        """
        indices = table["index"].to_numpy()
        digest = hashlib.sha256(np.sort(indices).tobytes()).hexdigest()[:8]
        ending = f"-retry{self.retry}" if self.retry else ""
        name = f"{self.prefix}part-{int(indices.min()):012}-{digest}{ending}.parquet"
        table = table.replace_schema_metadata({"hiera": json.dumps(fingerprint.plain(facts))})
        with self.place.writing(name) as temporary:
            _write_table(table, temporary)
            return temporary.stat().st_size

    def read_done(self, total: int | None = None) -> DoneRows:
        """Return which rows are written, and what they depend on. In a retry, rows that failed
        before it do not count.

        Rows that are in two files are removed from the second: those that a retry has replaced, and
        those of workers of a killed run that wrote them while the next run began.

        Args:
            total: Number of all rows, if it is known.

        Raises:
            UsageError: A file is damaged, or holds a row that does not exist.
            OutputError: A file cannot be read, or cannot be written again.
        """
        done = DoneRows()
        for name in self.files():
            done.where = f"{self.place.text}/{name}"
            table, facts = self._read_file(name, done.where)
            # A file holds the model of each kind of input that was seen until then.
            done.facts = {**facts, **done.facts}
            indices = table["index"].to_numpy()
            if len(indices) and indices.max() >= (MOST_ROWS if total is None else total):
                raise beyond_end(done.where, indices.max(), total)
            is_kept = ~done.has(indices)
            counts = is_kept.copy()
            if _retry_of(name) < self.retry:
                counts &= table["status"].to_numpy(zero_copy_only=False) != "error"
            added = table.filter(counts)
            is_kept[counts] = done.add(
                indices[counts], added["input"].to_pylist(), added["status"].to_pylist()
            )
            if not is_kept.all():
                self._keep_rows(name, is_kept)
        return done

    def remove_replaced(self) -> None:
        """Remove the rows that this retry has replaced; see `read_done`."""
        if self.retry and any(_retry_of(name) == self.retry for name in self.files()):
            self.read_done()

    def _read_file(self, name: str, where: str) -> tuple[pa.Table, Facts]:
        """Return what a file says about its rows.

        Raises:
            UsageError: It is damaged.
        """
        import pyarrow.parquet as pq

        with _damage(where), self.place.open(name) as file:
            table = pq.read_table(file, columns=["index", "input", "status"])
            facts: Facts = json.loads((table.schema.metadata or {})[b"hiera"])
            _check_columns(table)
            is_dict = all(isinstance(values, dict) for values in facts.values())
            if not is_dict or _is_deep(facts):
                raise ValueError("its metadata is of no run")
        return table, facts

    def _keep_rows(self, name: str, keep: np.ndarray) -> None:
        import pyarrow.parquet as pq

        if not keep.any():
            self.place.remove(name)
            return
        with _damage(f"{self.place.text}/{name}"), self.place.open(name) as file:
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


def _write_table(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with path.open("wb") as file:  # pyarrow takes no path that is not UTF-8
        pq.write_table(table, file)


def _retry_of(name: str) -> int:
    found = RETRY.search(name)
    return int(found[1]) if found else 0


def _is_deep(value: object, levels: int = DEEPEST) -> bool:
    """Return whether a value of JSON is nested deeper than facts are."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deep(part, levels - 1) for part in parts)


def _check_columns(table: pa.Table) -> None:
    """Check the columns that say which rows a file holds.

    Raises:
        ValueError: One is of another type, has nulls, or a number below 0.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    types = {name: table.schema.field(name).type for name in ("index", "input", "status")}
    texts = (pa.string(), pa.large_string())
    if not pa.types.is_int64(types.pop("index")) or not all(t in texts for t in types.values()):
        raise ValueError("its columns are of other types")
    if any(column.null_count for column in table.columns):
        raise ValueError("it has rows without a number, name or status")
    if table.num_rows and pc.min(table["index"]).as_py() < 0:
        raise ValueError("it has a row whose number is below 0")


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
        # pyarrow and json raise many types for content that nobody has written on purpose.
        if isinstance(error, Exception) and not isinstance(error, HieraError | MemoryError):
            raise UsageError(
                f"{self.where} is damaged, or no file of results ({first_line(error)})", "remove it"
            ) from error
