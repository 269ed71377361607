"""Measurements for TensorBoard: event files in the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from .sender import Outcome
from .tracker import TrackedRun

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes events to `tensorboard/`. A run that resumes begins another file, and TensorBoard
    shows both as one."""

    def __init__(self, run: TrackedRun) -> None:
        self._writer = SummaryWriter(run.folder / FOLDER, purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome = "finished") -> None:
        """See `Tracker.close`."""
        self._writer.close()
