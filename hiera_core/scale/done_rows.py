"""Which rows of a run are written, and what they depend on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..data.sources import Source
from ..errors import UsageError
from .result_rows import printable

Facts = dict[str, dict[str, Any]]  # what rows depend on: settings, and the model of each kind
HINT = "resume with the same inputs, options and weights, or write to another folder"
MISSING, OK, FAILED = 0, 1, 2  # states of a row
MOST_ROWS = 10**10  # of a run whose number of inputs is not known beforehand


class DoneRows:
    """The rows that are written: a byte for each, and a checksum of its input's name.

    Attributes:
        ok, failed: Numbers of rows.
        facts: What they depend on.
        where: The file that was read last, for messages; None if there are none.
        last: The largest number of a row; -1 if there are none.
    """

    def __init__(self) -> None:
        self._checksums = np.zeros(0, np.uint32)
        self._states = np.zeros(0, np.uint8)
        self.ok = self.failed = 0
        self.facts: Facts = {}
        self.where: str | None = None
        self.last = -1
        self._where_last: str | None = None

    def __len__(self) -> int:
        return self.ok + self.failed

    def has(self, indices: np.ndarray) -> np.ndarray:
        """Return which of these rows are written. -> bool [rows]"""
        is_known = indices < len(self._states)
        found = np.zeros(len(indices), bool)
        found[is_known] = self._states[indices[is_known]] != MISSING
        return found

    def add(self, indices: np.ndarray, names: list[str], statuses: list[str]) -> np.ndarray:
        """Add rows, and return which of them are new. -> bool [rows]

        Raises:
            UsageError: A row has so large a number that memory does not suffice.
        """
        if not len(indices):
            return np.zeros(0, bool)
        last = int(indices.max())
        if last > self.last:
            self.last, self._where_last = last, self.where
        self._grow(last + 1)
        is_new = ~self.has(indices)
        is_first = np.zeros(len(indices), bool)
        is_first[np.unique(indices, return_index=True)[1]] = True
        is_new &= is_first
        has_failed = np.array([status == "error" for status in statuses])
        added = indices[is_new]
        self._states[added] = np.where(has_failed[is_new], FAILED, OK)
        self._checksums[added] = [_checksum(names[i]) for i in np.flatnonzero(is_new)]
        failed = int((has_failed & is_new).sum())
        self.failed += failed
        self.ok += len(added) - failed
        return is_new

    def missing(self, rows: range) -> np.ndarray:
        """Return the rows of a range that are not written. -> int64 [n]"""
        known = self._states[rows.start : rows.stop]
        is_missing = np.ones(len(rows), bool)
        is_missing[: len(known)] = known == MISSING
        return rows.start + np.flatnonzero(is_missing)

    def some(self, count: int, *, with_failed: bool = True) -> np.ndarray:
        """Return a few of the rows that are written, spread over all of them. -> int64 [n]"""
        found = np.flatnonzero(self._states >= OK if with_failed else self._states == OK)
        return found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(np.int64)]

    def skip(self, sources: Iterable[Source], *, are_all: bool = False) -> Iterator[Source]:
        """Yield the sources that are not written.

        Args:
            sources: Inputs with their positions.
            are_all: Whether there are no other inputs, so that there must be one for each row.

        Raises:
            UsageError: A row was written for another input, or for one that does not exist.
        """
        last = -1
        for source in sources:
            index = source.position
            assert index is not None
            last = max(last, index)
            if index >= len(self._states) or self._states[index] == MISSING:
                yield source
            elif self._checksums[index] != _checksum(printable(source.name)):
                raise UsageError(f"--resume: input {index} is {source.name!r} now", HINT)
        if are_all:
            self.check_end(last + 1)

    def check_end(self, total: int) -> None:
        """Check that no row has a number of `total` or more.

        Raises:
            UsageError: One has.
        """
        if self.last >= total:
            raise beyond_end(self._where_last, self.last, total)

    def _grow(self, size: int) -> None:
        if size <= len(self._states):
            return
        last, size = size - 1, max(2 * len(self._states), size)
        try:  # the system gives memory when it is written to, so gaps cost nothing
            states, checksums = np.zeros(size, np.uint8), np.zeros(size, np.uint32)
        except (MemoryError, ValueError) as error:
            raise UsageError(
                f"{self.where} holds row {last}, and this machine has no memory for so many",
                HINT,
            ) from error
        states[: len(self._states)] = self._states
        checksums[: len(self._checksums)] = self._checksums
        self._states, self._checksums = states, checksums


def beyond_end(where: str | None, row: int, total: int | None) -> UsageError:
    """Return the error about a row that no input has, of `total` or an unknown number."""
    if total is None:
        return UsageError(f"{where} holds row {row}, which no run has", "remove the file")
    inputs = "there is 1 input" if total == 1 else f"there are {total} inputs"
    return UsageError(f"{where} holds row {row}, and {inputs}", HINT)


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))
