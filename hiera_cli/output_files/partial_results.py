"""Read what an interrupted run has left: NAME.partial, and NAME.partial.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiera_core.errors import UsageError

from ..exit_codes import print_message
from ..output_formats import open_text


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


@dataclass(frozen=True)
class FinishedInput:
    """What an interrupted or finished run has recorded about an input."""

    name: str
    status: str
    kind: str
    model: str
    classes: int  # number of classes in the record


def finished_inputs(partial: Path) -> Iterator[FinishedInput]:
    """Yield what every record of an interrupted run says about its input."""
    with open_text(partial, "r") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield FinishedInput(
                    record["input"],
                    record["status"],
                    str(record.get("kind", "")),
                    str(record.get("model", "")),
                    len(record.get("topk") or ()),
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{str(partial)!r}: line {number} is no record", "--overwrite starts over"
                ) from error
