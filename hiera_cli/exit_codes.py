"""Exit codes, and the one-line messages on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence

import typer

from hiera_core.errors import (
    CheckpointError,
    DeviceError,
    HieraError,
    HubError,
    OutputError,
    TrainingError,
    UsageError,
)

OK, SOME_FAILED, USAGE, CHECKPOINT, HUB, MACHINE, TRAINING = range(7)
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # 128 + the signal's number, as in shells

# Control characters, and those that set the direction of writing or end a line.
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
# What the message about a signal says.
SIGNAL_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

EXIT_CODES: tuple[tuple[type[HieraError], int], ...] = (
    (UsageError, USAGE),
    (CheckpointError, CHECKPOINT),
    (HubError, HUB),
    (DeviceError, MACHINE),
    (OutputError, MACHINE),
    (TrainingError, TRAINING),  # a job script may start again after 5; here it would end the same
)


reported_signals: set[int] = set()  # signals about which a line has been printed


class ReaderGone(BaseException):
    """The reader of standard output has closed it, as in `hiera ... | head`.

    A BrokenPipeError would not work, because typer catches it and exits with 1.
    """


class Interrupted(BaseException):
    """A signal as an exception, so that finished results are flushed before the process ends.

    It is no KeyboardInterrupt, because typer catches that, and prints an empty line.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def exit_code_of(error: BaseException, hint: str = "") -> int:
    """Print one line about an error on stderr, and return the exit code for it.

    Args:
        error: The error.
        hint: What to add to a usage error of click.
    """
    if hasattr(error, "format_message"):  # a usage error of click, or of typer's copy of click
        if text := error.format_message():  # it is empty if the help has been printed instead
            text = _plain(text, getattr(getattr(error, "param", None), "metavar", None))
            print_message(f"{text.rstrip('.')}; {hint}" if hint else text)
        return USAGE
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        report_signal(error.signum, getattr(error, "__notes__", ()))
        return 128 + error.signum
    if isinstance(error, BrokenPipeError | ReaderGone):
        _redirect_stdout()
        return BROKEN_PIPE
    if isinstance(error, HieraError):
        first, *details = str(error).split("\n") if error.details else [str(error)]
        print_message("; ".join([first, *getattr(error, "__notes__", ())]))
        for line in details:
            print_message(line)
        return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), SOME_FAILED)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print_message("the disk is full; free some space and use --resume")
        return MACHINE
    if isinstance(error, OSError):  # the system refuses something that no command expects
        where = f"{error.filename}: " if error.filename is not None else ""
        reason = error.strerror or type(error).__name__
        print_message(f"{where}{reason}; check this machine, or use --debug to see where it fails")
        return MACHINE
    if isinstance(error, MemoryError):
        print_message("out of memory; use a smaller model or batch")
        return MACHINE
    first_line = next(iter(str(error).splitlines()), "")
    reason = f"{type(error).__name__}: {first_line}".rstrip(": ")
    print_message(f"unexpected error ({reason}); run again with --debug and report what it prints")
    return SOME_FAILED


# What typer's validation says, and what is printed instead.
PLAIN_WORDS = {
    r"Input should be a valid (number|float)\b.*": "give a number",
    r"Input should be a valid integer\b.*": "give a whole number",
    r"Input should be (?=(greater|less) than)": "give a number ",
    r"Input should be ": "give ",
    r"Value error, ": "",
}


def _plain(text: str, metavar: str | None = None) -> str:
    """Return the message of a usage error without words of the libraries that found it.

    Args:
        text: The message.
        metavar: What the help shows for the value of the option: SECONDS.
    """
    for found, shown in PLAIN_WORDS.items():
        text = re.sub(found, shown, text)
    says_more = metavar is not None and len(metavar) > 1 and text.endswith("number")
    return f"{text} ({metavar})" if says_more else text


def signal_words(signum: int) -> str:
    """Return what the message about a signal says: `interrupted`."""
    return SIGNAL_WORDS.get(signal.Signals(signum), "terminated")


def report_signal(signum: int, notes: Sequence[str]) -> None:
    """Print one line about the signal that ends the process."""
    reported_signals.add(signum)
    print_message("; ".join([signal_words(signum), *notes]))


def printable(name: str) -> str:
    """Return a text without characters that drive a terminal, or show the others in another order:
    `\\x1b[31m.png`."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def print_message(text: str) -> None:
    """Print a message as one line on stderr. Line breaks within it become spaces."""
    line = f"hiera: {printable(' '.join(text.split()))}"
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        try:
            print(line, file=sys.stderr, flush=True)
        except UnicodeEncodeError:  # a name that is not text, on a stream that takes text only
            print(ascii(line)[1:-1], file=sys.stderr, flush=True)


def _redirect_stdout() -> None:
    """Send the rest of standard output to the null device, so that flushing it at exit does not
    fail again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
