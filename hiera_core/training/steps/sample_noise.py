"""Random numbers of drop path and dropout, one row for each view of the batch of all processes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ...models.layers import Dropout, DropPath
from ..sampler import derive_seed

ROW_WORDS = 4  # what numpy's Philox generator draws for each value of its counter
ALIGNMENT = 16  # kernels of torch.compile copy an input whose address is not a multiple of 64 bytes


class SampleNoise:
    """Draws the factors of all drop paths and dropouts of a model, before each forward pass.

    A row of random numbers depends on the seed, the step, and the position of the view in the batch
    of all processes. So one process, several, and gradient accumulation drop the same branches.

    Args:
        model: The model. Its layers get the attribute `factors`, of a fixed number of views.
        seed: Seed of the run.
        views: Number of views of this process in a forward pass.
        device: The device of the model.
    """

    def __init__(self, model: nn.Module, seed: int, views: int, device: torch.device) -> None:
        self.seed, self.views, self.device = seed, views, device
        paths = [m for m in model.modules() if isinstance(m, DropPath) and m.drop_prob > 0]
        dropouts = [m for m in model.modules() if isinstance(m, Dropout) and m.p > 0]
        # Rates of the columns: two branches for each drop path, then the channels of dropouts.
        widths = [_channels(model, dropout) for dropout in dropouts]
        rates = [path.drop_prob for path in paths for _ in range(2)]
        for dropout, width in zip(dropouts, widths, strict=True):
            rates += [dropout.p] * width
        self.rates = np.array(rates)
        padded = math.ceil(views / ALIGNMENT) * ALIGNMENT
        self.branches = torch.zeros(len(paths), 2, padded, device=device)
        self.channels = [torch.zeros(views, width, device=device) for width in widths]
        for path, factors in zip(paths, self.branches, strict=True):
            path.factors = factors[:, :views]
        for dropout, factors in zip(dropouts, self.channels, strict=True):
            dropout.factors = factors

    def draw(self, step: int, first: int) -> None:
        """Set the factors of the next forward pass.

        Args:
            step: Number of steps that are done.
            first: Position of this process's first view in the batch of all processes.
        """
        if not len(self.rates):
            return
        numbers = uniform_rows(
            derive_seed("drop", self.seed, step), first, self.views, len(self.rates)
        )
        kept = (numbers >= self.rates) / np.maximum(1.0 - self.rates, 1e-12)
        factors = torch.from_numpy(kept.astype(np.float32))
        branches = 2 * len(self.branches)
        _fill(self.branches.flatten(0, 1)[:, : self.views], factors[:, :branches].T)
        parts = factors[:, branches:].split([buffer.shape[1] for buffer in self.channels], 1)
        for buffer, values in zip(self.channels, parts, strict=True):
            _fill(buffer, values)


def uniform_rows(seed: int, first: int, count: int, width: int) -> np.ndarray:
    """Return rows of numbers from 0 to below 1, float64 [count, width].

    Row i of any call with a seed is the same, whatever the other arguments but `width` are: the
    generator counts, so it can begin anywhere.
    """
    words = math.ceil(width / ROW_WORDS)
    generator = np.random.Generator(np.random.Philox(counter=first * words, key=seed))
    return generator.random((count, words * ROW_WORDS))[:, :width]


def _fill(buffer: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values to a buffer on the device. The host does not wait for a GPU."""
    if buffer.is_cuda:
        values = values.contiguous().pin_memory()
    buffer.copy_(values, non_blocking=buffer.is_cuda)


def _channels(model: nn.Module, dropout: Dropout) -> int:
    """Return the number of channels that a dropout gets: that of the linear layer behind it."""
    for module in model.modules():
        if getattr(module, "dropout", None) is dropout:
            projection = module.get_submodule("projection")
            assert isinstance(projection, nn.Linear)
            return projection.in_features
    raise AssertionError("a dropout that belongs to no head")
