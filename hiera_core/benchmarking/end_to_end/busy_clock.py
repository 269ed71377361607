"""How long a model computes within a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

TIMED_BY_EVENTS = ("cuda", "xpu")  # devices that compute beside the host


class BusyClock:
    """Adds up the time in which a model computes.

    Args:
        device: Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def reset(self) -> None:
        """Begin again."""
        self._seconds, self._events = 0.0, []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the work that is submitted within the block."""
        if self._device.type in TIMED_BY_EVENTS:
            events = [torch.Event(self._device, enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self._events.append((events[0], events[1]))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def idle_share(self, seconds: float) -> float | None:
        """Return the share of a run in which the model had nothing to compute, or None if the
        device cannot say.

        Args:
            seconds: Duration of the run, which is over.
        """
        if self._device.type != "cpu" and self._device.type not in TIMED_BY_EVENTS:
            return None
        found = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        return min(1.0, max(0.0, 1 - (self._seconds + found) / seconds))
