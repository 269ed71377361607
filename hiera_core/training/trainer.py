"""Training loop for pre-training and fine-tuning, images and videos, one process or many."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict

import torch

from ..atomic import unfinished
from ..data.datasets import Splits, is_built_in, is_url, open_splits, path_of
from ..errors import CheckpointError, TrainingError, UsageError, check_type
from . import run_folder
from .build import RunOptions, TrainingSetup, build_training, check_kind
from .checkpoints.checkpoint import CheckpointManager
from .checkpoints.checkpoint_meta import MEASUREMENTS
from .checkpoints.run_recipe import complete_recipe, resume_command
from .dataloader import Batch, training_batches
from .distributed import World, join_processes
from .judging.best_weights import FOLDER as BEST
from .judging.best_weights import BestWeights
from .judging.measurements import Measurements
from .lr_schedule import learning_rate_at
from .recipe import Recipe, urls_among
from .recipe_reader import flatten
from .run_folder import RunFolder
from .run_log import LOG_NAME, START, RunLog
from .sampler import StepSampler
from .step_statistics import StepStatistics
from .steps.determinism import deterministic_kernels
from .steps.profiler import StepProfiler
from .steps.train_step import TrainStep
from .steps.utilisation import peak_flops, training_flops
from .trackers.sender import Outcome
from .validate import ema_weights

log = logging.getLogger("hiera")


class ValidationResult(TypedDict, total=False):
    """Measurements on held-out data. Only classifiers have accuracies."""

    loss: float
    top1: float  # percent
    top5: float  # percent; only for more than five classes
    samples: int  # number of samples measured
    bad: int  # number of unreadable samples


class ProbeResult(TypedDict, total=False):
    """Accuracy of a simple classifier on the frozen features, in percent."""

    top1: float
    top5: float  # only for more than five classes
    samples: int  # number of samples measured
    train_samples: int  # number of samples that the classifier has learned from


class TrainingResult(TypedDict, total=False):
    """The last measurements of a run."""

    step: int
    epoch: float  # passes over the data
    loss: float
    unreadable: int  # number of unreadable samples, counted in each pass
    val: ValidationResult  # if data is held out
    probe: ProbeResult  # if the recipe has a probe


def train(
    recipe: str | Path | Recipe | None,
    data: str | Path | Splits | None,
    folder: str | Path,
    world: World | None = None,
    options: RunOptions | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    device: str = "auto",
) -> TrainingResult:
    """Train a model according to a recipe.

    >>> hiera_core.train("hiera_nano_32", "digits", "runs/digits")

    After Ctrl-C, the step is finished and a checkpoint is saved before KeyboardInterrupt is raised;
    a second Ctrl-C raises it at once. `options=RunOptions(resume="auto")` continues.

    The run writes these files to `folder`:
        model.safetensors, config.json, hiera.json: The trained model, ready for
            `hiera predict --checkpoint`.
        recipe.yaml: The recipe.
        log.jsonl: Every measurement and every unreadable sample.
        curves.png: Loss and accuracy over time, if matplotlib is installed.
        checkpoints/: The newest checkpoints.
        best/: The weights with the best measurement, if the recipe has `keep_best`.
        pictures/: For an autoencoder, reconstructions after each pass over the data.

    Args:
        recipe: Name of a model, path of a .yaml file, or a `Recipe`. None: that of the run to
            resume.
        data: See `open_splits`. None: the data that the recipe names.
        folder: Folder of the run.
        world: The processes of the run. None: those that torchrun started, or only this one.
        options: How the run is carried out. The recipe determines what it computes.
        settings: Values of the recipe to change, by dotted key: {"optimizer.lr": 1e-3}. They
            cannot be combined with a `Recipe`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Used only if `world` is None.

    Returns:
        The last measurements of the run.

    Raises:
        UsageError: The recipe or a setting is not usable, the data does not suit the model, a URL
            of the recipe leads into a private network (see `RunOptions.private_urls`), or the
            folder holds a run or other files, is used by another run, cannot be written to, or
            overlaps with that of the data.
        TrainingError: A loss or gradient is NaN or infinite, too many samples are unreadable, or
            another process has ended.
        CheckpointError, HubError: The weights to start from, or the checkpoint to resume from,
            cannot be loaded.
        DeviceError: The device does not exist or is out of memory, or torch.compile failed.
        OutputError: A file cannot be written, e.g. because the disk is full.
    """
    if settings and isinstance(recipe, Recipe):
        raise UsageError(
            "settings apply only to a recipe given by name or file", "change the Recipe itself"
        )
    options, folder = _checked(options, folder)
    location = None if isinstance(data, Splits) else data
    named = urls_among(location, settings, options.init_from)
    options = replace(options, named_urls=options.named_urls | named)
    recipe = complete_recipe(recipe, location, folder, options, settings)
    if isinstance(data, Splits):
        splits = data
    else:
        splits = open_data(recipe, recipe.data.path, folder, options.public_urls)
    with contextlib.ExitStack() as stack:
        if world is None:
            world = stack.enter_context(join_processes(device))
        stack.enter_context(run_folder.locked(folder, world))
        stack.enter_context(deterministic_kernels(recipe.deterministic))
        return Trainer(recipe, splits, folder, world, options).run()


def _checked(options: RunOptions | None, folder: str | Path) -> tuple[RunOptions, Path]:
    check_type("options", options, (RunOptions, NoneType), "a hiera_core.RunOptions")
    check_type("folder", folder, (str, Path), "the path of a folder")
    return options or RunOptions(), Path(folder)


def open_data(
    recipe: Recipe,
    data: str | Path | None,
    folder: str | Path,
    public_urls: Container[str] = (),
) -> Splits:
    """Open the data of a run.

    Args:
        recipe: The recipe, for the data that it holds out.
        data, public_urls: See `open_splits`.
        folder: Folder of the run.

    Raises:
        UsageError: The data does not exist, is empty or lacks labels, or it is in the folder of
            the run, or that is in the data.
    """
    if data is None:
        raise UsageError("no data", "name a folder, a list, tar shards, or digits or shapes")
    check_type("data", data, (str, Path), "a path, or digits or shapes")
    parts = [Path(data, name) for name in ("train", "val") if Path(data, "train").is_dir()]
    for part in [] if is_built_in(data) or is_url(data) else parts or [path_of(data)]:
        run_folder.check_apart(Path(folder), part)
    val = recipe.data.val
    if isinstance(val, str) and not is_built_in(val) and not is_url(val):
        run_folder.check_apart(Path(folder), path_of(val), "the held-out data")
    labelled = recipe.task == "classify"
    return open_splits(data, recipe.data.val, labelled, public_urls=public_urls)


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
        self.recipe, self.splits, self.world, self.options = recipe, splits, world, options
        train = splits.train
        self.sampler = StepSampler(len(train), recipe, world.rank, world.size, train.labels)
        self.run_folder = RunFolder(folder, recipe, splits.train, world, options)
        self._check_step()
        self.checkpoints = CheckpointManager(
            folder,
            world,
            recipe.keep_checkpoints,
            keeps_step=self._keeps,
            in_background=not options.blocking_saves,
        )
        meta = self.run_folder.meta
        self.best = BestWeights(recipe, splits, meta.get("best"))
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
            track=options.trackers,
            facts=flatten(recipe.to_dict()),
        )
        self.train_step = TrainStep(self.setup, recipe, self.sampler)
        self.view_flops = training_flops(recipe, self.setup.num_classes)
        self.peak_flops = peak_flops(world.device, self.setup.precision)
        self.measurements = Measurements(
            recipe, self.setup, splits, self.sampler, world, self.run_log, folder
        )
        # Numbers of views since the start of the run, over all processes.
        self.seen_views, self.unreadable_views = meta.get("seen", 0), meta.get("unread", 0)
        self.is_stopped = False  # by a signal, which another process may have received
        if not meta:
            check_kind(self.setup, train, recipe.model.name)
        self.run_folder.claim()

    def run(self) -> TrainingResult:
        """Train to the last step, export the weights, and return the last measurements."""
        last = self._resume()
        self.run_log.open(last["step"])
        outcome: Outcome = "failed"
        try:
            facts = self.setup.facts(self.sampler.steps, self.splits)
            self.run_log.show_start(self.recipe.model.name, facts)
            log.info("the run is written to %s", self.run_folder.path)
            if self.setup.weights == "random" and self.setup.masking is None:
                log.info(
                    "weights are random, and need many more epochs than pre-trained ones: "
                    "--init-from mae_%s starts from those, --init-from PATH from a run or a file",
                    self.recipe.model.name,
                )
            self._say_if_shares_differ()
            if self.setup.masking is None and self.splits.train.num_classes == 1:
                log.warning(
                    "all samples are of one class, so there is nothing to learn; put each class "
                    "into a folder of its own, and name the folder that holds these"
                )
            if not last["step"]:
                self.run_log.log_event(**START, **facts)
            # A signal waits for the end of a step, and for its checkpoint.
            with (
                unfinished.defer_keyboard_interrupts(),
                unfinished.finish_first(self.checkpoints.folder),
            ):
                self._train_from(last)
            if self.world.is_main_process:
                self.run_log.draw_curves()
            outcome = "finished"
        except BaseException as error:  # a signal is no Exception
            is_signal = self.is_stopped or not isinstance(error, Exception)
            outcome = "interrupted" if is_signal else "failed"
            raise
        finally:
            self.checkpoints.close()
            self.run_log.close(outcome)
        with ema_weights(self.training):
            self.run_folder.export(self.setup, last)
        result: TrainingResult = last  # type: ignore[assignment]
        return result

    def _say_if_shares_differ(self) -> None:
        """Say that the batch cannot be divided by the number of processes, so that some wait."""
        shares = self.world.gather(len(self.sampler.share(0)))
        if len(set(shares)) > 1:
            log.info(
                "%d samples of a step cannot be divided equally: %d to %d in a forward pass",
                self.sampler.step_samples,
                min(shares),
                max(shares),
            )

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
        left = "" if meta["step"] < self.sampler.steps else ": nothing is left to do"
        log.info("resuming after step %d of %d%s", meta["step"], self.sampler.steps, left)
        if self.run_folder.resumes_in_place:
            self.checkpoints.forget_after(meta["step"])
        return {key: meta[key] for key in ("step", *MEASUREMENTS) if key in meta}

    def _train_from(self, last: dict[str, Any]) -> None:
        """Run the steps after `last["step"]`, and update `last` with each measurement.

        Raises:
            TrainingError: Another process was told to stop; see also `_report`.
        """
        step, steps, meta = last["step"], self.sampler.steps, self.run_folder.meta
        self.measurements.prepare()
        if meta.get("pending") and not self._measure(step, last):
            self._stop(step)
            return
        batches = training_batches(self.setup, self.splits.train, self.recipe, self.sampler, step)
        world, device = self.world, self.setup.device
        traced = self.options.profile if world.is_main_process else 0
        self.profiler = StepProfiler(self.run_folder.path, traced, step, device)
        statistics = StepStatistics(self.world, step, meta.get("rows", ()))
        while step < steps:
            statistics.add(self._step(step, batches))
            step += 1
            self.profiler.after_step(step)
            saves = self.sampler.is_due(self.recipe.save_every, step) or self._keeps(step)
            measures = self.measurements.are_due(step)
            reports = saves or measures or step % self.recipe.log_every == 0
            stops = self._is_told_to_stop()
            # A report comes before every save: it raises an error if a value is NaN or infinite.
            # And it comes before other work, whose time would else count as that of the steps.
            if reports:
                last |= self._report(statistics, step)
                statistics = StepStatistics(self.world, step)
            else:
                self._show_progress(statistics, step)
            is_pending = measures and (stops or not self._measure(step, last))
            if stops or is_pending:
                self._log_unreadable(step)
                self._save(last, step, pending=is_pending, rows=statistics.totals(self._is_scaled))
                self.checkpoints.wait()
                self._stop(step)
                return
            if saves:
                self._save(last, step)
            if reports:
                statistics = StepStatistics(self.world, step)  # its time begins now
        self.profiler.close()
        self.checkpoints.wait()

    def _measure(self, step: int, last: dict[str, Any]) -> bool:
        """Measure what is due after a step, and export the weights if they are the best so far.
        Return False if that was to end early."""
        # Loaders may start processes now, and a process must not be forked while a thread writes.
        self.checkpoints.wait()
        if not self.measurements.take(step, last, self._is_told_to_stop):
            return False
        if self.best.improves(last):
            with ema_weights(self.training):
                self.run_folder.export(self.setup, last | {"step": step}, BEST)
            self.run_log.log_event("best", step=step, **{str(self.best.kind): self.best.value})
        return True

    def _keeps(self, step: int) -> bool:
        """Return whether the checkpoint after a step is kept for good."""
        passes = self.recipe.keep_every
        return passes is not None and self.sampler.is_every(passes, step)

    def _save(self, last: dict[str, Any], step: int, **unfinished_work: Any) -> None:
        """Save a checkpoint.

        Args:
            last: The last measurements.
            step: Number of steps that are done.
            unfinished_work: What has to be done before the next step, if the run stops here:
                `pending`, whether the validation and the pictures of this step are missing, and
                `rows`, the statistics that have not been reported.
        """
        values = {**last, "step": step, **self._resume_values(), **unfinished_work}
        self.checkpoints.save(self.training, values)

    def _is_told_to_stop(self) -> bool:
        """Return whether any process has received a signal. All of them stop together."""
        return self.world.any(unfinished.deferred() is not None)

    def _stop(self, step: int) -> None:
        """Say where the checkpoint is. The signal is raised when the writing block ends.

        Raises:
            TrainingError: Another process has received the signal, and this one has not.
        """
        self.is_stopped = True
        command = resume_command(self.run_folder.path, self.options, self.world, self.recipe)
        text = f"step {step} of {self.sampler.steps} is saved in {self.run_folder.path}"
        error = unfinished.deferred()
        if error is None:
            raise TrainingError(f"another process was told to stop; {text}", f"{command} continues")
        if self.world.is_main_process:
            error.add_note(f"{text}; to continue: {command}")

    def _show_progress(self, statistics: StepStatistics, step: int) -> None:
        """Show on the terminal that a step is done, with its loss, if it is time for that."""
        if not self.run_log.wants_progress(step):
            return
        weighted, weight, *_ = statistics.rows[-1].tolist()  # of this process
        values = {
            "step": step,
            "epoch": step / self.sampler.steps_per_pass,
            "loss": weighted / weight if weight else math.nan,
            "lr": learning_rate_at(step - 1, self.sampler.steps, self.recipe),
        }
        self.run_log.show_progress(values)

    @property
    def _is_scaled(self) -> bool:
        """Whether the loss is scaled (fp16)."""
        return self.training.scaler.is_enabled()

    def _resume_values(self) -> dict[str, Any]:
        """Return the values in a checkpoint's meta.json that only resuming needs."""
        return {
            "recipe": self.recipe.to_dict(),
            "card": self.setup.card,
            "data": self.splits.train.fingerprint,
            "seen": self.seen_views,
            "unread": self.unreadable_views,
            "best": self.best.value,
        }

    def _step(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        """Run one optimiser step, and return its values, see `TrainStep.run`."""
        return self.train_step.run(step, batches)

    def _report(self, statistics: StepStatistics, step: int) -> dict[str, Any]:
        """Log the steps since the last report, and return the measurements for the result.

        Raises:
            TrainingError: A loss or gradient is NaN or infinite, or too many samples are
                unreadable.
        """
        values = statistics.summary(self._is_scaled)
        self._log_unreadable(step)
        self.seen_views += values.pop("views")
        self.unreadable_views += values.pop("unreadable_views")
        self._check_unreadable()
        values["lr"] = learning_rate_at(step - 1, self.sampler.steps, self.recipe)
        values["epoch"] = step / self.sampler.steps_per_pass
        values["step_time"] = values["seconds"] / len(statistics.rows)
        values["wait"] = min(1.0, self.train_step.waited / values["seconds"])
        self.train_step.waited = 0.0
        values["eta"] = (self.sampler.steps - step) * values["step_time"]
        if self.view_flops is not None:
            values["tflops"] = self.view_flops * values["rate"] / self.world.size / 1e12
            if self.peak_flops is not None:
                values["mfu"] = values["tflops"] * 1e12 / self.peak_flops
        if self.setup.device.type == "cuda":
            values["memory"] = torch.cuda.max_memory_allocated(self.setup.device) / 2**30
        result = {"step": step, "epoch": values["epoch"], "loss": values["loss"]}
        if self.unreadable_views:
            unreadable_samples = self.unreadable_views // self.recipe.data.repeats
            result["unreadable"] = values["unreadable"] = unreadable_samples
        self.run_log.log_event("step", step=step, **values)
        return result

    def _log_unreadable(self, step: int) -> None:
        """Log the unreadable samples of all processes."""
        for unreadable in self.world.gather(self.train_step.unreadable):
            for name, message in unreadable.items():
                self.run_log.log_event("bad", step=step, input=name, message=message)
        self.train_step.unreadable = {}

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
