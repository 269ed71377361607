"""Table of the commands, and the entry point."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import hiera_core
from hiera_core.data.media_types import ENDINGS
from hiera_core.process import allocator, cores
from hiera_core.weights import names

from . import exit_codes, help_text, native_output, signals
from .commands import bench, convert, eval, features, mae, models, predict, train
from .output_formats import flush_stdout

COMMANDS: dict[str, Callable[..., object]] = {
    "predict": predict.predict,
    "mae": mae.mae,
    "features": features.features,
    "train": train.train,
    "eval": eval.evaluate,
    "convert": convert.convert,
    "bench": bench.bench,
    "models": models.models,
}


app = typer.Typer(
    name="hiera",
    cls=help_text.Group,
    epilog=help_text.examples(""),
    help="Command line of Hiera, a hierarchical vision transformer for images and video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(
        _name,
        cls=train.TrainCommand if _name == "train" else help_text.Command,
        help=help_text.help_text(_command),
        epilog=help_text.examples(_name),
    )(_command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hiera {hiera_core.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error instead of one line."),
    ] = False,
) -> None:
    """Handle the options that come before the name of a command."""


def main() -> None:
    """Run the command line of this process, and exit with its code (see exit_codes.py)."""
    _prepare_streams()
    cores.limit_threads()
    allocator.keep_freed_memory()
    if "--debug" not in sys.argv:
        # Warnings of other libraries would hide our one-line messages on stderr.
        warnings.simplefilter("ignore")
        native_output.silence()
    signals.handle_signals()
    try:
        code = run(sys.argv[1:])
    except exit_codes.Interrupted as error:  # a signal while `run` reports another error
        if "--debug" in sys.argv:
            raise
        code = exit_codes.exit_code_of(error)
    signals.end_as_signalled()
    _exit_now(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Every error becomes one line on stderr, unless the arguments contain `--debug`.
    """
    debug = "--debug" in arguments
    # Also accept --debug after the name of the command.
    arguments = [argument for argument in arguments if argument != "--debug"]
    _attach_message_handler()
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="hiera", standalone_mode=False)
        flush_stdout()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        if debug:
            raise
        return exit_codes.exit_code_of(error, hint=_hint_for(error, arguments))
    return code if isinstance(code, int) else exit_codes.OK


def _hint_for(error: BaseException, arguments: list[str]) -> str:
    """Return what to write in place of arguments that click refuses, or ""."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "param_type") and context is not None:  # something required is missing
        return f"for example: {help_text.EXAMPLES[context.info_name][0]}"
    return _hint_for_dash(error, arguments)


def _hint_for_dash(error: BaseException, arguments: list[str]) -> str:
    """Return what to write if a file whose name begins with a dash was taken for an option."""
    option = getattr(error, "option_name", None)
    if option is None:
        return ""
    for name in arguments:
        if name == "--":
            break
        is_file = name.startswith(option) and names.exists(name)
        if is_file or (name.startswith(option) and Path(name).suffix.lower() in ENDINGS):
            return f"for a file of the name {name}, write ./{name}, or put -- before the inputs"
    return ""


class _MessageHandler(logging.Handler):
    """Prints the log of hiera_core as messages on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        exit_codes.print_message(record.getMessage())


def _attach_message_handler() -> None:
    """Print the log of hiera_core; silence libraries whose errors our own messages repeat."""
    log = logging.getLogger("hiera")
    if any(isinstance(handler, _MessageHandler) for handler in log.handlers):
        return
    log.addHandler(_MessageHandler())
    # huggingface_hub sets the level of its log when it is imported, from this variable.
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for library in ("huggingface_hub", "torch", "PIL"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _prepare_streams() -> None:
    """Reopen standard streams that are closed, and make the others accept every file name.

    File names are bytes and need not be UTF-8, so they must pass through unchanged.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        # Without this, the next file that is opened would get the number of a closed stream.
        if getattr(sys, name) is None:
            # stdout is opened for reading, so that printing results fails instead of losing them.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _exit_now(code: int) -> None:
    """Exit without tearing down torch, which takes a fifth of a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
