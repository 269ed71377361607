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
    is_path = isinstance(file, Path)
    name, opened = (file, None) if is_path else (None, file)
    with tarfile.open(name, "r:", opened) as archive:  # type: ignore[call-overload]
        for entry in archive:
            ending = ending_of(entry.name)
            if not entry.isfile():
                continue
            hidden = _is_hidden(entry.name)
            if ending in ENDINGS and not hidden:
                yield Member(entry.name, entry.offset_data, entry.size, entry.issparse())
            elif passed_over is not None:
                passed_over[HIDDEN if hidden else ending or NO_EXTENSION] += 1


def read_labels(path: Path) -> dict[str, str]:
    """Return the content of the `.cls` files in a tar file, by the key of their sample.

    Raises:
        OSError, tarfile.TarError: It cannot be read.
    """
    labels = {}
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            name = entry.name.rpartition("/")[2]
            is_label = name.partition(".")[2] == "cls" and not _is_hidden(entry.name)
            if is_label and entry.isfile() and (content := archive.extractfile(entry)):
                text = content.read(MAX_LABEL_BYTES).decode("utf-8", "replace").strip()
                labels[Member(entry.name, 0, 0).key] = text
    return labels


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
