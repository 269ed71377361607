"""Which samples each step sees.

Every random number of a run is a function of the seed and of what it is for (pass, sample, repeat,
step), never of what was drawn before it. So the same run gives the same batches on any number of
processes and workers, and one that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .recipe import Recipe


class SampleKey(NamedTuple):
    """A sample, in one pass over the data; None fills up a last batch."""

    epoch: int
    sample: int | None


@dataclass(frozen=True)
class StepSampler:
    """Which samples each step sees, of so many, on one of several processes.

    Raises:
        UsageError: the batch cannot be shared out, or is larger than the data.
    """

    samples: int
    recipe: Recipe
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.world * self.recipe.accumulate
        if self.step_samples % parts:
            raise UsageError(
                f"batch_size {self.recipe.batch_size} with data.repeats "
                f"{self.recipe.data.repeats} gives {self.step_samples} samples a step, which "
                f"{self.world} processes x accumulate {self.recipe.accumulate} do not divide",
                "change batch_size",
            )
        augment = self.recipe.augment
        if (augment.mixup or augment.cutmix) and self.step_samples // parts % 2:
            raise UsageError(
                f"{self.step_samples // parts} samples in a pass cannot be mixed in pairs",
                "make batch_size / (accumulate x repeats x processes) even",
            )
        if self.samples < self.step_samples:
            raise UsageError(
                f"{self.samples} samples are fewer than the {self.step_samples} of one step",
                "use a smaller batch_size: --set batch_size=N",
            )

    @property
    def step_samples(self) -> int:
        """Read for one optimiser step, over all processes."""
        return self.recipe.batch_size // self.recipe.data.repeats

    @property
    def pass_steps(self) -> int:
        """Of one pass over the data; what is left over waits for the next, shuffled anew."""
        return self.samples // self.step_samples

    @property
    def steps(self) -> int:
        passes = self.recipe.schedule.epochs / self.recipe.data.repeats
        return max(1, round(passes * self.pass_steps))

    def batches(self, first_step: int = 0) -> Iterator[list[SampleKey]]:
        """This process's share, one list for each pass through the model."""
        share = self.step_samples // (self.world * self.recipe.accumulate)
        order, epoch = np.empty(0, np.int64), -1
        for step in range(first_step, self.steps):
            if step // self.pass_steps != epoch:
                epoch = step // self.pass_steps
                seed = derive_seed("order", self.recipe.seed, epoch)
                order = np.random.default_rng(seed).permutation(self.samples)
            begin = step % self.pass_steps * self.step_samples
            for part in range(self.recipe.accumulate):
                at = begin + (part * self.world + self.rank) * share
                yield [SampleKey(epoch, int(sample)) for sample in order[at : at + share]]


def eval_batches(
    samples: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[SampleKey]]:
    """Every sample once over all processes, which get equally many batches; None fills up."""
    own = list(range(rank, samples, world))
    for first in range(0, math.ceil(samples / world), batch):
        rows: list[int | None] = list(own[first : first + batch])
        rows += [None] * (batch - len(rows))
        yield [SampleKey(0, row) for row in rows]


def derive_seed(*place: int | str) -> int:
    """A seed of 63 bits that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
