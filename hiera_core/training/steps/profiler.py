"""`--profile N`: a trace of some steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ...atomic import atomic_file, translate_write_errors

log = logging.getLogger("hiera")
FOLDER, NAME = "profile", "trace-{:08}.json"  # the number is that of the first step
WARMUP = 3  # steps that are not traced: memory is allocated, and code compiled, in the first ones


class StepProfiler:
    """Traces steps of the main process, and writes them to a file.

    Args:
        folder: Folder of the run.
        steps: Number of steps to trace; 0: none.
        first: Number of steps that are done when the run starts or resumes.
        device: The device of the run.
    """

    def __init__(self, folder: Path, steps: int, first: int, device: torch.device) -> None:
        self.folder, self.steps, self.begin = folder / FOLDER, steps, first + WARMUP
        self.device = device
        self._profile: profile | None = None

    def after_step(self, step: int) -> None:
        """Begin or end the trace, if it is time for that.

        Args:
            step: Number of steps that are done.

        Raises:
            OutputError: The trace cannot be written.
        """
        if self.steps and step == self.begin:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=kinds, record_shapes=True)
            self._profile.start()
        elif step == self.begin + self.steps:
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one that has begun.

        Raises:
            OutputError: It cannot be written.
        """
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        found.stop()
        path = self.folder / NAME.format(self.begin + 1)
        with translate_write_errors(path):
            self.folder.mkdir(exist_ok=True)
            with atomic_file(path) as temporary:
                found.export_chrome_trace(str(temporary))
        log.info("%s holds a trace; https://ui.perfetto.dev shows it", path)
