"""Images and videos in tar files, read in place: nothing is extracted."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .media_types import ENDINGS, ending_of

MAX_LABEL_BYTES = 1 << 16


@dataclass(frozen=True)
class Member:
    """A file in a tar file."""

    name: str
    offset: int  # of its content, in bytes
    size: int  # in bytes

    @property
    def key(self) -> str:
        """What the files of one sample share: the name up to its first dot (WebDataset)."""
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"


def read_members(path: Path, passed_over: Counter[str] | None = None) -> Iterator[Member]:
    """Yield the images and videos in a tar file, in its order. Compressed tar files are not read,
    because their members cannot be read in place.

    Args:
        path: The tar file.
        passed_over: Counts the other files, by extension.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or ends within a member.
    """
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            ending = ending_of(entry.name)
            if not entry.isfile():
                continue
            if ending in ENDINGS:
                yield Member(entry.name, entry.offset_data, entry.size)
            elif passed_over is not None:
                passed_over[ending or "without extension"] += 1


def read_labels(path: Path) -> dict[str, str]:
    """Return the content of the `.cls` files in a tar file, by the key of their sample.

    Raises:
        OSError, tarfile.TarError: It cannot be read.
    """
    labels = {}
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            name = entry.name.rpartition("/")[2]
            if name.partition(".")[2] == "cls" and (content := archive.extractfile(entry)):
                text = content.read(MAX_LABEL_BYTES).decode("utf-8", "replace").strip()
                labels[Member(entry.name, 0, 0).key] = text
    return labels


def expand_braces(text: str) -> list[str]:
    """`a-{00..12}.tar` -> a-00.tar, a-01.tar, ...; several braces give all combinations."""
    match = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", text)
    if not match:
        return [text]
    first, last = match.groups()
    width = len(first)
    rest = expand_braces(text[match.end() :])
    numbers = range(int(first), int(last) + 1)
    return [f"{text[: match.start()]}{n:0{width}}{tail}" for n in numbers for tail in rest]
