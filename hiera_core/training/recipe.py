"""The recipe: everything that decides a training run, read from YAML and checked. No torch here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from .. import zoo
from ..errors import UsageError, did_you_mean
from . import recipe_parser

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

    name: str  # of the zoo
    config: dict[str, Any] = field(default_factory=dict)  # constructor arguments that differ


@dataclass(frozen=True)
class DataSettings:
    """How samples are drawn."""

    val: str | float | None = None  # held-out data, or a share to hold out
    repeats: int = 1  # views of a sample each time it is read (repeated sampling)
    max_bad: float = 0.01  # share of unreadable samples above which the run stops


@dataclass(frozen=True)
class AugmentSettings:
    """Random changes to a sample; all frames of a clip get the same ones."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # its width / height
    flip: float = 0.5  # probability
    randaugment: float = 0.0  # magnitude out of 10; 0: none
    randaugment_std: float = 0.5  # of the magnitude
    randaugment_ops: int = 2  # operations a sample
    erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    lr: float  # at `lr_batch_size`; scaled linearly to the recipe's batch size
    lr_batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # learning rate of a block relative to that of the next
    clip_grad: float | None = None  # L2 norm


@dataclass(frozen=True)
class ScheduleSettings:
    """How long, and at which learning rate."""

    epochs: float  # passes x repeats
    warmup_epochs: float = 0.0  # linear from 0
    kind: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.0  # at `lr_batch_size`, as lr


@dataclass(frozen=True)
class Recipe:
    """All of it. `batch_size` counts what one optimiser step sees, over all processes."""

    task: Literal["mae", "classify"]
    model: ModelSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    batch_size: int
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    accumulate: int = 1  # passes a step, to fit the batch into memory
    mask_ratio: float = 0.6  # of `mae`
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # autocast; auto: bf16 on CUDA
    ema: float = 0.0  # decay of the averaged weights that are kept and saved; 0: none
    grad_checkpointing: bool = False
    seed: int = 0
    log_every: int = 20  # steps
    val_every: float = 1.0  # passes
    save_every: float = 1.0  # passes
    keep_checkpoints: int = 2  # the newest ones

    def __post_init__(self) -> None:
        row = zoo.get(self.model.name)
        if row.autoencoder != (self.task == "mae"):
            other = self.model.name.removeprefix("mae_")
            raise UsageError(
                f"task {self.task} with model {row.name}",
                f"use {other if row.autoencoder else 'mae_' + other}",
            )
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
            if not value > 0:
                raise UsageError(f"{name} is {value}", "give a number above 0")
        not_negative = {
            "optimizer.lr": self.optimizer.lr,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "schedule.warmup_epochs": self.schedule.warmup_epochs,
            "augment.mixup": self.augment.mixup,
            "augment.cutmix": self.augment.cutmix,
            "augment.randaugment": self.augment.randaugment,
            "augment.randaugment_std": self.augment.randaugment_std,
        }
        for name, value in not_negative.items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}", "give a number that is not negative")
        shares = {
            "augment.flip": self.augment.flip,
            "augment.erasing": self.augment.erasing,
            "augment.label_smoothing": self.augment.label_smoothing,
            "data.max_bad": self.data.max_bad,
            "optimizer.layer_decay": self.optimizer.layer_decay,
            "optimizer.betas[0]": self.optimizer.betas[0],
            "optimizer.betas[1]": self.optimizer.betas[1],
        }
        for name, value in shares.items():
            if not 0 <= value <= 1 or (value == 1 and "betas" in name):
                raise UsageError(f"{name} is {value}", "give a number between 0 and 1")
        clip = self.optimizer.clip_grad
        if clip is not None and not clip > 0:
            raise UsageError(f"optimizer.clip_grad is {clip}", "give a number above 0, or leave it")
        for name, (low, high) in (("scale", self.augment.scale), ("ratio", self.augment.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise UsageError(f"augment.{name} is [{low}, {high}]", "give [smallest, largest]")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise UsageError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is more than "
                f"schedule.epochs {self.schedule.epochs:g}",
                "set both",
            )
        if not 0 < self.mask_ratio < 1:
            raise UsageError(f"mask_ratio {self.mask_ratio} is outside (0, 1)", "use 0.6, or 0.9")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema is {self.ema}", "give a decay below 1, such as 0.9999")
        if self.batch_size % (self.accumulate * self.data.repeats):
            raise UsageError(
                f"batch_size {self.batch_size} is no multiple of accumulate x data.repeats "
                f"({self.accumulate} x {self.data.repeats})",
                "change one of them",
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From nested dictionaries, as YAML gives them.

        Raises:
            UsageError: an unknown key (the hint names the near one), a missing or a wrong value.
        """
        values = dict(values)
        if "keep" in values:  # the name until November 2026
            values["keep_checkpoints"] = values.pop("keep")
        recipe: Self = recipe_parser.build(cls, values)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read_recipe(recipe: str | Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by the name of its model, or from a file, with some values set otherwise.

    A file holds all values, or `extends: NAME` and those that differ.

    Args:
        recipe: `mae_hiera_base_224`, or a path.
        settings: dotted keys: {"optimizer.lr": 1e-3}.

    Raises:
        UsageError: there is none; see `Recipe.of`.
    """
    values = _values(recipe)
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        part = values
        for parent in parents:
            if not isinstance(part.setdefault(parent, {}), dict):
                raise UsageError(f"{key}: {parent} holds no further keys", "see --print-recipe")
            part = part[parent]
        part[last] = copy.deepcopy(value)  # further keys may go into it
    return Recipe.of(values)


def names() -> list[str]:
    """Models that have a recipe in the package: all of the zoo's."""
    tables = map(_table, sorted(RECIPES.glob("*.yaml")))
    return [name for table in tables for name in table["models"]]


def parse_setting(text: str) -> tuple[str, Any]:
    """`optimizer.lr=1e-3` -> ("optimizer.lr", "1e-3"); values are YAML.

    Raises:
        UsageError: there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}", "write key=value, e.g. --set optimizer.lr=1e-3")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is no YAML") from error


def _values(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return _of_model(str(recipe))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        hint = did_you_mean(path.stem, names())
        raise UsageError(f"recipe {str(path)!r} cannot be read ({reason})", hint) from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {str(path)!r} holds no keys", "begin with `extends: MODEL`")
    if "extends" in values:
        base = str(values.pop("extends"))
        parent = path.parent / base if base.endswith((".yaml", ".yml")) else base
        values = _merged(_values(parent), values)
    return values


def _of_model(name: str) -> dict[str, Any]:
    for path in sorted(RECIPES.glob("*.yaml")):
        table = _table(path)
        if name in table["models"]:
            row = table.pop("models")[name]
            return _merged(_merged(table, {"model": {"name": name}}), row or {})
    raise UsageError(
        f"no recipe {name!r}",
        did_you_mean(name, names()) or "give a .yaml file or a model of the zoo",
    )


def _table(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return table


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins, key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
