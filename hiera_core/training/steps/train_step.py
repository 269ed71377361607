"""One optimiser step: forward and backward passes, clipping, the update of weights and EMA."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import optimizer
from ..dataloader import Batch
from ..distributed import unwrap_model, without_gradient_sync
from ..losses import compute_losses
from ..lr_schedule import learning_rate_at
from ..recipe import Recipe
from ..sampler import StepSampler, derive_seed
from .determinism import translate_errors
from .sample_noise import SampleNoise

if TYPE_CHECKING:
    from ..build import TrainingSetup


class TrainStep:
    """Runs the steps of one process.

    Args:
        setup: The setup of the run.
        recipe: The recipe.
        sampler: Which samples a step sees.

    Attributes:
        unreadable: Samples that could not be read, and that the caller has not taken yet:
            name -> error.
        waited: Seconds that steps have waited for data since the caller set it to 0.
    """

    def __init__(self, setup: TrainingSetup, recipe: Recipe, sampler: StepSampler) -> None:
        self.setup, self.recipe, self.sampler = setup, recipe, sampler
        self.training = setup.training
        self.unreadable: dict[str, str] = {}
        self.waited = 0.0
        views = sampler.pass_samples * recipe.data.repeats
        model = unwrap_model(self.training.model)
        self.finish = setup.finish
        self.noise = SampleNoise(model, recipe.seed, views, setup.device)

    def run(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        """Run one optimiser step.

        Args:
            step: Number of steps that are done.
            batches: The batches of this process, one for each forward pass.

        Returns:
            Values of this process for `StepStatistics`, [4]: weighted loss, weight, gradient norm,
            views.

        Raises:
            DeviceError: See `compute_losses` and `translate_errors`.
        """
        recipe, training, device = self.recipe, self.training, self.setup.device
        optimizer.set_learning_rate(
            training.optimizer, learning_rate_at(step, self.sampler.steps, recipe)
        )
        # For layers that draw numbers of their own. Those of drop path and dropout are in `noise`.
        torch.manual_seed(derive_seed("step", recipe.seed, step, self.setup.world.rank))
        process_batch = recipe.batch_size / self.setup.world.size
        values = torch.zeros(4, device=device)
        for forward_pass in range(recipe.accumulate):
            begin = time.perf_counter()
            loaded = next(batches)
            self.waited += time.perf_counter() - begin
            self.unreadable |= dict(loaded.bad)
            batch = self.finish(loaded.to(device))
            first = self.sampler.share(forward_pass).start * recipe.data.repeats
            self.noise.draw(step, first)
            is_last = forward_pass + 1 == recipe.accumulate
            sync = contextlib.nullcontext() if is_last else without_gradient_sync(training.model)
            with sync, translate_errors():
                losses = compute_losses(
                    training.model, batch, recipe, self.setup.precision, self.setup.class_weights
                ).losses
                weighted = (losses * batch.weight).sum()
                # The divisor is the nominal batch size. So an unreadable sample counts as a loss
                # of 0, and the gradient does not depend on which process reads it.
                training.scaler.scale(weighted / process_batch).backward()
            values[0] += weighted.detach()
            values[1] += batch.weight.sum()
            values[3] += batch.views
        values[2] = self._update_weights()
        return values

    def _update_weights(self) -> torch.Tensor:
        """Clip the gradients and update the weights and the EMA. Return the gradient norm."""
        training = self.training
        training.scaler.unscale_(training.optimizer)
        max_norm = self.recipe.optimizer.clip_grad or math.inf
        norm = clip_grad_norm_(training.model.parameters(), max_norm)
        if hasattr(norm, "full_tensor"):  # under FSDP, the norm is a DTensor
            norm = norm.full_tensor()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad()
        self._update_ema()
        return norm

    def _update_ema(self) -> None:
        """Move the EMA weights towards the current weights."""
        averages = self.training.averages
        if averages:
            weights = dict(unwrap_model(self.training.model).named_parameters())
            update = get_ema_multi_avg_fn(self.recipe.ema)
            update(list(averages.values()), [weights[name].detach() for name in averages], None)
