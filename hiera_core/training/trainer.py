"""Training loop for pre-training and fine-tuning, images and videos, one process or many."""

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

from ..data.datasets import Splits, is_built_in, open_splits
from ..errors import CheckpointError, TrainingError, UsageError
from . import optimizer, run_folder
from .build import RunOptions, TrainingSetup, build_training
from .checkpoints.checkpoint import CheckpointManager
from .checkpoints.checkpoint_meta import MEASUREMENTS
from .dataloader import Batch, Collator, TrainDataset, make_loader
from .distributed import World, join_processes, unwrap_model, without_gradient_sync
from .losses import compute_losses
from .lr_schedule import learning_rate_at
from .previews import Previews
from .recipe import Recipe
from .recipe_reader import read_recipe
from .run_folder import RunFolder
from .run_log import LOG_NAME, START, RunLog
from .sampler import StepSampler, derive_seed
from .step_statistics import StepStatistics
from .validate import ema_weights, validate

log = logging.getLogger("hiera")


class ValidationResult(TypedDict, total=False):
    """Measurements on held-out data. Only classifiers have accuracies."""

    loss: float
    top1: float  # percent
    top5: float  # percent; only for more than five classes
    samples: int  # number of samples measured
    bad: int  # number of unreadable samples


class TrainingResult(TypedDict, total=False):
    """The last measurements of a run."""

    step: int
    epoch: float  # passes over the data
    loss: float
    unreadable: int  # number of unreadable samples, counted in each pass
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
    """Train a model according to a recipe.

    >>> hiera_core.train("hiera_nano_32", "digits", "runs/digits")

    The run writes these files to `folder`:
        model.safetensors, config.json, hiera.json: The trained model, ready for
            `hiera predict --checkpoint`.
        recipe.yaml: The recipe.
        log.jsonl: Every measurement and every unreadable sample.
        curves.png: Loss and accuracy over time, if matplotlib is installed.
        checkpoints/: The newest checkpoints.
        pictures/: For an autoencoder, reconstructions after each pass over the data.

    Args:
        recipe: Name of a model, path of a .yaml file, or a `Recipe`.
        data: See `open_splits`.
        folder: Folder of the run.
        world: The processes of the run. None: those that torchrun started, or only this one.
        options: How the run is carried out. The recipe determines what it computes.
        settings: Values of the recipe to change, by dotted key: {"optimizer.lr": 1e-3}. They
            cannot be combined with a `Recipe`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Used only if `world` is None.

    Returns:
        The last measurements of the run.

    Raises:
        UsageError: The recipe or a setting is not usable, the data does not suit the model, or the
            folder holds a run or other files, is used by another run, cannot be written to, or
            overlaps with that of the data.
        TrainingError: A loss or gradient is NaN or infinite, too many samples are unreadable, or
            another process has ended.
        CheckpointError, HubError: The weights to start from, or the checkpoint to resume from,
            cannot be loaded.
        DeviceError: The device does not exist or is out of memory, or torch.compile failed.
        OutputError: A file cannot be written, e.g. because the disk is full.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, settings)
    elif settings:
        raise UsageError(
            "settings apply only to a recipe given by name or file", "change the Recipe itself"
        )
    if not isinstance(data, Splits):
        data = open_data(recipe, data, folder)
    options, folder = options or RunOptions(), Path(folder)
    with contextlib.ExitStack() as stack:
        if world is None:
            world = stack.enter_context(join_processes(device))
        stack.enter_context(run_folder.locked(folder, world))
        return Trainer(recipe, data, folder, world, options).run()


def open_data(recipe: Recipe, data: str | Path, folder: str | Path) -> Splits:
    """Open the data of a run.

    Args:
        recipe: The recipe, for the data that it holds out.
        data: See `open_splits`.
        folder: Folder of the run.

    Raises:
        UsageError: The data does not exist, is empty or lacks labels, or it is in the folder of
            the run, or that is in the data.
    """
    parts = [Path(data, name) for name in ("train", "val") if Path(data, "train").is_dir()]
    for part in [] if is_built_in(data) else parts or [Path(data)]:
        run_folder.check_apart(Path(folder), part)
    if isinstance(recipe.data.val, str) and not is_built_in(recipe.data.val):
        run_folder.check_apart(Path(folder), Path(recipe.data.val), "the held-out data")
    return open_splits(data, recipe.data.val, labelled=recipe.task == "classify")


class Trainer:
    """One training run, for pre-training or fine-tuning, on one or many processes. Its folder is
    locked.

    Args:
        recipe, folder, world, options: See `train`.
        splits: The training data and the held-out data.

    Raises:
        See `train`. The folder does not change until everything is built.
    """

    def __init__(
        self, recipe: Recipe, splits: Splits, folder: Path, world: World, options: RunOptions
    ) -> None:
        self.recipe, self.splits, self.world = recipe, splits, world
        self.sampler = StepSampler(len(splits.train), recipe, world.rank, world.size)
        self.run_folder = RunFolder(folder, recipe, splits.train, world, options)
        self._check_step()
        self.checkpoints = CheckpointManager(folder, world, recipe.keep_checkpoints)
        meta = self.run_folder.meta
        self.setup: TrainingSetup = build_training(
            recipe, splits.train, world, options, meta.get("card")
        )
        self.training = self.setup.training
        self.run_log = RunLog(
            folder,
            self.sampler.steps,
            unit=self.setup.unit,
            active=world.is_main_process,
            live=options.live,
            tensorboard=options.tensorboard,
        )
        # Unreadable samples of this process since the last report: name -> error.
        self.unreadable: dict[str, str] = {}
        # Numbers of views since the start of the run, over all processes.
        self.seen_views, self.unreadable_views = meta.get("seen", 0), meta.get("unread", 0)
        self.run_folder.claim()

    def run(self) -> TrainingResult:
        """Train to the last step, export the weights, and return the last measurements."""
        last = self._resume()
        self.run_log.open(last["step"])
        try:
            if not last["step"]:
                facts = self.setup.facts(self.sampler.steps, self.splits)
                self.run_log.log_event(**START, **facts)
            self._train_from(last)
            if self.world.is_main_process:
                self.run_log.draw_curves()
        finally:
            self.run_log.close()
        with ema_weights(self.training):
            self.run_folder.export(self.setup, last)
        result: TrainingResult = last  # type: ignore[assignment]
        return result

    def _check_step(self) -> None:
        """Check the number of steps that the checkpoint has done.

        Raises:
            CheckpointError: It is larger than that of the run.
        """
        done = self.run_folder.meta.get("step", 0)
        if done > self.sampler.steps:
            raise CheckpointError(
                f"{self.run_folder.checkpoint} has done {done} of {self.sampler.steps} steps",
                "the checkpoint is damaged; resume from another one",
            )

    def _resume(self) -> dict[str, Any]:
        """Load the checkpoint, if the run resumes, and return its step and measurements."""
        if self.run_folder.checkpoint is None:
            return {"step": 0}
        meta = self.run_folder.meta
        self.checkpoints.load(self.run_folder.checkpoint, self.training)
        log.info("resuming after step %d of %d", meta["step"], self.sampler.steps)
        if self.run_folder.resumes_in_place:
            self.checkpoints.forget_after(meta["step"])
        return {key: meta[key] for key in ("step", *MEASUREMENTS) if key in meta}

    def _train_from(self, last: dict[str, Any]) -> None:
        """Run the steps after `last["step"]`, and update `last` with each measurement."""
        recipe, step = self.recipe, last["step"]
        steps, steps_per_pass = self.sampler.steps, self.sampler.steps_per_pass
        previews = self._previews()
        val_steps = self._steps_of(recipe.val_every)
        save_steps = self._steps_of(recipe.save_every)
        batches = self._batches(step)
        statistics = StepStatistics(self.world, step)
        while step < steps:
            statistics.add(self._step(step, batches))
            step += 1
            is_last = step == steps
            saves = is_last or step % save_steps == 0
            validates = self.splits.val is not None and (is_last or step % val_steps == 0)
            draws = previews is not None and (is_last or step % steps_per_pass == 0)
            if not (saves or validates or draws or step % recipe.log_every == 0):
                continue
            # A report comes before every save: it raises an error if a value is NaN or infinite.
            # And it comes before other work, whose time would else count as that of the steps.
            last |= self._report(statistics, step)
            if self.splits.val is not None and validates:
                last["val"] = validate(self.setup, self.splits.val, recipe, self.world)
                epoch = step / steps_per_pass
                self.run_log.log_event("val", step=step, epoch=epoch, **last["val"])
            if previews is not None and draws:
                previews.draw(math.ceil(step / steps_per_pass))
            if saves:
                self.checkpoints.save(self.training, {**last, **self._resume_values()})
            statistics = StepStatistics(self.world, step)

    def _steps_of(self, passes: float) -> int:
        """Return the number of steps in a number of passes over the data, at least 1."""
        return max(1, round(min(passes * self.sampler.steps_per_pass, self.sampler.steps)))

    def _resume_values(self) -> dict[str, Any]:
        """Return the values in a checkpoint's meta.json that only resuming needs."""
        return {
            "recipe": self.recipe.to_dict(),
            "card": self.setup.card,
            "data": self.splits.train.fingerprint,
            "seen": self.seen_views,
            "unread": self.unreadable_views,
        }

    def _previews(self) -> Previews | None:
        """Return previews for an autoencoder, on held-out samples if there are any; else None."""
        if self.setup.masking is None:
            return None
        samples = self.splits.train if self.splits.val is None else self.splits.val
        return Previews(self.setup, samples, self.run_folder.path, self.world)

    def _batches(self, step: int) -> Iterator[Batch]:
        """Return the batches of this process, starting at a step."""
        setup = self.setup
        dataset = TrainDataset(
            self.splits.train, setup.augment, self.recipe, setup.clip, setup.masking
        )
        collate = Collator(setup.view_shape, setup.num_classes, self.recipe)
        keys = self.sampler.batches(step)
        return iter(make_loader(dataset, keys, collate, setup.workers, setup.device))

    def _step(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        """Run one optimiser step.

        Returns:
            Values of this process for `StepStatistics`, [4]: weighted loss, weight, gradient norm,
            views.
        """
        recipe, training, device = self.recipe, self.training, self.setup.device
        optimizer.set_learning_rate(
            training.optimizer, learning_rate_at(step, self.sampler.steps, recipe)
        )
        # For drop path and dropout. Their random numbers differ between processes.
        torch.manual_seed(derive_seed("step", recipe.seed, step, self.world.rank))
        process_batch = recipe.batch_size / self.world.size
        values = torch.zeros(4, device=device)
        for forward_pass in range(recipe.accumulate):
            loaded = next(batches)
            self.unreadable |= dict(loaded.bad)
            batch = loaded.to(device)
            is_last = forward_pass + 1 == recipe.accumulate
            with contextlib.nullcontext() if is_last else without_gradient_sync(training.model):
                losses = compute_losses(training.model, batch, recipe, self.setup.precision).losses
                weighted = (losses * batch.weight).sum()
                # The divisor is the nominal batch size. So an unreadable sample counts as a loss
                # of 0, and the gradient does not depend on which process reads it.
                training.scaler.scale(weighted / process_batch).backward()
            values[0] += weighted.detach()
            values[1] += batch.weight.sum()
            values[3] += len(batch.weight)
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

    def _report(self, statistics: StepStatistics, step: int) -> dict[str, Any]:
        """Log the steps since the last report, and return the measurements for the result.

        Raises:
            TrainingError: A loss or gradient is NaN or infinite, or too many samples are
                unreadable.
        """
        values = statistics.summary(self.training.scaler.is_enabled())
        for unreadable in self.world.gather(self.unreadable):
            for name, message in unreadable.items():
                self.run_log.log_event("bad", step=step, input=name, message=message)
        self.unreadable = {}
        self.seen_views += values.pop("views")
        self.unreadable_views += values.pop("unreadable_views")
        self._check_unreadable()
        values["lr"] = learning_rate_at(step - 1, self.sampler.steps, self.recipe)
        values["epoch"] = step / self.sampler.steps_per_pass
        seconds_per_step = values["seconds"] / len(statistics.rows)
        values["eta"] = (self.sampler.steps - step) * seconds_per_step
        if self.setup.device.type == "cuda":
            values["memory"] = torch.cuda.max_memory_allocated(self.setup.device) / 2**30
        result = {"step": step, "epoch": values["epoch"], "loss": values["loss"]}
        if self.unreadable_views:
            unreadable_samples = self.unreadable_views // self.recipe.data.repeats
            result["unreadable"] = values["unreadable"] = unreadable_samples
        self.run_log.log_event("step", step=step, **values)
        return result

    def _check_unreadable(self) -> None:
        """Check the share of unreadable samples against data.max_bad.

        The share is computed over at least one whole pass. So one unreadable sample at the start of
        a run does not stop it.

        Raises:
            TrainingError: Too many samples are unreadable.
        """
        repeats = self.recipe.data.repeats
        views = max(self.seen_views, len(self.splits.train) * repeats)
        if self.unreadable_views > self.recipe.data.max_bad * views:
            raise TrainingError(
                f"{self.unreadable_views // repeats} samples are unreadable, more than "
                f"data.max_bad = {self.recipe.data.max_bad:g} of {views // repeats} allows",
                f"{self.run_folder.path / LOG_NAME} lists them: repair or remove them",
            )
