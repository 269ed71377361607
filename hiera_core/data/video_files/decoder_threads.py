"""Threads of video decoders. Videos that are open at the same time share them."""

from __future__ import annotations

import threading

from ...cores import cores_per_process

MAX_THREADS = 16  # for one video; FFmpeg's own limit


class DecoderThreads:
    """The threads that decode the open videos of a process.

    FFmpeg's default is a thread for each core of the machine and for each video. So eight videos on
    64 cores would start 136 threads, because FFmpeg uses at most 17 for a video.

    Args:
        total: Number of threads to share, or None for one per core; see `cores_per_process`.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._open = 0  # videos
        self._lock = threading.Lock()

    def take(self) -> int:
        """Count a video that is opened, and return how many threads its decoder may have.

        A single video gets all threads, within `MAX_THREADS`. The threads of videos that are
        already open stay, so a few more than `total` can exist for a while.
        """
        with self._lock:
            self._open += 1
            total = self.total or cores_per_process()
            return min(max(1, total // self._open), MAX_THREADS)

    def give_back(self) -> None:
        """Count a video that is closed."""
        with self._lock:
            self._open -= 1


OF_THIS_PROCESS = DecoderThreads()
