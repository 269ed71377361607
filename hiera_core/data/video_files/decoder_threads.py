"""Threads of video decoders. Videos that are open at the same time share them."""

from __future__ import annotations

import threading

from ...process.cores import cores_per_process

MAX_THREADS = 16  # for one video; also the limit of FFmpeg's default


class DecoderThreads:
    """The threads that decode the open videos of a process.

    By default, FFmpeg starts a thread for each core of the machine, at most 16, to decode a video,
    and as many to convert its colours: 256 threads for eight videos.

    Args:
        total: Number of threads to share, or None for one per core; see `cores_per_process`.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._open = 0  # videos
        self._lock = threading.Lock()

    def take(self) -> int:
        """Count a video that is opened, and return how many threads its decoder may have.

        A single video gets all threads, within `MAX_THREADS`. Each of many videos gets two, if
        there are two, because then the next frames are decoded while one is converted and resized.
        The threads of videos that are already open stay.
        """
        with self._lock:
            self._open += 1
            total = self.total or cores_per_process()
            return min(max(2, total // self._open), total, MAX_THREADS)

    def give_back(self) -> None:
        """Count a video that is closed."""
        with self._lock:
            self._open -= 1


OF_THIS_PROCESS = DecoderThreads()
