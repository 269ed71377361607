"""The command table and the entry point."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from typing import Annotated

import typer

import hiera_core

from . import exit_codes
from .commands import bench, convert, eval, features, mae, models, predict, train

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 3.0  # from a signal to the end at the latest

app = typer.Typer(
    name="hiera",
    help="Hiera, the hierarchical vision transformer, for images and video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("predict")(predict.predict)
app.command("mae")(mae.mae)
app.command("features")(features.features)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("convert")(convert.convert)
app.command("bench")(bench.bench)
app.command("models")(models.models)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hiera {hiera_core.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")
    ] = False,
) -> None:
    """Classify, reconstruct, train: Hiera for pictures and videos."""


def main() -> None:
    """The console script: run, then exit with the code (see errors.py)."""
    _prepare_streams()
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")  # other libraries': stderr is for our one-line messages
    signal.signal(signal.SIGTERM, exit_codes.on_sigterm)
    _leave_soon_after_signals()
    _leave(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Carry out one command line and give its exit code. All errors end here, in one line."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]  # also after the command's name
    log = logging.getLogger("hiera")
    if not any(isinstance(handler, _Say) for handler in log.handlers):
        log.addHandler(_Say())
        for other in ("huggingface_hub", "torch", "PIL"):  # our line says it all
            logging.getLogger(other).setLevel(logging.CRITICAL)
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="hiera", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # the last resort
        if debug:
            raise
        return exit_codes.exit_code_of(error)
    return code if isinstance(code, int) else exit_codes.OK


class _Say(logging.Handler):
    """The library's log, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        exit_codes.print_message(record.getMessage())


def _leave_soon_after_signals() -> None:
    """A signal is an exception in the main thread, once that comes back to Python: a long pass
    through the model could hold it up for minutes. What is done is on the disk by then."""
    if os.name != "posix":
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)

    def watch() -> None:
        signum = 0
        while signum not in ENDING_SIGNALS:  # a worker's end (SIGCHLD) wakes it, too
            signum = os.read(receive, 1)[0]
        time.sleep(GRACE_S)
        os._exit(128 + signum)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _prepare_streams() -> None:
    """File names are bytes and need not be UTF-8: pass them through, never fail on one. Labels
    need not be ASCII."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: else the next file to be opened takes its place
            # Opened for reading, so that results that are printed are not lost without a word.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _leave(code: int) -> None:
    """Exit at once: tearing down torch costs a fifth of a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
