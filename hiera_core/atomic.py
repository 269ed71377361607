"""Write files and folders atomically: they appear under their final name only when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path. When the block ends without an error, the file that was written
    there is flushed to disk (fsync) and renamed to `path`; otherwise it is removed.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".hiera-")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_destination(dest: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `dest` to write into.

    When the block ends without an error, the temporary folder is renamed to `dest` (`is_folder`),
    or its files are moved to the folder of `dest`. Otherwise everything that was written is
    removed.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    hint = "free some space, or write elsewhere; no partial files remain"
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}."))
        yield stage
        for path in stage.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if is_folder:
            stage.chmod(0o777 & ~umask())
            _replace_folder(stage, dest)
        else:  # `dest` itself comes last, because it may refer to the other files
            for path in sorted(stage.iterdir(), key=lambda path: path.name == dest.name):
                path.chmod(0o666 & ~umask())
                path.replace(dest.with_name(path.name))
    except OSError as error:
        raise OutputError(f"{dest} cannot be written ({error.strerror or error})", hint) from error
    except OutputError as error:  # its message names a file in the temporary folder
        message = error.message.replace(f"{stage}/", f"{dest}: ")
        raise OutputError(message.replace(f": {dest.name} ", " "), hint) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def umask() -> int:
    """Return the file mode creation mask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace_folder(source: Path, dest: Path) -> None:
    """Rename `source` to `dest`. A folder cannot be renamed onto another that holds files, so an
    existing `dest` is moved aside first, and moved back if the rename fails."""
    if not dest.exists():
        source.rename(dest)
        return
    old = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}.old."))
    dest.rename(old / dest.name)
    try:
        source.rename(dest)
    except OSError:
        (old / dest.name).rename(dest)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
