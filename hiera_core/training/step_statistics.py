"""Statistics of the steps between two reports: loss, gradient norm, and rate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TrainingError
from .distributed import World
from .run_log import LOG_NAME


class StepStatistics:
    """Statistics of the steps since the last report.

    They stay on the device until `summary`, because copying them to the CPU waits for the device.

    Args:
        world: The processes of the run.
        step: Number of steps before the first one that is added.
        earlier: `totals` of the steps before those, from a run that was interrupted. So a report
            holds the same loss as without the interruption.
    """

    def __init__(
        self, world: World, step: int, earlier: Sequence[Sequence[float | None]] = ()
    ) -> None:
        self.world, self.step, self.rows = world, step, list[torch.Tensor]()
        # A value that was not finite is null in the JSON of a checkpoint.
        self.earlier = [[math.inf if v is None else float(v) for v in row] for row in earlier]
        self.start = time.perf_counter()

    def add(self, row: torch.Tensor) -> None:
        """Add a step of this process: [4] weighted loss, weight, gradient norm, views."""
        self.rows.append(row)

    def totals(self, scaled: bool) -> list[list[float]]:
        """Return the values of the steps over all processes, one row of four for each step.

        Args:
            scaled: See `summary`.

        Raises:
            TrainingError: A loss or gradient is NaN or infinite.
        """
        if not self.rows:
            return self.earlier
        own = torch.stack(self.rows)
        norms = own[:, 2].cpu().double()  # the same in all processes, so it is not summed
        rows = self.world.total(own)
        finite = rows[:, 0].isfinite() & (norms.isfinite() | scaled)
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            what = "gradient" if bool(rows[index, 0].isfinite()) else "loss"
            raise TrainingError(
                f"the {what} of step {self.step + index + 1} is no number (NaN or infinite)",
                "no checkpoint contains it; lower optimizer.lr, set optimizer.clip_grad, or use "
                "--set precision=fp32 or bf16",
            )
        rows[:, 2] = norms
        found: list[list[float]] = rows.tolist()
        return self.earlier + found

    def summary(self, scaled: bool) -> dict[str, Any]:
        """Summarise the steps over all processes.

        Args:
            scaled: Whether the loss is scaled (fp16). The scaler skips steps with NaN or infinite
                gradients, so these are not errors.

        Returns:
            `loss`, the mean over the steps that had a readable sample; `grad_norm`, the mean over
            the steps; `rate`, views per second; `seconds`; `views` and `unreadable_views`, counts
            of views.

        Raises:
            TrainingError: A loss or gradient is NaN or infinite, or no sample can be read.
        """
        rows = torch.tensor(self.totals(scaled), dtype=torch.float64)
        seconds = time.perf_counter() - self.start
        readable = rows[rows[:, 1] > 0]
        if not len(readable):
            raise TrainingError(
                f"none of the samples up to step {self.step + len(self.rows)} can be read",
                f"{LOG_NAME} lists them: repair or remove them",
            )
        views, unreadable = rows[:, 3].sum(), (rows[:, 3] - rows[:, 1]).sum()
        return {
            "loss": float((readable[:, 0] / readable[:, 1]).mean()),
            "grad_norm": float(rows[:, 2].mean()),
            "rate": float(rows[len(self.earlier) :, 3].sum()) / seconds,
            "seconds": seconds,
            "views": int(views),
            "unreadable_views": int(unreadable),
        }
