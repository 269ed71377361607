"""The parts of an index: bytes in memory, or in one file that all processes read.

A file is read by position, two short reads for a sample, and not mapped into memory: a process that
has read all samples of a mapped file, in random order, has all of it among its pages. Only labels,
which the samplers need as an array, are mapped.

The file is: the sections, each at a multiple of 64 bytes; a JSON object with their places and what
the index holds; the length of that object, in 8 bytes; and `MAGIC`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

MAGIC = b"HIERAIX1"
ALIGNMENT = 64  # of a section, in bytes
MAX_HEADER = 256 << 20  # bytes
BUFFER = 8 << 20  # bytes of a section that are kept in memory while it is written


class Sections(Protocol):
    """The parts of an index, by name.

    Attributes:
        facts: What the index holds.
    """

    facts: dict[str, Any]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a section; less at its end."""

    def size(self, name: str) -> int:
        """Return the size of a section in bytes."""

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """Return a section as an array, which cannot be written to."""


class SectionsInMemory:
    """Sections of a small index. See `Sections`."""

    def __init__(self, facts: dict[str, Any], content: Mapping[str, bytes]) -> None:
        self.facts, self._content = facts, dict(content)

    def read(self, name: str, start: int, length: int) -> bytes:
        """See `Sections.read`."""
        return self._content[name][start : start + length]

    def size(self, name: str) -> int:
        """See `Sections.size`."""
        return len(self._content[name])

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """See `Sections.array`."""
        return np.frombuffer(self._content[name], dtype)


class SectionsInFile:
    """Sections of an index file. Another process gets it by its path, and opens it again. See
    `Sections`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no index, or damaged.
    """

    def __init__(self, path: Path, build: str | None = None) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        end = self._at(max(0, size - 16), 16)
        if len(end) < 16 or end[8:] != MAGIC:
            raise ValueError("it is no index")
        length = int.from_bytes(end[:8], "little")
        if not 0 < length <= min(MAX_HEADER, size - 16):
            raise ValueError("it is damaged")
        header = json.loads(self._at(size - 16 - length, length))
        self.facts: dict[str, Any] = header["facts"]
        self._places = {name: (int(a), int(b)) for name, (a, b) in header["sections"].items()}
        if any(a < 0 or b < 0 or a + b > size for a, b in self._places.values()):
            raise ValueError("it is damaged")
        if build is not None and self.facts["build"] != build:
            raise ValueError("it has been replaced")

    def __reduce__(self) -> tuple[type[SectionsInFile], tuple[Path, str]]:
        return type(self), (self.path, self.facts["build"])

    def read(self, name: str, start: int, length: int) -> bytes:
        """See `Sections.read`."""
        offset, size = self._places[name]
        return self._at(offset + start, max(0, min(length, size - start)))

    def size(self, name: str) -> int:
        """See `Sections.size`."""
        return self._places[name][1]

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """See `Sections.array`."""
        offset, size = self._places[name]
        if not size:
            return np.empty(0, dtype)
        whole = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        return np.frombuffer(whole, dtype, size // np.dtype(dtype).itemsize, offset)

    def _at(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file, length, offset)
        with self.path.open("rb") as file:  # Windows, where processes share no position
            file.seek(offset)
            return file.read(length)


class SectionWriter:
    """Bytes that are written one after another: to memory, and when they are many, to a file.

    Args:
        folder: Folder of the file; None: that of the system for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self.size, self._folder = 0, folder
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None

    def write(self, content: bytes) -> int:
        """Write some bytes, and return where they begin."""
        start = self.size
        self._buffer += content
        self.size += len(content)
        if len(self._buffer) > BUFFER:
            if self._file is None:
                folder = self._folder
                if folder is not None:
                    with contextlib.suppress(OSError):
                        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    folder = folder if os.access(folder, os.W_OK) else None
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` does it
            self._file.write(self._buffer)
            self._buffer.clear()
        return start

    def change(self, function: Callable[[bytes], bytes]) -> None:
        """Replace all bytes by as many that a function returns for them, block by block."""
        if self._file is not None:
            for start in range(0, self.size - len(self._buffer), BUFFER):
                self._file.seek(start)
                new = function(self._file.read(BUFFER))
                self._file.seek(start)
                self._file.write(new)
            self._file.seek(0, os.SEEK_END)
        self._buffer = bytearray(function(bytes(self._buffer)))

    def content(self) -> bytes:
        """Return all bytes."""
        if self._file is None:
            return bytes(self._buffer)
        self._file.seek(0)
        return self._file.read() + bytes(self._buffer)

    def copy_to(self, file: IO[bytes]) -> None:
        """Write all bytes to another file."""
        if self._file is not None:
            self._file.seek(0)
            shutil.copyfileobj(self._file, file, BUFFER)
        file.write(self._buffer)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()


def write_sections(
    path: Path, facts: dict[str, Any], sections: Mapping[str, SectionWriter]
) -> None:
    """Write an index file.

    Raises:
        OSError: It cannot be written.
    """
    places = {}
    with path.open("wb") as file:
        for name, section in sections.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[name] = (file.tell(), section.size)
            section.copy_to(file)
        header = json.dumps({"facts": facts, "sections": places}).encode()
        file.write(header + len(header).to_bytes(8, "little") + MAGIC)
