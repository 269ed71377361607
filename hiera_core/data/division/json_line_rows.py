"""Rows of JSON lines: an object on each line, found by the offsets of the lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError, first_line
from .text_rows import TextRows

PROBED_ROWS = 100  # in which keys are looked for
HINT = 'write an object on each line: {"path": "a.png", "id": 1}'


class JsonLineRows(TextRows):
    """The rows of a file of JSON lines; see `Rows`. `read` yields () for an empty line, and None
    for a key that an object does not have.

    Args:
        path: The file, in UTF-8 or UTF-16.
        name: Its URL, if it is a copy.

    Raises:
        UsageError: One of its first lines is no object, or it has none.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, name: Path | str = "") -> None:
        super().__init__(path, False, name)
        first = itertools.islice(self._objects(range(self.total)), PROBED_ROWS)
        self.columns = list(dict.fromkeys(key for one in first for key in one or ()))
        if not self.columns:
            raise UsageError(f"manifest {self.name} has no rows", HINT)

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
        """Yield the values of the columns for each row in a range.

        Raises:
            UsageError: The file has changed, or a line is no object.
        """
        for found in self._objects(rows):
            yield () if found is None else tuple(found.get(column) for column in columns)

    def _objects(self, rows: range) -> Iterator[dict[str, Any] | None]:
        """Yield the object on each line, or None for an empty one."""
        for number, cells in enumerate(super().read(rows, ()), start=rows.start + 1):
            if not cells:
                yield None
                continue
            try:
                value = json.loads(str(cells[0]))
            except (ValueError, RecursionError) as error:
                message = f"manifest {self.name}: line {number} is not valid JSON"
                raise UsageError(f"{message} ({first_line(error)})", HINT) from error
            if not isinstance(value, dict):
                raise UsageError(f"manifest {self.name}: line {number} is no object", HINT)
            yield value
