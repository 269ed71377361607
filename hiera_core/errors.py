"""Errors for users. Each names what was expected, what was given, and what to do next.

The rule for all errors:

- A call that cannot be carried out at all raises a `HieraError`, whose class is the kind of
  error. The command line ends with its exit code:

      UsageError, ConfigError       2
      CheckpointError               3
      HubError                      4
      DeviceError, OutputError      5
      TrainingError                 6
      InputError                    1

- An input that cannot be read does not stop the others. The functions that take several inputs
  return a result for each, and the error is in the result of its input: a record with the status
  "error", or `Features` with an `error`. The command line then ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class HieraError(Exception):
    """Base class of the errors that this package reports to users.

    Args:
        message: What happened, and to which input or file.
        hint: What to do next; shown after the message.
        details: Further lines, such as one for each value that is wrong.
    """

    def __init__(self, message: str, hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        first = f"{self.message}; {self.hint}" if self.hint else self.message
        return "\n".join([first, *(f"  {line}" for line in self.details)])

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.message, self.hint, self.details)


class UsageError(HieraError, ValueError):
    """A call or a command that cannot be carried out as written."""


class ConfigError(UsageError):
    """A model configuration that cannot be built (sizes, strides, mask units)."""


class CheckpointError(HieraError, RuntimeError):
    """A checkpoint that is missing, damaged, unsafe, or for another model or architecture."""


class NoClassifierError(CheckpointError):
    """A checkpoint that has an encoder, but no classifier."""


class HubError(HieraError, RuntimeError):
    """A failed transfer: the hub is offline, a file is missing or gated, or it arrives damaged."""


class DeviceError(HieraError, RuntimeError):
    """A device that does not exist, is out of memory, or cannot compile."""


class OutputError(HieraError, RuntimeError):
    """A result that cannot be written, for example because the disk is full."""


class TrainingError(HieraError, RuntimeError):
    """Training that cannot continue: it diverged, or too much of its data cannot be read."""


class InputError(HieraError):
    """One input that cannot be used. The others are not affected."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def did_you_mean(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return `did you mean a, b or c?` for a mistyped name, or "" if no choice is similar."""
    similar = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.6)
    if not similar:
        return ""
    *rest, last = similar
    return f"did you mean {', '.join(rest) + ' or ' if rest else ''}{last}?"


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Check that a value is one of the choices.

    Raises:
        UsageError: It is not. The hint suggests a similar choice, or lists all.
    """
    choices = list(choices)
    if not isinstance(value, str):
        raise UsageError(f"{what} is {value!r:.60}", f"use {', '.join(choices)}")
    if value not in choices:
        hint = did_you_mean(value, choices) or f"use {', '.join(choices)}"
        raise UsageError(f"unknown {what} {value!r}", hint)


def check_positive(what: str, value: int | None, most: int | None = None) -> None:
    """Check that a number, if it is given, is whole, at least 1, and at most `most`.

    Raises:
        UsageError: It is not.
    """
    if value is not None and not is_whole(value):
        raise UsageError(f"{what} is {value!r}", "give a whole number above 0")
    if value is not None and value < 1:
        raise UsageError(f"{what} is {value}", "give a number above 0")
    if value is not None and most is not None and value > most:
        raise UsageError(f"{what} is {value}", f"give a number of at most {most}")


def check_type(what: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check the type of an argument.

    Args:
        what: Name of the argument.
        value: What the user gave.
        kinds: The types that it may have.
        expected: What to give instead, for the hint.

    Raises:
        UsageError: It has another type.
    """
    if not isinstance(value, kinds):
        raise UsageError(f"{what} is {value!r:.60}", f"give {expected}")


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, also one of NumPy's, and no boolean."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a number, also one of NumPy's, and no boolean."""
    return is_whole(value) or (hasattr(value, "__float__") and not isinstance(value, bool | str))
