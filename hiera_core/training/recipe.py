"""Training recipes: all settings that determine what a run computes, typed and checked.

torch is not imported here, so `hiera train --print-recipe` starts quickly.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import yaml

from .. import zoo
from ..errors import UsageError, check_choice, is_whole
from ..models.masking import MASK_RATIOS, check_mask_ratio
from .settings.recipe_parts import (
    AugmentSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ProbeSettings,
    ScheduleSettings,
)
from .settings.typed_values import build_settings, plain

MAX_RATIO, MAX_RANDAUGMENT_OPS = 100, 100  # far beyond what is useful
MOST_WORKERS = 1024
MOST_PROFILED = 1000  # steps; a trace of one can take megabytes
Parallel = Literal["ddp", "fsdp"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. `val_every` and `save_every` count passes over the data."""

    task: Literal["mae", "classify"]
    model: ModelSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    batch_size: int  # views for one optimiser step, over all processes
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    class_weights: Literal["balanced"] | None = None  # of the loss: inverse to the class sizes
    init_from: str | None = None  # weights to start from; None: random weights
    # What stays as it is: the number of first blocks, or "encoder" for all blocks. Embeddings, too.
    freeze: int | str | None = None
    lora: LoraSettings | None = None
    accumulate: int = 1  # forward passes for one step, if its batch does not fit in memory
    mask_ratio: float = MASK_RATIOS["image"]  # share of hidden mask units, for the task `mae`
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # autocast; auto: bf16 on CUDA
    # Decay of the weights' exponential moving average (EMA), which is validated and saved; 0: none.
    ema: float = 0.0
    # Whether blocks are recomputed in the backward pass, to save memory; "selective": but for their
    # matrix products.
    grad_checkpointing: bool | Literal["selective"] = False
    deterministic: bool = False  # only kernels whose results do not change from run to run
    seed: int = 0
    log_every: int = 20  # steps between measurements in the log
    val_every: float = 1.0  # passes between validations
    probe: ProbeSettings | None = None
    save_every: float = 1.0  # passes between checkpoints
    keep_checkpoints: int = 2  # number of checkpoints to keep, the newest ones
    keep_every: float | None = None  # passes between checkpoints that are kept for good
    # The measurement whose best weights are exported to best/, too; None: only the last ones.
    keep_best: Literal["loss", "top1", "probe"] | None = None

    def __post_init__(self) -> None:
        self._check_task()
        self._check_positive()
        self._check_not_negative()
        self._check_fractions()
        self._check_tuning()
        if self.task == "mae" and (self.data.balanced or self.class_weights):
            name = "data.balanced" if self.data.balanced else "class_weights"
            raise UsageError(f"{name} needs classes", "leave it out for task mae")
        if self.data.balanced and self.class_weights:
            raise UsageError(
                "data.balanced and class_weights are both given", "each evens out the classes alone"
            )
        if self.keep_best == "top1" and self.task == "mae":
            raise UsageError("keep_best is top1, and an autoencoder has no classes", "use loss")
        if self.keep_best == "probe" and self.probe is None:
            raise UsageError("keep_best is probe, and the recipe has none", "set probe.every")
        clip = self.optimizer.clip_grad
        if clip is not None and not clip > 0:
            raise UsageError(
                f"optimizer.clip_grad is {clip}", "give a number above 0, or leave it out"
            )
        for name, (low, high) in (("scale", self.augment.scale), ("ratio", self.augment.ratio)):
            most = 1 if name == "scale" else MAX_RATIO
            if not 0 < low <= high <= most:
                raise UsageError(f"augment.{name} is [{low}, {high}]", "give [smallest, largest]")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise UsageError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is more than "
                f"schedule.epochs {self.schedule.epochs:g}",
                "set schedule.warmup_epochs lower, too",
            )
        if not 0 < self.augment.randaugment_ops <= MAX_RANDAUGMENT_OPS:
            raise UsageError(
                f"augment.randaugment_ops is {self.augment.randaugment_ops}",
                f"give a number from 1 to {MAX_RANDAUGMENT_OPS}, or set augment.randaugment to 0",
            )
        check_mask_ratio(self.mask_ratio)
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema is {self.ema}", "give a decay from 0 to below 1, e.g. 0.9999")
        if self.batch_size % (self.accumulate * self.data.repeats):
            raise UsageError(
                f"batch_size {self.batch_size} is no multiple of accumulate x data.repeats "
                f"({self.accumulate} x {self.data.repeats})",
                "change one of them",
            )

    def _check_task(self) -> None:
        entry = zoo.get(self.model.name)
        if entry.autoencoder != (self.task == "mae"):
            classifier = self.model.name.removeprefix("mae_")
            raise UsageError(
                f"task {self.task} does not suit model {entry.name}",
                f"use {classifier if entry.autoencoder else 'mae_' + classifier}",
            )

    def _check_tuning(self) -> None:
        """Check `freeze` and `lora`."""
        freeze = self.freeze
        if freeze is not None and freeze != "encoder" and (isinstance(freeze, str) or freeze < 1):
            raise UsageError(f"freeze is {freeze!r}", "give a number of blocks, or encoder")
        if self.lora is not None and freeze is not None:
            raise UsageError(
                "freeze and lora are both given", "leave out freeze: lora trains no other weights"
            )
        for name in ("freeze", "lora"):
            if getattr(self, name) is not None and self.task == "mae":
                raise UsageError(f"{name} is for fine-tuning", "leave it out for task mae")

    def _check_positive(self) -> None:
        positive = {
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "schedule.epochs": self.schedule.epochs,
            "optimizer.lr_batch_size": self.optimizer.lr_batch_size,
            "data.repeats": self.data.repeats,
            "log_every": self.log_every,
            "keep_checkpoints": self.keep_checkpoints,
            "val_every": self.val_every,
            "save_every": self.save_every,
        }
        if self.keep_every is not None:
            positive["keep_every"] = self.keep_every
        if self.probe is not None:
            positive["probe.every"] = self.probe.every
            positive["probe.samples"] = self.probe.samples
            positive["probe.neighbours"] = self.probe.neighbours
        if self.lora is not None:
            positive |= {"lora.rank": self.lora.rank, "lora.alpha": self.lora.alpha}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}", "give a number above 0, but not infinity")

    def _check_not_negative(self) -> None:
        not_negative = {
            "optimizer.lr": self.optimizer.lr,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "schedule.warmup_epochs": self.schedule.warmup_epochs,
            "augment.mixup": self.augment.mixup,
            "augment.cutmix": self.augment.cutmix,
            "augment.randaugment": self.augment.randaugment,
            "augment.randaugment_std": self.augment.randaugment_std,
            "schedule.final_lr": self.schedule.final_lr,
        }
        for name, value in not_negative.items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}", "give a finite number, 0 or above")

    def _check_fractions(self) -> None:
        fractions = {
            "augment.flip": self.augment.flip,
            "augment.erasing": self.augment.erasing,
            "augment.label_smoothing": self.augment.label_smoothing,
            "data.max_bad": self.data.max_bad,
            "optimizer.layer_decay": self.optimizer.layer_decay,
            "optimizer.betas[0]": self.optimizer.betas[0],
            "optimizer.betas[1]": self.optimizer.betas[1],
        }
        for name, value in fractions.items():
            if not 0 <= value <= 1 or (value == 1 and "betas" in name):
                raise UsageError(f"{name} is {value}", "give a number between 0 and 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build a recipe from nested dictionaries, such as those of a YAML file.

        Raises:
            UsageError: A key is unknown (the hint suggests a similar one) or missing, or a value is
                not usable.
        """
        values = dict(values)
        if "keep" in values:  # the name of `keep_checkpoints` until November 2026
            values.setdefault("keep_checkpoints", values.pop("keep"))
        recipe: Self = build_settings(cls, values)
        return recipe

    def to_dict(self) -> dict[str, object]:
        """Return the settings as nested dictionaries, for YAML and JSON."""
        values: dict[str, object] = plain(dataclasses.asdict(self))
        return values

    def to_yaml(self) -> str:
        """Return the settings as YAML, which `read_recipe` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


@dataclass(frozen=True)
class RunOptions:
    """Options for carrying out a run. The recipe determines what it computes.

    Args:
        init_from: Weights to start from: zoo name, hub repository, folder or file.
        resume: What to resume from: `auto`, the folder of a run, or a checkpoint; None starts a
            new run.
        overwrite: Replace the run that the folder holds.
        compile: Compile the model with torch.compile, as one graph (under FSDP, each block).
        parallel: How several processes share the model; see `World.parallelize`.
        workers: Dataloader workers of each process, at most 1024. None: the CPU cores that this
            process may use, divided by the number of processes on this machine, at most 8.
        tensorboard: Also write events for TensorBoard. The same as `tensorboard` in `track`.
        track: Trackers that also get the measurements: tensorboard, wandb, mlflow, trackio.
        live: Show a live table, if stderr is a terminal.
        profile: Number of steps of which the main process writes a trace, after the first ones.
        blocking_saves: Wait until each checkpoint is written. Otherwise a thread writes it from a
            copy of the state in the memory of the main process.
        private_urls: Whether URLs of a recipe, or of a run that is resumed, may lead into private
            networks. A recipe from somebody else could otherwise make this machine ask servers that
            only it can reach.
        named_urls: URLs that the caller names, which may do so. `train` adds those among its
            arguments.
    """

    init_from: str | None = None
    resume: str | None = None
    overwrite: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    workers: int | None = None
    tensorboard: bool = False
    track: tuple[str, ...] = ()
    live: bool = True
    blocking_saves: bool = False
    profile: int = 0
    private_urls: bool = False
    named_urls: frozenset[str] = frozenset()

    @property
    def public_urls(self) -> Container[str]:
        """The URLs that must not lead into private networks."""
        return () if self.private_urls else OtherUrls(self.named_urls | urls_among(self.init_from))

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers, each once."""
        chosen = {"tensorboard"} if self.tensorboard else set()
        return tuple(name for name in TRACKERS if name in chosen | set(self.track))

    def __post_init__(self) -> None:
        check_choice("parallel", self.parallel, typing.get_args(Parallel))
        for name in self.track:
            check_choice("tracker", name, TRACKERS)
        if not is_whole(self.profile) or not 0 <= self.profile <= MOST_PROFILED:
            raise UsageError(
                f"profile is {self.profile!r}", f"give a number of steps from 0 to {MOST_PROFILED}"
            )
        if self.workers is not None and not is_whole(self.workers):
            raise UsageError(f"workers is {self.workers!r}", "give a whole number, or None")
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise UsageError(
                f"workers is {self.workers}", f"give a number from 0 to {MOST_WORKERS}"
            )


@dataclass(frozen=True)
class OtherUrls(Container[str]):
    """All URLs but some. A URL that is written in another way than these is not one of them.

    Args:
        named: The URLs that are not in here.
    """

    named: frozenset[str]

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and "://" in text and text not in self.named


def urls_among(*given: object) -> frozenset[str]:
    """Return the URLs among values, and among those of dictionaries."""
    found: set[str] = set()
    for value in given:
        if isinstance(value, Mapping):
            found |= urls_among(*value.values())
        elif isinstance(value, str) and "://" in value:
            found.add(value)
    return frozenset(found)
