"""Results that go to a remote place, file by file, each when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..atomic import unfinished
from ..errors import OutputError
from .places import RemotePlace


class Upload:
    """A temporary folder on this machine, whose files are sent to a folder at a remote place.

    A file that cannot be sent stays on this machine, and the error says where. Call `close` at the
    end.

    Args:
        url: The folder at the remote place.

    Attributes:
        place: That folder.
        folder: The temporary folder.

    Raises:
        UsageError: The package of the place is not installed, or the bucket does not exist.
        OutputError: The place does not answer.
    """

    def __init__(self, url: str) -> None:
        self.place = RemotePlace(url)
        self.place.check_bucket()
        self.folder = Path(tempfile.mkdtemp(prefix="hiera-"))
        self.is_kept = False  # True if results are in the temporary folder alone

    def name_of(self, path: Path) -> str:
        """Return the URL of the temporary folder, or that a file in it gets."""
        name = path.relative_to(self.folder).as_posix()
        return self.place.text if name == "." else f"{self.place.text}/{name}"

    def send(self, path: Path) -> str:
        """Write a complete file to the remote place, remove it here, and return its URL.

        Raises:
            OutputError: It cannot be written there.
        """
        name, kept = self.name_of(path), f"the file is kept as {path}"
        # A signal that comes meanwhile is raised when it is known whether the file has been sent.
        with unfinished.finish_first(path):
            try:
                self.place.upload(path, path.relative_to(self.folder).as_posix())
            except BaseException as error:
                self.is_kept = True
                if (signal := unfinished.deferred()) is not None:
                    signal.add_note(f"{name} is not written; {kept}")
                if isinstance(error, OutputError):
                    raise OutputError(error.message, kept) from error
                error.add_note(f"{name} is not written; {kept}")
                raise
            path.unlink()
        return name

    def close(self) -> None:
        """Remove the temporary folder, unless results are there alone."""
        if not self.is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
