"""Where a command writes pictures: a folder with files for each input, or one file for one."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hiera_core.data import sources
from hiera_core.data.sources import Source
from hiera_core.errors import UsageError
from hiera_core.places.remote_requests import is_remote
from hiera_core.places.uploads import Upload
from hiera_core.records import Record

from .claims import claim_file, claim_folder
from .remote_outputs import is_file_name, open_file, open_folder

if TYPE_CHECKING:
    from hiera_core.viz.output_names import OutputNames


class PictureOutput:
    """The folder for the pictures of all inputs, or the file for that of a single one.

    Args:
        text: The path or URL. It names a file if it has one of the extensions and is no folder.
        inputs, recursive: The arguments of the command, see `sources.expand`.
        endings: Extensions of the files that the command writes.

    Raises:
        UsageError: The extension is unknown.
    """

    def __init__(
        self, text: str, inputs: Sequence[str], recursive: bool, endings: Sequence[str] = (".png",)
    ) -> None:
        self.path, self._inputs, self._recursive = Path(text), inputs, recursive
        self.shown: str | Path = self.path if not is_remote(text) else text.rstrip("/")
        self._url = text if is_remote(text) else None
        self._upload: Upload | None = None
        self._names: OutputNames | None = None
        ending = self.path.suffix.lower()
        if self._url is not None:
            self.ending = ending if is_file_name(text, endings) else ""
            return
        is_folder = not ending or text.endswith(("/", os.sep)) or sources.is_folder(self.path)
        if not (is_folder or ending in endings):
            raise UsageError(
                f"unknown file extension in {self.path.name!r}",
                f"end it in {' or '.join(endings)}; or, for a folder, in /",
            )
        self.ending = "" if is_folder else ending

    @contextlib.contextmanager
    def claim(self, may_replace: bool) -> Iterator[None]:
        """Hold the lock of the file or folder within the block.

        Args:
            may_replace: Whether the file may exist, or the folder may hold files.

        Raises:
            UsageError: See `claim_file` and `claim_folder`; or the file is one of the inputs.
        """
        if self._url is not None:
            with contextlib.ExitStack() as stack:
                if self.ending:
                    opened = stack.enter_context(open_file(self._url, may_replace))
                    self.path, self._upload = opened
                else:
                    self._upload = stack.enter_context(open_folder(self._url, may_replace))
                    self.path = self._upload.folder
                yield
            return
        if not self.ending:
            with claim_folder(self.path, may_replace):
                yield
            return
        for text in self._inputs:
            self._check_not_input(Path(text))
        with claim_file(self.path, may_replace) as self.path:
            yield

    def assign(self, found: Iterator[Source]) -> Iterator[Source]:
        """Yield the inputs with the names of their files, see `OutputNames`.

        Raises:
            UsageError: There are several inputs for one file, or an image for a video file.
        """
        from hiera_core.viz.output_names import OutputNames

        if not self.ending:
            self._names = OutputNames(self.path, self._listed)
            return self._names.assign(found)
        first = list(itertools.islice(found, 2))
        if len(first) > 1:
            raise UsageError(
                f"{str(self.path)!r} is one file, and there are several inputs",
                f"name a folder: {str(self.path.with_suffix(''))!r}",
            )
        for source in first:
            self._check_kind(source)
            if source.path is not None:
                self._check_not_input(source.path)
        return iter(first)

    def files(self, record: Record, endings: Iterable[str]) -> list[Path]:
        """Return the files of a record, after creating their folder.

        Args:
            record: The record.
            endings: Extensions of the files, if they are in a folder.

        Raises:
            InputError, OutputError: See `OutputNames.path`.
        """
        if self._names is None:
            return [self.path]
        return [self._names.path(record, ending) for ending in endings]

    def finish(self, files: Iterable[Path]) -> list[str]:
        """Return the names of complete files to show, after sending them to their remote place.

        Raises:
            OutputError: They cannot be written there.
        """
        return [str(file) if self._upload is None else self._upload.send(file) for file in files]

    def _listed(self) -> Iterator[Source]:
        return sources.expand(self._inputs, recursive=self._recursive, ahead=True)

    def _check_kind(self, source: Source) -> None:
        may_be_video = source.looks_like_video or source.url is not None or source.error is not None
        if self.ending == ".mp4" and not may_be_video and not _is_animation(source):
            raise UsageError(
                f"{source.name!r} is an image, and {str(self.path)!r} would be a video",
                "end it in .png",
            )

    def _check_not_input(self, path: Path) -> None:
        is_input = False
        with contextlib.suppress(OSError, ValueError):  # it does not exist, or there is a NUL in it
            is_input = path.samefile(self.path)
        if is_input:
            shown = repr(str(self.path))
            raise UsageError(f"output {shown} is a file that is an input", "name another file")


def _is_animation(source: Source) -> bool:
    from hiera_core.data.video_files.animation_reader import is_animation

    content = source.path if source.span is None else None
    return any(is_animation(c) for c in (content, source.data) if c is not None)
