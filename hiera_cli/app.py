"""The command table and the entry point."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Annotated

import typer

import hiera_core

from . import errors, models, predict

app = typer.Typer(
    name="hiera",
    help="Hiera, the hierarchical vision transformer, for images and video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("predict")(predict.predict)
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
    """Classify pictures with Hiera; look at the model zoo."""


def main() -> None:
    """Run the command line and exit with its code (see errors.py)."""
    _prepare_streams()
    signal.signal(signal.SIGTERM, errors.on_sigterm)
    logging.basicConfig(format="hiera: %(message)s", stream=sys.stderr, level=logging.WARNING)
    debug = "--debug" in sys.argv
    if debug:  # also after the command's name
        sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        code = typer.main.get_command(app).main(prog_name="hiera", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # the last resort: everything ends in one line and a code
        if debug and not isinstance(error, SystemExit):
            raise
        code = error.code if isinstance(error, SystemExit) else errors.exit_code_of(error)
    _leave(code if isinstance(code, int) else errors.OK)


def _prepare_streams() -> None:
    """File names are bytes and need not be UTF-8: pass them through, never fail on one."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")


def _leave(code: int) -> None:
    """Exit at once: tearing down torch costs a fifth of a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
