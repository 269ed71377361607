"""Order of the samples: which samples each step sees.

Every random number of a run is a function of the seed and of its purpose (pass, sample, repeat,
step), never of the numbers of earlier steps. So a run sees the same batches with any number of
processes and workers, and an interrupted run resumes as if it had never stopped. Drop path and
dropout, too, depend on the place of a view in the batch of all processes, see `SampleNoise`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..data.classes.class_balance import balanced_order
from ..errors import UsageError
from ..models.masking import draw_units
from ..plain_data import counted
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
        labels: Class indices of the samples, for `data.balanced`.

    The samples of a step are dealt to the forward passes of all processes, in order. Where they
    cannot be divided equally, some passes get a sample (or a pair to mix) less, and padding.

    Raises:
        UsageError: There are fewer samples in a step than forward passes, its samples cannot be
            mixed in pairs, or it is larger than the data set.
    """

    samples: int
    recipe: Recipe
    rank: int = 0
    world: int = 1
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.step_samples % self._unit:
            raise UsageError(
                f"the {self.step_samples} samples of a step cannot be mixed in pairs",
                "make batch_size / data.repeats even, or set augment.mixup=0 and augment.cutmix=0",
            )
        if self.step_samples // self._unit < self._passes:
            kind = "pairs to mix" if self._unit == 2 else "samples"
            raise UsageError(
                f"batch_size {self.recipe.batch_size} with data.repeats "
                f"{self.recipe.data.repeats} gives {self.step_samples // self._unit} {kind} per "
                f"step, fewer than {self.world} processes x accumulate {self.recipe.accumulate}",
                "use a larger batch_size, or fewer processes",
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
                f"the data has {counted(self.samples, 'sample')}, fewer than the "
                f"{self.step_samples} of one step",
                self._smaller_batch(),
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

    def steps_of(self, passes: float) -> int:
        """Return the number of steps in a number of passes over the data, at least 1."""
        return max(1, round(min(passes * self.steps_per_pass, self.steps)))

    def is_every(self, passes: float, step: int) -> bool:
        """Return whether something that is done every so many passes is due after a step."""
        return step % self.steps_of(passes) == 0

    def is_due(self, passes: float, step: int) -> bool:
        """Return `is_every`, or whether this is the last step of the run."""
        return step == self.steps or self.is_every(passes, step)

    @property
    def _unit(self) -> int:
        """Number of samples that stay together: 2 if they are mixed in pairs."""
        return 2 if self.recipe.augment.mixup or self.recipe.augment.cutmix else 1

    def _smaller_batch(self) -> str:
        """Return a hint for data that is smaller than a step: the largest batch size that fits, of
        which every process gets the same number of samples in every forward pass."""
        least = self._unit * self._passes
        largest = self.samples // least * least * self.recipe.data.repeats
        if not largest:
            fewer = ", or use fewer processes or a smaller accumulate" * (self._passes > 1)
            return f"add data{fewer}"
        return f"use a smaller batch_size: at most --set batch_size={largest}"

    @property
    def _passes(self) -> int:
        """Number of forward passes in a step, over all processes."""
        return self.world * self.recipe.accumulate

    @property
    def pass_samples(self) -> int:
        """Number of samples in each forward pass of each process, with padding."""
        return math.ceil(self.step_samples / self._unit / self._passes) * self._unit

    def share(self, forward_pass: int) -> range:
        """Return which samples of a step belong to a forward pass of this process."""
        number = forward_pass * self.world + self.rank
        each, more = divmod(self.step_samples // self._unit, self._passes)
        start = (number * each + min(number, more)) * self._unit
        return range(start, start + (each + (number < more)) * self._unit)

    def batches(self, first_step: int = 0) -> Iterator[list[SampleKey]]:
        """Yield this process's samples, one list for each forward pass (`accumulate` per step)."""
        order, epoch = np.empty(0, np.int64), -1
        for step in range(first_step, self.steps):
            if step // self.steps_per_pass != epoch:
                epoch = step // self.steps_per_pass
                seed = derive_seed("order", self.recipe.seed, epoch)
                if self.recipe.data.balanced and self.labels is not None:
                    order = balanced_order(self.labels, seed)
                else:
                    order = np.random.default_rng(seed).permutation(self.samples)
            begin = step % self.steps_per_pass * self.step_samples
            for forward_pass in range(self.recipe.accumulate):
                share = self.share(forward_pass)
                samples = order[begin + share.start : begin + share.stop]
                padding = [SampleKey(epoch, None)] * (self.pass_samples - len(share))
                yield [SampleKey(epoch, int(sample)) for sample in samples] + padding


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
