"""Images and videos in tar files, read in place: nothing is extracted."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import UsageError
from .folders import HIDDEN, NO_EXTENSION
from .media_types import ENDINGS, ending_of

MAX_LABEL_BYTES = 1 << 16
MAX_SHARDS = 100_000
# Why a member is refused, and what to do.
SPARSE, SPARSE_HINT = "is stored as a sparse file", "make the tar file without --sparse"
BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


@dataclass(frozen=True)
class Member:
    """A file in a tar file."""

    name: str
    offset: int  # of its content, in bytes
    size: int  # in bytes
    is_sparse: bool = False  # whether its holes are left out, so that it cannot be read in place

    @property
    def key(self) -> str:
        """What the files of one sample share: the name up to its first dot (WebDataset)."""
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"


def read_members(
    file: Path | IO[bytes], passed_over: Counter[str] | None = None
) -> Iterator[Member]:
    """Yield the images and videos in a tar file, in its order. Compressed tar files are not read,
    because their members cannot be read in place. Hidden files are left out, such as the `._x.jpg`
    that macOS adds to each file.

    Args:
        file: The tar file, or its path.
        passed_over: Counts the other files, by extension; hidden ones under `hidden`.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or ends within a member.
    """
    with tarfile.open(*_arguments(file)) as archive:  # type: ignore[call-overload]
        for entry in _entries(archive):
            ending = ending_of(entry.name)
            if not entry.isfile():
                continue
            hidden = _is_hidden(entry.name)
            if ending in ENDINGS and not hidden:
                yield Member(entry.name, entry.offset_data, entry.size, entry.issparse())
            elif passed_over is not None:
                passed_over[HIDDEN if hidden else ending or NO_EXTENSION] += 1


def read_samples(file: Path | IO[bytes], labelled: bool) -> list[tuple[Member, str | None]]:
    """Return the images and videos in a tar file in the format of webdataset, with their labels,
    in its order. It is read once, from its beginning to its end.

    Files with the same name up to the first dot are one sample. Its `.cls` file holds the label.

    Args:
        file: The tar file, or its path.
        labelled: Whether labels are read. None stands for a sample without one.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or ends within a member.
    """
    samples: dict[str, Member] = {}
    labels: dict[str, str] = {}
    with tarfile.open(*_arguments(file)) as archive:  # type: ignore[call-overload]
        for entry in _entries(archive):
            if not entry.isfile() or _is_hidden(entry.name):
                continue
            member = Member(entry.name, entry.offset_data, entry.size, entry.issparse())
            if ending_of(entry.name) in ENDINGS:
                samples[member.key] = member
            elif labelled and _is_label(entry.name) and (content := archive.extractfile(entry)):
                text = content.read(MAX_LABEL_BYTES).decode("utf-8", "replace")
                labels[member.key] = text.strip()
            archive.members.clear()  # it would keep all of them
    return [(member, labels.get(key)) for key, member in samples.items()]


def _entries(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file.

    Raises:
        tarfile.TarError: The size of one is below 0, which some versions of Python follow back to a
            header that they have read, without end.
    """
    for entry in archive:
        if entry.size < 0:
            raise tarfile.ReadError(f"{entry.name} has a size of {entry.size} bytes")
        yield entry


def _is_label(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2] == "cls"


def _arguments(file: Path | IO[bytes]) -> tuple[Path | None, str, IO[bytes] | None]:
    """Return the arguments of `tarfile.open` for a file or its path."""
    return (file, "r:", None) if isinstance(file, Path) else (None, "r:", file)


def expand_braces(text: str) -> list[str]:
    """`a-{00..12}.tar` -> a-00.tar, a-01.tar, ...; several braces give all combinations.

    Raises:
        UsageError: These are none, or more than `MAX_SHARDS`.
    """
    start, *rest = BRACES.split(text)  # rest: first number, last number, text, first number, ...
    names = [start]
    for first, last, tail in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise UsageError(f"{{{first}..{last}}} in {text} counts down", "swap its numbers")
        if len(names) * len(numbers) > MAX_SHARDS:
            raise UsageError(
                f"{text} stands for more than {MAX_SHARDS} files", "name fewer at once"
            )
        names = [f"{name}{n:0{len(first)}}{tail}" for name in names for n in numbers]
    return names


def _is_hidden(name: str) -> bool:
    """Return whether a member, or a folder that it is in, is hidden."""
    return any(part[0] == "." and part not in (".", "..") for part in name.split("/") if part)
