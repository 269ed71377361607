"""Measure the time and memory of a step on any device."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work that was submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def timed_for(step: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Call `step` for `seconds`, at least once, and return the seconds of each call."""
    samples = [timed(step, device)]
    while sum(samples) < seconds:
        samples.append(timed(step, device))
    return samples


def timed_together(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds of one call among calls that follow one another, so that the device never
    waits for the next one. At least two are made, and they take about `seconds`."""
    count = max(2, round(seconds / max(timed(step, device), 1e-6)))
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / count


class PeakMemory:
    """Peak memory in MiB since `start`.

    On CUDA, it is the memory that PyTorch has reserved, since only this is what other programs do
    not have. Elsewhere, it is the memory of the process above its size
    when the object was created (on Linux only).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = 0.0 if device.type == "cuda" else _status("VmRSS")

    def start(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):  # both calls exist on Linux only
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float | None:
        """Return the peak, or None where it is unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**20
        if sys.platform != "linux":
            return None
        return _status("VmHWM") - self.base


def _status(field: str) -> float:
    """Return a value of /proc/self/status in MiB, or 0 if there is no such file or field."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return 0.0
