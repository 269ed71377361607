"""Columns of a batch of rows: which one holds the inputs, and the inputs in it as sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...data import memory, sources
from ...data.sources import Source
from ...errors import InputError, UsageError

Columns = dict[str, np.ndarray]  # [rows, ...] each
DECODED = "decoded"  # what Decoder writes
# Columns that hold inputs if none is named, and whether they are large, so that they end here.
INPUT_COLUMNS = {DECODED: True, "image": True, "bytes": True, "path": False, "url": False}
INPUT_COLUMNS["uri"] = False
NAMES = ("path", "url", "uri", "name")  # columns that name a row whose input is in another column


def find_column(batch: Columns, column: str | None) -> str:
    """Return the column that holds the inputs.

    Args:
        batch: The columns.
        column: The name that the user gave, or None for the first of `INPUT_COLUMNS` that exists.

    Raises:
        UsageError: There is no such column.
    """
    if column is not None:
        if column not in batch:
            raise UsageError(f"there is no column {column!r}", f"there are {_names(batch)}")
        return column
    for known in INPUT_COLUMNS:
        if known in batch:
            return known
    raise UsageError(
        f"no column is named {', '.join(INPUT_COLUMNS)}",
        f"name the column of the inputs, column=...; there are {_names(batch)}",
    )


def other_columns(batch: Columns, column: str) -> Columns:
    """Return the columns that come through to the results: all but those with pixels or the content
    of files."""
    is_text = batch[column].dtype.kind in "UT" or _first_type(batch[column]) is str
    dropped = {name for name, is_large in INPUT_COLUMNS.items() if is_large}
    dropped |= set() if is_text else {column}
    return {name: values for name, values in batch.items() if name not in dropped}


def read_sources(batch: Columns, column: str) -> Iterator[Source]:
    """Yield the inputs of a column: paths and URLs, the content of files, or pixels.

    Raises:
        UsageError: A value is of another type.
    """
    named = next((name for name in NAMES if name in batch and name != column), None)
    for row, value in enumerate(batch[column]):
        name = None if named is None else str(batch[named][row])
        yield _source(value, row, name)


def _source(value: Any, row: int, name: str | None) -> Source:
    if isinstance(value, str):
        return sources.from_name(str(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return Source(name or f"bytes {row}", data=bytes(value))
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return Source(name or f"row {row}", error=InputError("the value is missing"))
    if isinstance(value, np.ndarray) and value.dtype == object:  # a list of lists, from Arrow
        value = np.array(value.tolist())
    source = memory.as_source(value, row)
    return source if name is None else _renamed(source, name)


def _renamed(source: Source, name: str) -> Source:
    return Source(name, data=source.data, pixels=source.pixels, error=source.error)


def object_column(values: list[Any]) -> np.ndarray:
    """Return values as a column, as they are: NumPy takes bytes of one length for numbers."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _first_type(values: np.ndarray) -> type | None:
    return (
        next((type(v) for v in values if v is not None), None) if values.dtype == object else None
    )


def _names(batch: Columns) -> str:
    return ", ".join(map(repr, batch)) or "none"
