"""Validation, probe and pictures of a run: what is due after a step, and doing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ...data.datasets import Splits
from ..build import TrainingSetup
from ..dataloader import Batch
from ..distributed import World
from ..previews import Previews
from ..recipe import Recipe
from ..run_log import RunLog
from ..sampler import StepSampler
from ..validate import validate, validation_loader
from .run_probe import probe_of


class Measurements:
    """What is measured between the steps of a run.

    Args:
        recipe, setup, splits, sampler, world: Of the run.
        run_log: Gets the measurements.
        folder: Folder of the run, for pictures.

    Raises:
        UsageError: The data of the probe is not usable.
    """

    def __init__(
        self,
        recipe: Recipe,
        setup: TrainingSetup,
        splits: Splits,
        sampler: StepSampler,
        world: World,
        run_log: RunLog,
        folder: Path,
    ) -> None:
        self.recipe, self.setup, self.splits, self.sampler = recipe, setup, splits, sampler
        self.world, self.run_log, self.folder = world, run_log, folder
        self.probe = probe_of(recipe, setup, splits, world)
        self._previews: Previews | None = None
        self._val_loader: DataLoader[Batch] | None = None  # which keeps its workers

    def prepare(self) -> None:
        """Read the samples of the pictures: held-out ones, if there are any."""
        if self.setup.masking is not None:
            samples = self.splits.train if self.splits.val is None else self.splits.val
            self._previews = Previews(self.setup, samples, self.folder, self.world)

    def are_due(self, step: int) -> bool:
        """Return whether anything is to be measured after a step."""
        return self._validates(step) or self._probes(step) or self._draws(step)

    def take(self, step: int, last: dict[str, Any], stops: Callable[[], bool]) -> bool:
        """Measure what is due after a step.

        Args:
            step: Number of steps that are done.
            last: Gets the measurements `val` and `probe`.
            stops: Called again and again: whether to end early.

        Returns:
            False if it has ended early. Then nothing of this step counts as measured.
        """
        epoch = step / self.sampler.steps_per_pass
        if self.splits.val is not None and self._validates(step):
            run = (self.setup, self.splits.val, self.recipe, self.world)
            if self._val_loader is None:
                self._val_loader = validation_loader(*run)
            found = validate(*run, stops, self._val_loader)
            if found is None:
                return False
            last["val"] = found
            self.run_log.log_event("val", step=step, epoch=epoch, **found)
        if self.probe is not None and self._probes(step):
            found = self.probe.measure(stops)
            if found is None:
                return False
            last["probe"] = found
            method = self.probe.settings.method
            self.run_log.log_event("probe", step=step, epoch=epoch, method=method, **found)
        if self._previews is not None and self._draws(step):
            self._previews.draw(math.ceil(epoch))
        return True

    def _validates(self, step: int) -> bool:
        """Return whether the run is to be validated after a step."""
        return self.splits.val is not None and self.sampler.is_due(self.recipe.val_every, step)

    def _probes(self, step: int) -> bool:
        """Return whether the features are to be judged after a step."""
        return self.probe is not None and self.sampler.is_due(self.probe.settings.every, step)

    def _draws(self, step: int) -> bool:
        """Return whether pictures are to be drawn after a step."""
        return self.setup.masking is not None and self.sampler.is_due(1, step)
