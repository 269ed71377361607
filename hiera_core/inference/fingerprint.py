"""What the results of a run depend on, as plain values that are stored beside them, so that a run
is not continued with other settings or another model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError

# Settings that only one command has, and this command.
COMMANDS = {"topk": "hiera predict", "stages": "hiera features"}


def text_digest(lines: object) -> str:
    """Return a short text that differs for different values."""
    return hashlib.sha256(repr(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def check_same(where: Path, earlier: Mapping[str, Any], now: Mapping[str, Any], hint: str) -> None:
    """Check that results can be added to those of an earlier run.

    Args:
        where: The file of the earlier results.
        earlier, now: What they depend on, and what new ones would.
        hint: What to do if they differ.

    Raises:
        UsageError: A value differs. The message names the first such value, or the
            command that made the results if that is another.
    """
    first, second = _command_of(earlier), _command_of(now)
    if first and second and first != second:
        raise UsageError(f"{where} was made by {first}, not by {second}", hint)
    for name, value in plain(dict(now)).items():
        if name not in earlier or earlier[name] != value:
            raise UsageError(
                f"{where} was made with {name} {_show(earlier.get(name))}, not {_show(value)}", hint
            )


def plain(value: Any) -> Any:
    """Return a value as JSON would give it back: with lists in place of tuples."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _command_of(facts: Mapping[str, Any]) -> str | None:
    return next((command for name, command in COMMANDS.items() if name in facts), None)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(_show, value)) if isinstance(value, list) else str(value)
