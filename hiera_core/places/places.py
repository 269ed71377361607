"""Folders for files of results, on this machine or at a remote place. Files appear whole or not at
all."""

from __future__ import annotations

import contextlib
import io
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..atomic import atomic_file, unfinished
from ..errors import InputError, OutputError, UsageError
from . import remote_requests
from .remote_requests import as_input_errors, is_remote, open_place, read_range, with_retries

# Places that show a file when it is complete. At others, it is written under another name.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "memory")
BUCKETS = ("s3", "s3a", "gs", "gcs")  # places whose first folder must exist
SLOWEST_TRANSFER = 1 << 20  # bytes per second; a slower transfer is begun again
READ_BYTES = 16 << 20  # of a request
CHECK = "check the URL, the network and the credentials"
AGAIN = "run again with --resume"


class Place(Protocol):
    """A folder of files, known by their names."""

    text: str  # as the user wrote it

    def names(self, prefix: str, ending: str) -> list[str]:
        """Return the names of the files that begin and end so, in order."""

    def open(self, name: str) -> Any:
        """Return a file, opened to read bytes. Only what is read is fetched."""

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
    """A folder of `fsspec`.

    Args:
        text: Its URL.

    Raises:
        UsageError: The package of the place is not installed, or the URL names no folder.
        OutputError: The place does not answer.
    """

    def __init__(self, text: str) -> None:
        scheme, _, path = text.partition("://")
        if not path.strip("/"):  # fsspec would take it for a folder on this machine
            raise UsageError(f"{text!r} names no place", f"name a folder: {scheme}://bucket/folder")
        self.text = text.rstrip("/")
        with _as_output_errors(self.text, "be reached", CHECK):  # some connect at once
            open_place(self.text)

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

        with _as_output_errors(self.text, "be listed", CHECK):
            # Among them may be the folder itself: an empty object, or a file of its name.
            found = (one.rstrip("/") for one in with_retries(listed, path))
            names = (one.rpartition("/")[2] for one in found if one != path.rstrip("/"))
            return sorted(n for n in names if n.startswith(prefix) and n.endswith(ending))

    def open(self, name: str) -> io.BufferedReader:
        system, path = open_place(self.text)
        with _as_output_errors(f"{self.text}/{name}", "be read"):
            return io.BufferedReader(RemoteReader(system, f"{path}/{name}"))

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        system, path = open_place(self.text)

        def found() -> bool:
            system.invalidate_cache()
            try:
                return bool(system.info(f"{path}/{name}")["type"] == "file")
            except FileNotFoundError:
                return False

        with _as_output_errors(f"{self.text}/{name}", "be looked up", CHECK):
            return with_retries(found, name)

    def check_bucket(self) -> None:
        """Check that the bucket exists, so that a wrong name is reported before any work.

        Raises:
            UsageError: It does not.
        """
        system, path = open_place(self.text)
        if self.text.partition("://")[0].lower() not in BUCKETS:
            return
        bucket = path.partition("/")[0]
        exists = True
        with contextlib.suppress(Exception):  # who may not list a bucket may still write to it
            exists = with_retries(lambda: system.exists(bucket), bucket)
        if not exists:
            raise UsageError(f"{self.text}: there is no bucket {bucket!r}", "check the URL")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="hiera-") as folder:
            temporary = Path(folder) / name
            yield temporary
            self.upload(temporary, name)

    def upload(self, local: Path, name: str) -> None:
        """Write a file of this machine to the place, where it appears when it is complete.

        Args:
            local: The file.
            name: Its name at the place, with the folders in front of it.

        Raises:
            OutputError: It cannot be written.
        """
        system, path = open_place(self.text)
        target = f"{path}/{name}"
        is_whole = self.text.partition("://")[0].lower() in OBJECT_STORES
        folder = target.rpartition("/")[0]
        written = target if is_whole else f"{folder}/.hiera-{secrets.token_hex(8)}"

        def put() -> None:
            if begun and unfinished.deferred() is not None:  # it need not be tried again
                raise OutputError("interrupted", AGAIN)
            begun.append(True)
            if not is_whole:
                system.makedirs(folder, exist_ok=True)
            system.put_file(str(local), written)
            if not is_whole:
                system.mv(written, target)

        begun: list[bool] = []
        seconds = remote_requests.REQUEST_S + local.stat().st_size / SLOWEST_TRANSFER
        # A signal waits for the upload, as for a file that is written here, but for one attempt.
        with unfinished.finish_first(local), _as_output_errors(f"{self.text}/{name}", "be written"):
            with_retries(put, name, seconds)

    def remove(self, name: str) -> None:
        system, path = open_place(self.text)
        with _as_output_errors(f"{self.text}/{name}", "be removed"):
            with_retries(lambda: system.rm_file(f"{path}/{name}"), name)


class RemoteReader(io.RawIOBase):
    """A remote file, of which only what is read is fetched. Each request is tried several times.

    Args:
        system: A file system of fsspec.
        path: The path within it.

    Raises:
        FileNotFoundError: There is no such file.
    """

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path, self._position = system, path, 0
        self.name = path  # as of files on this machine
        self._size = int(with_retries(lambda: system.info(path), path)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        length = min(len(target), READ_BYTES, self._size - self._position)
        if length <= 0:
            return 0
        with _as_output_errors(self._path, "be read"):  # an OSError would say that it is damaged
            block = read_range(self._system, self._path, self._position, length)
        target[: len(block)] = block
        self._position += len(block)
        return len(block)


@contextlib.contextmanager
def _as_output_errors(what: str, verb: str, hint: str = AGAIN) -> Iterator[None]:
    try:
        with as_input_errors():
            yield
    except InputError as error:
        reason = error.message.removeprefix("cannot be fetched ").strip("()")
        raise OutputError(f"{what} cannot {verb} ({reason})", hint) from error
