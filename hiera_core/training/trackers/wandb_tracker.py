"""Measurements for Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from .sender import Outcome
from .tracker import TrackedRun

PROJECT = "hiera"  # unless WANDB_PROJECT names another one

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


class WandbTracker:
    """Sends measurements to Weights & Biases, or with `WANDB_MODE=offline` to files in the folder
    of the run, which `wandb sync` sends later. The library reads its other variables, too."""

    def __init__(self, run: TrackedRun) -> None:
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.resolve().name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.facts),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A run that resumes may measure a step again, which wandb's own counter of steps would
        # refuse.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log({"step": step, **values})

    def close(self, outcome: Outcome = "finished") -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=EXIT_CODES[outcome])
