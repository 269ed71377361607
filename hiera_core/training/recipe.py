"""Training recipes: all settings that determine what a run computes, read from YAML and checked.

torch is not imported here, so `hiera train --print-recipe` starts quickly.
"""

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
from ..models.masking import MASK_RATIOS, check_mask_ratio
from . import recipe_parser

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    name: str  # a name in the zoo
    config: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change


@dataclass(frozen=True)
class DataSettings:
    """The data: what is held out, and how samples are read."""

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

    epochs: float  # passes over the data x repeats
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
    accumulate: int = 1  # forward passes for one step, if its batch does not fit into memory
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
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise UsageError(f"augment.{name} is [{low}, {high}]", "give [smallest, largest]")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise UsageError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is more than "
                f"schedule.epochs {self.schedule.epochs:g}",
                "set both",
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
            if not value > 0:
                raise UsageError(f"{name} is {value}", "give a number above 0")

    def _check_not_negative(self) -> None:
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
            values["keep_checkpoints"] = values.pop("keep")
        recipe: Self = recipe_parser.build(cls, values)
        return recipe

    def to_dict(self) -> dict[str, object]:
        """Return the settings as nested dictionaries, for YAML and JSON."""
        plain: dict[str, object] = _plain(dataclasses.asdict(self))
        return plain

    def to_yaml(self) -> str:
        """Return the settings as YAML, which `read_recipe` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read_recipe(recipe: str | Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a model, or the recipe in a file, with some values changed.

    Args:
        recipe: Name of a model, such as `mae_hiera_base_224`, or path of a .yaml file. A file has
            all values, or `extends: NAME` and the values that differ.
        settings: Values to change, by dotted key: {"optimizer.lr": 1e-3}.

    Raises:
        UsageError: The recipe does not exist, or the file cannot be read; see `Recipe.from_dict`.
    """
    values = _load_values(recipe)
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            if not isinstance(section.setdefault(parent, {}), dict):
                raise UsageError(f"{key}: {parent} holds no further keys", "see --print-recipe")
            section = section[parent]
        # A copy, because a later setting may add keys to a dictionary that the caller passed.
        section[last] = copy.deepcopy(value)
    return Recipe.from_dict(values)


def names() -> list[str]:
    """Return the names of the models that have a built-in recipe: all models of the zoo."""
    recipes = map(_read_built_in, sorted(RECIPES.glob("*.yaml")))
    return [name for recipe in recipes for name in recipe["models"]]


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse `key=value` of the option --set; the value is YAML.

    `augment.flip=0.5` -> ("augment.flip", 0.5)

    Raises:
        UsageError: The text has no `=` or no key, or the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(
            f"--set {text} is not a setting", "write key=value, e.g. --set optimizer.lr=1e-3"
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {text}: the value is not valid YAML", "quote it, e.g. --set 'key=\"value\"'"
        ) from error


def _load_values(recipe: str | Path) -> dict[str, Any]:
    """Return the values of a built-in recipe or a file, merged with those that it extends."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return _built_in_values(str(recipe))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        hint = did_you_mean(path.stem, names())
        raise UsageError(f"recipe {str(path)!r} cannot be read ({reason})", hint) from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {str(path)!r} holds no keys", "start it with `extends: MODEL`")
    if "extends" in values:
        base = str(values.pop("extends"))
        parent = path.parent / base if base.endswith((".yaml", ".yml")) else base
        values = _merge(_load_values(parent), values)
    return values


def _built_in_values(name: str) -> dict[str, Any]:
    """Return the values of a model's built-in recipe."""
    for path in sorted(RECIPES.glob("*.yaml")):
        shared = _read_built_in(path)
        if name in shared["models"]:
            specific = shared.pop("models")[name]
            return _merge(_merge(shared, {"model": {"name": name}}), specific or {})
    raise UsageError(
        f"no recipe {name!r}",
        did_you_mean(name, names()) or "give a .yaml file or a model of the zoo",
    )


def _read_built_in(path: Path) -> dict[str, Any]:
    """Read a file of recipes/: values that its models share, and under `models` their own."""
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return recipe


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries. Where both have a value, that of `override` is used."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _plain(value: Any) -> Any:
    """Convert tuples to lists, also inside dictionaries."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
