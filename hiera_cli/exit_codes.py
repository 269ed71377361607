"""From an exception to one line, a remedy and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from types import FrameType
from typing import NoReturn

import typer

from hiera_core.errors import (
    CheckpointError,
    DeviceError,
    HieraError,
    HubError,
    OutputError,
    UsageError,
)

OK, SOME_FAILED, USAGE, CHECKPOINT, HUB, MACHINE = range(6)
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # 128 + the signal, as shells count

EXIT_CODES: tuple[tuple[type[HieraError], int], ...] = (
    (UsageError, USAGE),
    (CheckpointError, CHECKPOINT),
    (HubError, HUB),
    (DeviceError, MACHINE),
    (OutputError, MACHINE),
)


class ReaderGone(BaseException):
    """The reader of standard output has gone (`| head`); typer would make exit code 1 of EPIPE."""


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what is done is flushed on the way out."""


def on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def exit_code_of(error: BaseException) -> int:
    """Say what happened on stderr, in one line, and give the exit code for it."""
    if hasattr(error, "format_message"):  # click's; typer may carry its own copy of click
        print_message(error.format_message())
        return USAGE
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        print_message("interrupted")
        return INTERRUPTED
    if isinstance(error, Terminated):
        print_message("terminated")
        return TERMINATED
    if isinstance(error, BrokenPipeError | ReaderGone):
        _close_stdout()
        return BROKEN_PIPE
    if isinstance(error, HieraError):
        print_message(str(error))
        return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), SOME_FAILED)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print_message("no room left on the disk; free some and use --resume")
        return MACHINE
    if isinstance(error, MemoryError):
        print_message("out of memory; use a smaller model or batch")
        return MACHINE
    kind = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
    print_message(f"unexpected error ({kind}); run again with --debug and report what it prints")
    return SOME_FAILED


def print_message(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    line = " ".join(text.split())
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone, and the reader
        print(f"hiera: {line}", file=sys.stderr, flush=True)


def _close_stdout() -> None:
    """The reader has gone (`| head`): nothing more to say, also not at interpreter exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
