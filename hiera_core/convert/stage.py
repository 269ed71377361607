"""DEST appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from ..files import umask
from .targets import Target

CURE = "free some space, or write elsewhere; nothing was left"


@contextlib.contextmanager
def staged(dest: Path, target: Target) -> Iterator[Path]:
    """A folder beside DEST to write into. When the block ends well it becomes DEST, or its files
    take their places; otherwise nothing of it is left.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}."))
        yield stage
        for path in stage.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if target.folder:
            stage.chmod(0o777 & ~umask())
            _swap(stage, dest)
        else:  # the file itself last: it may refer to others
            for path in sorted(stage.iterdir(), key=lambda path: path.name == dest.name):
                path.chmod(0o666 & ~umask())
                path.replace(dest.with_name(path.name))
    except OSError as error:
        raise OutputError(f"{dest} cannot be written ({error.strerror or error})", CURE) from error
    except OutputError as error:  # of a file in the stage, whose name says nothing
        message = error.message.replace(f"{stage}/", f"{dest}: ")
        raise OutputError(message.replace(f": {dest.name} ", " "), CURE) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, dest: Path) -> None:
    """A folder cannot be renamed over another that holds files."""
    if not dest.exists():
        stage.rename(dest)
        return
    old = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}.old."))
    dest.rename(old / dest.name)
    try:
        stage.rename(dest)
    except OSError:
        (old / dest.name).rename(dest)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
