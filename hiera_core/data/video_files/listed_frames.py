"""Frames that an MP4 or QuickTime file lists, after its edit list is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InputError

# Formats whose header lists every frame. FFmpeg reads this list when it opens a file, or, of
# fragments, while it reads the file.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2",)
MAX_LISTED = 20_000_000  # frames of a file, which may be nearly two hundred hours long
# How often an edit list may show the frames of a file, and frames that are allowed in addition. A
# few bytes of edits could otherwise have a short file decoded for hours.
MAX_REPEATS, SPARE_FRAMES = 100, 100_000


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
        """Return what is listed so far; nothing for other formats.

        Raises:
            InputError: There are more frames than a video has.
        """
        if container.format.name not in INDEXED_FORMATS:
            return cls()
        entries = stream.index_entries
        if len(entries) > MAX_LISTED:
            raise InputError(f"it lists {len(entries):,} frames", "export the video again")
        hidden = sum(entry.is_discard for entry in entries)
        in_file = not len(entries) or entries[-1].pos + entries[-1].size <= container.size
        return cls(len(entries) - hidden, hidden, in_file)

    def check_repeats(self, frames: int) -> None:
        """Check that an edit list does not have the frames of a file decoded too often.

        Args:
            frames: Number of frames in the file; 0 if it is unknown.

        Raises:
            InputError: It does.
        """
        total = self.shown + self.hidden
        if frames and total > MAX_REPEATS * frames + SPARE_FRAMES:
            message = f"its edit list lists {total:,} frames of a file with {frames:,}"
            raise InputError(message, "export the video again")
