"""The engine: one loop for pre-training and fine-tuning, images and videos, one process or many."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..data.datasets import Splits, open_splits
from ..data.image_reader import without_pillow_limit
from ..errors import TrainingError
from . import optimizer
from .build import RunOptions, TrainingSetup, build_training
from .checkpoint import CheckpointManager
from .dataloader import Batch, Collator, TrainDataset, make_loader
from .distributed import World, join_processes, unwrap_model, without_gradient_sync
from .losses import compute_losses
from .lr_schedule import learning_rate_at
from .previews import Previews
from .recipe import Recipe, read_recipe
from .run_folder import RunFolder
from .run_log import RunLog, StepStatistics
from .sampler import StepSampler, derive_seed
from .validate import ema_weights, validate

log = logging.getLogger("hiera")
SAVED_ONLY = ("recipe", "card", "data", "seen", "unread")  # of what a checkpoint holds


class ValidationResult(TypedDict, total=False):
    """Measurements on held-out data. Accuracies are in percent, and of classifiers only."""

    loss: float
    top1: float
    top5: float
    samples: int
    bad: int  # unreadable samples


class TrainingResult(TypedDict, total=False):
    """The last measurements of a run."""

    step: int
    epoch: float
    loss: float
    unreadable: int  # samples
    val: ValidationResult  # if data is held out


def train(
    recipe: str | Path | Recipe,
    data: str | Path | Splits,
    folder: str | Path,
    world: World | None = None,
    options: RunOptions | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    device: str = "auto",
) -> TrainingResult:
    """Train a model by a recipe.

    >>> hiera_core.train("hiera_nano_32", "digits", "runs/digits")

    Writes to `folder`: model.safetensors, config.json and hiera.json (ready for
    `hiera predict --checkpoint`), recipe.yaml, log.jsonl, curves.png, checkpoints/, and for an
    autoencoder pictures/, which shows reconstructions after every pass.

    Args:
        recipe: The name of a model, a .yaml file, or a `Recipe`.
        data: See `open_splits`.
        folder: The folder of the run.
        world: The processes of the run; None: those that torchrun started, or this one alone.
        options: How the run is carried out; what it computes is decided by the recipe.
        settings: Values of the recipe that differ, by dotted keys: {"optimizer.lr": 1e-3}.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, if `world` is None.

    Raises:
        UsageError: The folder is in use, the data does not fit, or the folder holds a run with
            another recipe.
        TrainingError: The loss is NaN or infinite, or too many samples are unreadable.
        CheckpointError, HubError: Weights to begin with, or to resume from, cannot be loaded.
        DeviceError: The device does not exist, or is out of memory.
        OutputError: The disk is full.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, settings)
    if not isinstance(data, Splits):
        data = open_splits(data, recipe.data.val, labelled=recipe.task == "classify")
    options = options or RunOptions()
    if world is not None:
        return Trainer(recipe, data, Path(folder), world, options).run()
    with join_processes(device) as world:
        return Trainer(recipe, data, Path(folder), world, options).run()


class Trainer:
    """One run. Arguments: see `train`."""

    def __init__(
        self, recipe: Recipe, splits: Splits, folder: Path, world: World, options: RunOptions
    ) -> None:
        self.recipe, self.splits, self.world, self.options = recipe, splits, world, options
        self.plan = StepSampler(len(splits.train), recipe, world.rank, world.size)
        self.folder = RunFolder(folder, recipe, splits.train, world, options)
        self.checkpoints = CheckpointManager(folder, world, recipe.keep_checkpoints)
        self.parts: TrainingSetup = build_training(
            recipe, splits.train, world, options, self.folder.meta.get("card")
        )
        self.training = self.parts.training
        self.report = RunLog(
            folder,
            self.plan.steps,
            unit=self.parts.unit,
            active=world.is_main_process,
            live=options.live,
            tensorboard=options.tensorboard,
        )
        self.bad: dict[str, str] = {}  # unreadable samples since the last report, and why
        # Views since the start, and those of unreadable samples.
        self.seen, self.unread = (self.folder.meta.get(key, 0) for key in ("seen", "unread"))
        self.folder.claim()  # from here on nothing is wrong with what was asked for

    def run(self) -> TrainingResult:
        last = self._resume()
        self.report.open(last["step"])
        try:
            if not last["step"]:
                self.report.say("start", step=0, **self.parts.facts(self.plan.steps, self.splits))
            with without_pillow_limit():
                self._loop(last)
            if self.world.is_main_process:
                self.report.draw()
        finally:
            self.report.close()
        with ema_weights(self.training):
            self.folder.export(self.parts, last)
        result: TrainingResult = last  # type: ignore[assignment]
        return result

    def _resume(self) -> dict[str, Any]:
        """What was last measured, and at which step."""
        if self.folder.resumes is None:
            return {"step": 0}
        meta = self.checkpoints.load(self.folder.resumes, self.training)
        log.info("going on after step %d of %d", meta["step"], self.plan.steps)
        if self.folder.goes_on:
            self.checkpoints.forget_after(meta["step"])
        return {k: v for k, v in meta.items() if k not in SAVED_ONLY}

    def _loop(self, last: dict[str, Any]) -> None:
        """From the step after `last` to the end; what is measured goes into `last`."""
        recipe, plan, step = self.recipe, self.plan, last["step"]
        pictures = None
        if self.parts.masking is not None:
            shown = self.splits.train if self.splits.val is None else self.splits.val
            pictures = Previews(self.parts, shown, self.folder.path, self.world)
        val_steps = max(1, round(recipe.val_every * plan.pass_steps))
        save_steps = max(1, round(recipe.save_every * plan.pass_steps))
        batches = self._batches(step)
        window = StepStatistics(self.world, step)
        while step < plan.steps:
            window.add(self._step(step, batches))
            step += 1
            end = step == plan.steps
            saves = end or step % save_steps == 0
            if saves or step % recipe.log_every == 0:  # nothing is saved that was not looked at
                last |= self._report(window, step)
                window = StepStatistics(self.world, step)
            if self.splits.val is not None and (end or step % val_steps == 0):
                last["val"] = validate(self.parts, self.splits.val, recipe, self.world)
                self.report.say("val", step=step, epoch=step / plan.pass_steps, **last["val"])
            if pictures is not None and (end or step % plan.pass_steps == 0):
                pictures.draw(math.ceil(step / plan.pass_steps))
            if saves:
                self.checkpoints.save(self.training, {**last, **self._saved_only()})

    def _saved_only(self) -> dict[str, Any]:
        """What goes into a checkpoint so that a run can go on."""
        return {
            "recipe": self.recipe.to_dict(),
            "card": self.parts.card,
            "data": self.splits.train.fingerprint,
            "seen": self.seen,
            "unread": self.unread,
        }

    def _batches(self, step: int) -> Iterator[Batch]:
        """This process's, from a step on."""
        parts = self.parts
        dataset = TrainDataset(
            self.splits.train, parts.augment, self.recipe, parts.clip, parts.masking
        )
        collate = Collator((3, *parts.size), parts.num_classes, self.recipe)
        keys = self.plan.batches(step)
        return iter(make_loader(dataset, keys, collate, parts.workers, parts.device))

    def _step(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        """One optimiser step. -> [4]: weighted loss, weight, gradient norm, views read"""
        recipe, training, device = self.recipe, self.training, self.parts.device
        optimizer.set_learning_rate(
            training.optimizer, learning_rate_at(step, self.plan.steps, recipe)
        )
        torch.manual_seed(
            derive_seed("step", recipe.seed, step, self.world.rank)
        )  # drop path, dropout
        share = recipe.batch_size / self.world.size
        total = torch.zeros(4, device=device)
        for part in range(recipe.accumulate):
            batch = next(batches)
            self.bad |= dict(batch.bad)
            batch = batch.to(device)
            adds_up = part + 1 < recipe.accumulate
            with without_gradient_sync(training.model) if adds_up else contextlib.nullcontext():
                losses = compute_losses(training.model, batch, recipe, self.parts.precision).losses
                weighted = (losses * batch.weight).sum()
                # By the nominal size: an unreadable sample counts as a loss of 0, whoever reads it.
                training.scaler.scale(weighted / share).backward()
            total[0] += weighted.detach()
            total[1] += batch.weight.sum()
            total[3] += len(batch.weight)
        training.scaler.unscale_(training.optimizer)
        limit = recipe.optimizer.clip_grad
        norm = clip_grad_norm_(training.model.parameters(), limit or math.inf)
        total[2] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad()
        self._update_ema()
        return total

    def _update_ema(self) -> None:
        """Move the averaged weights towards the present ones."""
        averages = self.training.averages
        if averages:
            weights = dict(unwrap_model(self.training.model).named_parameters())
            update = get_ema_multi_avg_fn(self.recipe.ema)
            update(list(averages.values()), [weights[name].detach() for name in averages], None)

    def _report(self, window: StepStatistics, step: int) -> dict[str, Any]:
        """Say what happened since the last report.

        Raises:
            TrainingError: a loss or gradient is no number, or too many samples are unreadable.
        """
        values = window.summary(self.training.scaler.is_enabled())
        for share in self.world.gather(self.bad):
            for name, message in share.items():
                self.report.say("bad", step=step, input=name, message=message)
        self.bad = {}
        self.seen += values.pop("read")
        self.unread += values.pop("lost")
        self._tolerate()
        values["lr"] = learning_rate_at(step - 1, self.plan.steps, self.recipe)
        values["epoch"] = step / self.plan.pass_steps
        values["eta"] = (self.plan.steps - step) * values["seconds"] / len(window.rows)
        if self.parts.device.type == "cuda":
            values["memory"] = torch.cuda.max_memory_allocated(self.parts.device) / 2**30
        found = {"step": step, "epoch": values["epoch"], "loss": values["loss"]}
        if self.unread:
            found["unreadable"] = values["unreadable"] = self.unread // self.recipe.data.repeats
        self.report.say("step", step=step, **values)
        return found

    def _tolerate(self) -> None:
        """A share of a whole pass, so that one bad sample at the start stops nothing."""
        repeats = self.recipe.data.repeats
        views = max(self.seen, len(self.splits.train) * repeats)
        if self.unread > self.recipe.data.max_bad * views:
            raise TrainingError(
                f"{self.unread // repeats} samples are unreadable, more than data.max_bad = "
                f"{self.recipe.data.max_bad:g} of {views // repeats} allows",
                f"{self.folder.path / 'log.jsonl'} names them: mend or remove them",
            )
