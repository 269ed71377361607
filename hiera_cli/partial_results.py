"""Read what an interrupted run has left: NAME.partial, and NAME.partial.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hiera_core.errors import UsageError

from .exit_codes import print_message
from .output_formats import open_text


def read_facts(path: Path) -> dict[str, dict[str, Any]]:
    """Read what the results of an interrupted run depend on.

    If the file is missing, the results are from an earlier version, or were copied: they are
    continued, with a warning.

    Raises:
        UsageError: The file is damaged.
    """
    if not path.exists():
        print_message(
            f"there is no {str(path)!r}, so it is not checked that --resume has the same model and "
            "options"
        )
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(values, dict) for values in facts.values()):
            return dict(facts)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged", "--overwrite starts over") from error
    raise UsageError(f"{str(path)!r} is damaged", "--overwrite starts over")


def remove_incomplete_line(partial: Path) -> None:
    """Remove an incomplete last line, which an interrupted run may have left."""
    with partial.open("rb+") as file:
        size = 0
        for line in file:
            size += len(line) if line.endswith(b"\n") else 0
        file.truncate(size)


def finished_inputs(partial: Path) -> Iterator[tuple[str, str]]:
    """Yield input and status of every record of an interrupted run."""
    with open_text(partial, "r") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield record["input"], record["status"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{str(partial)!r}: line {number} is no record", "--overwrite starts over"
                ) from error
