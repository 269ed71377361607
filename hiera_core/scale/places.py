"""Folders for rows, on this machine or at a remote place. Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..atomic import atomic_file, unfinished
from ..data.remote.remote_files import as_input_errors, is_remote, open_place, with_retries
from ..errors import InputError, OutputError


class Place(Protocol):
    """A folder of files, known by their names."""

    text: str  # as the user wrote it

    def names(self, prefix: str, ending: str) -> list[str]:
        """Return the names of the files that begin and end so, in order."""

    def open(self, name: str) -> Any:
        """Return a file, opened to read bytes."""

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Yield a path to write to. The file appears under its name at the end of the block."""

    def remove(self, name: str) -> None:
        """Remove a file."""


def place_of(text: str) -> Place:
    """Return the folder that a path or URL names.

    Raises:
        UsageError: The package of the remote place is not installed.
    """
    return RemotePlace(text) if is_remote(text) else LocalPlace(str(Path(text).absolute()))


class LocalPlace:
    """A folder on this machine, or one that is mounted."""

    def __init__(self, text: str) -> None:
        self.text, self._folder = text, Path(text)

    def names(self, prefix: str, ending: str) -> list[str]:
        found = self._folder.iterdir() if self._folder.is_dir() else ()
        names = (path.name for path in found)
        return sorted(name for name in names if name.startswith(prefix) and name.endswith(ending))

    def open(self, name: str) -> Any:
        return (self._folder / name).open("rb")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        with unfinished.finish_first(path), atomic_file(path) as temporary:
            yield temporary

    def remove(self, name: str) -> None:
        try:
            (self._folder / name).unlink()
        except OSError as error:
            raise OutputError(f"{self.text}/{name} cannot be removed ({error.strerror})") from error


class RemotePlace:
    """A folder of `fsspec`. An upload that ends early leaves nothing under the file's name: object
    stores show a file when it is complete."""

    def __init__(self, text: str) -> None:
        self.text = text.rstrip("/")
        open_place(self.text)  # raises an error about a missing package

    def __getstate__(self) -> dict[str, str]:
        return {"text": self.text}

    def names(self, prefix: str, ending: str) -> list[str]:
        system, path = open_place(self.text)

        def listed() -> list[str]:
            system.invalidate_cache()
            try:
                return [str(one) for one in system.ls(path, detail=False)]
            except FileNotFoundError:
                return []

        with _as_output_errors(self.text, "be listed"):
            names = (one.rstrip("/").rpartition("/")[2] for one in with_retries(listed, path))
            return sorted(n for n in names if n.startswith(prefix) and n.endswith(ending))

    def open(self, name: str) -> Any:
        system, path = open_place(self.text)
        with _as_output_errors(f"{self.text}/{name}", "be read"):
            return io.BytesIO(with_retries(lambda: system.cat_file(f"{path}/{name}"), name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        system, path = open_place(self.text)
        with tempfile.TemporaryDirectory(prefix="hiera-") as folder:
            temporary = Path(folder) / name
            yield temporary
            content = temporary.read_bytes()
            with _as_output_errors(f"{self.text}/{name}", "be written"):
                with_retries(lambda: system.pipe_file(f"{path}/{name}", content), name)

    def remove(self, name: str) -> None:
        system, path = open_place(self.text)
        with _as_output_errors(f"{self.text}/{name}", "be removed"):
            with_retries(lambda: system.rm_file(f"{path}/{name}"), name)


@contextlib.contextmanager
def _as_output_errors(what: str, verb: str) -> Iterator[None]:
    try:
        with as_input_errors():
            yield
    except InputError as error:
        reason = error.message.removeprefix("cannot be fetched ").strip("()")
        raise OutputError(f"{what} cannot {verb} ({reason})", "run again with --resume") from error
