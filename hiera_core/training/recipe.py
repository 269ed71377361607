"""Training recipes: all settings that determine what a run computes, typed and checked.

torch is not imported here, so `hiera train --print-recipe` starts quickly.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Self

import yaml

from .. import zoo
from ..errors import UsageError, check_choice, did_you_mean, is_whole
from ..models.masking import MASK_RATIOS, check_mask_ratio

MAX_RATIO, MAX_RANDAUGMENT_OPS = 100, 100  # far beyond what is useful
MOST_WORKERS = 1024
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    name: str  # a name in the zoo
    config: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change


@dataclass(frozen=True)
class DataSettings:
    """The data: where it is, what is held out, and how samples are read."""

    path: str | None = None  # the training data, see `open_splits`
    val: str | float | None = None  # path of held-out data, or share of the data to hold out
    repeats: int = 1  # views of a sample each time it is read (repeated sampling)
    max_bad: float = 0.01  # largest share of unreadable samples; above it the run stops


@dataclass(frozen=True)
class AugmentSettings:
    """Random augmentation of samples. All frames of a clip get the same augmentation."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, as a share of the image
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    randaugment: float = 0.0  # magnitude, up to 10; 0 turns RandAugment off
    randaugment_std: float = 0.5  # standard deviation of the magnitude
    randaugment_ops: int = 2  # operations for each sample
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of the Beta distribution; 0 turns mixup off
    cutmix: float = 0.0  # alpha of the Beta distribution; 0 turns CutMix off
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW."""

    lr: float  # peak rate for `lr_batch_size`; scaled linearly to the recipe's batch size
    lr_batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # learning rate of a block, divided by that of the next block
    clip_grad: float | None = None  # largest L2 norm of the gradient; None: no clipping


@dataclass(frozen=True)
class ScheduleSettings:
    """Length of the run and learning rate schedule."""

    epochs: float  # effective epochs: passes over the data times data.repeats
    warmup_epochs: float = 0.0  # linear warm-up from 0
    kind: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.0  # final rate of the cosine, for `lr_batch_size`


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. `val_every` and `save_every` count passes over the data."""

    task: Literal["mae", "classify"]
    model: ModelSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    batch_size: int  # views for one optimiser step, over all processes
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    init_from: str | None = None  # weights to start from; None: random weights
    accumulate: int = 1  # forward passes for one step, if its batch does not fit in memory
    mask_ratio: float = MASK_RATIOS["image"]  # share of hidden mask units, for the task `mae`
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # autocast; auto: bf16 on CUDA
    # Decay of the weights' exponential moving average (EMA), which is validated and saved; 0: none.
    ema: float = 0.0
    grad_checkpointing: bool = False
    seed: int = 0
    log_every: int = 20  # steps between measurements in the log
    val_every: float = 1.0  # passes between validations
    save_every: float = 1.0  # passes between checkpoints
    keep_checkpoints: int = 2  # number of checkpoints to keep

    def __post_init__(self) -> None:
        self._check_task()
        self._check_positive()
        self._check_not_negative()
        self._check_fractions()
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
        plain: dict[str, object] = _plain(dataclasses.asdict(self))
        return plain

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
        tensorboard: Also write events for TensorBoard.
        live: Show a live table, if stderr is a terminal.
    """

    init_from: str | None = None
    resume: str | None = None
    overwrite: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    workers: int | None = None
    tensorboard: bool = False
    live: bool = True

    def __post_init__(self) -> None:
        check_choice("parallel", self.parallel, typing.get_args(Parallel))
        if self.workers is not None and not is_whole(self.workers):
            raise UsageError(f"workers is {self.workers!r}", "give a whole number, or None")
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise UsageError(
                f"workers is {self.workers}", f"give a number from 0 to {MOST_WORKERS}"
            )


def _plain(value: Any) -> Any:
    """Convert tuples to lists, including those in dictionaries."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def build_settings(cls: Any, values: Any, where: str = "") -> Any:
    """Build a dataclass from a dictionary, and convert each value to the type of its field.

    Args:
        cls: The dataclass. Its fields may be dataclasses too.
        values: The values, by field name.
        where: Dotted key of `values` in the recipe, for messages; empty for the whole recipe.

    Raises:
        UsageError: A key is unknown (the hint suggests a similar one), a required key is missing,
            or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'the recipe'} is {values!r}", "give `key: value` lines")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            hint = did_you_mean(str(key), types) or f"keys are {', '.join(types)}"
            raise UsageError(f"unknown key {_path(where, key)!r}", hint)
    for spec in dataclasses.fields(cls):
        required = spec.default is spec.default_factory is dataclasses.MISSING
        if required and spec.name not in values:
            raise UsageError(f"the recipe has no {_path(where, spec.name)!r}", "set it")
    return cls(**{k: _convert(types[k], v, _path(where, k)) for k, v in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a value to a type: a dataclass, union, Literal, tuple or plain type."""
    if dataclasses.is_dataclass(kind):
        return build_settings(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is UnionType:
            return _convert_to_union(arguments, value, where)
        if origin is Literal:
            return arguments[arguments.index(value)]
        if origin is tuple:
            return tuple(_convert(t, v, where) for t, v in zip(arguments, value, strict=True))
        if kind is float and not isinstance(value, bool):
            return float(value)  # YAML parses "1e-3" as a string
        if kind is int and not isinstance(value, bool) and float(value) == int(value):
            return int(value)
        if isinstance(value, origin or kind):
            return value
    except (TypeError, ValueError, OverflowError):  # the last from numbers beyond any float
        pass
    raise UsageError(f"{where} is {value!r}", f"expected {_describe_type(kind)}")


def _convert_to_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert a value to a member of a union. A string stays a string if the union has `str`."""
    if value is None and NoneType in members:
        return None
    if isinstance(value, str) and str in members:
        return value
    others = [member for member in members if member not in (NoneType, str)]
    return _convert(others[0] if others else str, value, where)


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return str(getattr(kind, "__name__", kind)) if not typing.get_args(kind) else str(kind)


def _path(where: str, key: object) -> str:
    """Return the dotted key of `key` under `where`."""
    return f"{where}.{key}" if where else str(key)
