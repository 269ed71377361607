"""Frames that an MP4 or QuickTime file lists, after its edit list is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Formats whose header lists every frame. FFmpeg reads this list when it opens a file, or, of
# fragments, while it reads the file.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2",)


@dataclass(frozen=True)
class ListedFrames:
    """What the index of a stream says. An edit list may show a part of the frames, in any order,
    or several times. FFmpeg lists each as often as it is shown, and marks those that it only
    decodes."""

    shown: int = 0  # 0: unknown
    hidden: int = 0  # that are decoded, because others depend on them
    in_file: bool = True  # whether the last of them lies within the file

    @classmethod
    def read(cls, container: Any, stream: Any) -> ListedFrames:
        """Return what is listed so far; nothing for other formats."""
        if container.format.name not in INDEXED_FORMATS:
            return cls()
        entries = stream.index_entries
        hidden = sum(entry.is_discard for entry in entries)
        in_file = not len(entries) or entries[-1].pos + entries[-1].size <= container.size
        return cls(len(entries) - hidden, hidden, in_file)
