"""Order of the samples: which samples each step sees.

Every random number of a run is a function of the seed and of its purpose (pass, sample, repeat,
step), never of the numbers of earlier steps. So a run sees the same batches with any number of
processes and workers, and an interrupted run resumes as if it had never stopped. Only drop path and
dropout depend on the process and on the forward pass, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UsageError
from ..models.masking import draw_units
from .recipe import Recipe

MAX_STEPS = 99_999_999  # the names of checkpoints have eight digits


class SampleKey(NamedTuple):
    """A sample in one pass over the data."""

    epoch: int
    sample: int | None  # None is padding: it fills up the last batch


@dataclass(frozen=True)
class StepSampler:
    """The samples of each training step, for one of several processes.

    Args:
        samples: Number of samples in the data set.
        recipe: The recipe, for its batch size, number of epochs and seed.
        rank: Rank of this process, from 0.
        world: Number of processes.

    Raises:
        UsageError: The processes cannot share the batch equally, its samples cannot be mixed in
            pairs, or it is larger than the data set.
    """

    samples: int
    recipe: Recipe
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        shares = self.world * self.recipe.accumulate
        if self.step_samples % shares:
            raise UsageError(
                f"batch_size {self.recipe.batch_size} with data.repeats "
                f"{self.recipe.data.repeats} gives {self.step_samples} samples per step, which "
                f"cannot be divided by {self.world} processes x accumulate "
                f"{self.recipe.accumulate}",
                "change batch_size",
            )
        augment = self.recipe.augment
        if (augment.mixup or augment.cutmix) and self.step_samples // shares % 2:
            raise UsageError(
                f"{self.step_samples // shares} samples in a forward pass cannot be mixed in pairs",
                "make batch_size / (accumulate x repeats x processes) even",
            )
        passes = self.recipe.schedule.epochs / self.recipe.data.repeats
        if passes * self.steps_per_pass > MAX_STEPS:
            raise UsageError(
                f"schedule.epochs {self.recipe.schedule.epochs:g} gives more than {MAX_STEPS:,} "
                "steps",
                "give fewer epochs",
            )
        if self.samples < self.step_samples:
            raise UsageError(
                f"{self.samples} samples are fewer than the {self.step_samples} of one step",
                "use a smaller batch_size: --set batch_size=N",
            )

    @property
    def step_samples(self) -> int:
        """Number of samples that all processes together read for one optimiser step."""
        return self.recipe.batch_size // self.recipe.data.repeats

    @property
    def steps_per_pass(self) -> int:
        """Number of steps in one pass over the data.

        Samples that are left over at the end of a pass are not used in it. Each pass is shuffled
        anew, so other samples are left over in the next one.
        """
        return self.samples // self.step_samples

    @property
    def steps(self) -> int:
        """Number of steps in the run."""
        passes = self.recipe.schedule.epochs / self.recipe.data.repeats
        return max(1, round(passes * self.steps_per_pass))

    def batches(self, first_step: int = 0) -> Iterator[list[SampleKey]]:
        """Yield this process's samples, one list for each forward pass (`accumulate` per step)."""
        share = self.step_samples // (self.world * self.recipe.accumulate)
        order, epoch = np.empty(0, np.int64), -1
        for step in range(first_step, self.steps):
            if step // self.steps_per_pass != epoch:
                epoch = step // self.steps_per_pass
                seed = derive_seed("order", self.recipe.seed, epoch)
                order = np.random.default_rng(seed).permutation(self.samples)
            begin = step % self.steps_per_pass * self.step_samples
            for forward_pass in range(self.recipe.accumulate):
                first = begin + (forward_pass * self.world + self.rank) * share
                yield [SampleKey(epoch, int(sample)) for sample in order[first : first + share]]


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class MaskSampler:
    """Random masks for an autoencoder.

    Args:
        windows: Number of mask units.
        mask_ratio: Share of mask units that are hidden.
    """

    windows: int
    mask_ratio: float

    def draw(self, *parts: int | str) -> torch.Tensor:
        """Draw a mask with the seed of `derive_seed`, and return its visible units, [k]."""
        generator = torch.Generator().manual_seed(derive_seed("mask", *parts))
        return draw_units(1, self.windows, self.mask_ratio, generator=generator)[0]
