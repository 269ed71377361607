"""The errors a user can meet. Each says what was expected, what came, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HieraError(Exception):
    """Base of all errors raised on purpose; `hint` is the remedy, shown after the message."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(HieraError, ValueError):
    """A call or a command that cannot be carried out as written."""


class ConfigError(UsageError):
    """A model configuration that cannot be built (sizes, strides, units)."""


class CheckpointError(HieraError, RuntimeError):
    """A checkpoint that is damaged, foreign, unsafe, or belongs to another model."""


class HubError(HieraError, RuntimeError):
    """Weights that could not be fetched: offline, missing, gated, interrupted."""


class DeviceError(HieraError, RuntimeError):
    """A device that is not there, or has no memory left."""


class OutputError(HieraError, RuntimeError):
    """A result that could not be written (disk full, folder gone)."""


class TrainingError(HieraError, RuntimeError):
    """A run that cannot go on: it diverged, or too much of its data is unreadable."""


class InputError(HieraError):
    """One input that cannot be used. The batch goes on without it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def did_you_mean(name: str, choices: Iterable[str], count: int = 3) -> str:
    """`did you mean a, b or c?` for a mistyped `name`; empty when nothing is near."""
    found = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.6)
    if not found:
        return ""
    *rest, last = found
    return f"did you mean {', '.join(rest) + ' or ' if rest else ''}{last}?"
