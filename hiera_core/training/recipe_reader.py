"""Read recipes: built-in ones by model name, YAML files with `extends`, and values of --set."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import UsageError, did_you_mean
from ..plain_data import parse_yaml, read_yaml
from .recipe import Recipe
from .settings.typed_values import UnknownKeyError

log = logging.getLogger("hiera")
RECIPES = Path(__file__).with_name("recipes")
# Keys of the recipe that may change when a run resumes, because the weights do not depend on them.
# The data is compared by its content.
CHANGEABLE_KEYS = (
    *("log_every", "val_every", "save_every", "data.path"),
    *("keep_checkpoints", "keep_every", "keep_best"),
    *("probe", "probe.method", "probe.every", "probe.data", "probe.val"),
    *("probe.samples", "probe.neighbours"),
)

# Sections of the recipe that are null in most recipes.
OPTIONAL_SECTIONS = ("probe", "lora")


def read_recipe(
    recipe: str | Path, settings: Mapping[str, Any] | None = None, *, shorten_warmup: bool = False
) -> Recipe:
    """Return the recipe of a model, or the recipe in a file, with some values changed.

    Args:
        recipe: Name of a model, such as `mae_hiera_base_224`, or path of a .yaml file. A file has
            all values, or `extends: NAME` and the values that differ.
        settings: Values to change, by dotted key: {"optimizer.lr": 1e-3}.
        shorten_warmup: If fewer epochs are given, and no warm-up, shorten that of the built-in
            recipe; see `_shorten_warmup`.

    Raises:
        UsageError: The recipe does not exist, or the file cannot be read; see `Recipe.from_dict`.
    """
    values = apply_settings(_load_values(recipe, _built_in_values), settings)
    if shorten_warmup:
        _shorten_warmup(values, given_values(recipe, settings))
    return _build(values)


def _build(values: Mapping[str, Any]) -> Recipe:
    """Return `Recipe.from_dict`. A hint about an unknown key may name one of another section."""
    try:
        return Recipe.from_dict(values)
    except UnknownKeyError as error:
        meant = _key_of(error.key.replace("-", "_").lower(), similar=not error.similar)
        if meant is None:
            raise
        raise UsageError(error.message, f"did you mean {meant}?") from error


def given_values(
    recipe: str | Path | None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values that a user has written in files and settings. Of a built-in recipe, these
    are its task and model only.

    Args:
        recipe, settings: As for `read_recipe`. None: only the settings.

    Raises:
        UsageError: As for `read_recipe`.
    """
    return apply_settings({} if recipe is None else _load_values(recipe, _task_and_model), settings)


def resumed_recipe(
    saved: Mapping[str, Any], recipe: str | Path | None, settings: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[str]]:
    """Return the recipe with which a run resumes, and how what a user gives now differs from it.

    Args:
        saved: The recipe of the run.
        recipe, settings: As for `given_values`.

    Returns:
        The recipe of the run, with what the user gives for CHANGEABLE_KEYS, and a line for each
        other value that the user gives and that is not that of the run.

    Raises:
        UsageError: As for `read_recipe`.
    """
    given = given_values(recipe, settings)
    lines = differences(saved, given)
    if lines:
        return _build(saved), lines
    return _build(_merge(saved, given)), []


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return a line for each value of `given` that is not that of the run, such as
    `seed: 0 in the run, 7 on the command line`."""
    known, found = flatten(saved), list[str]()
    for key, value in flatten(given).items():
        old = known.get(key)
        if key not in CHANGEABLE_KEYS and not _is_same(old, value):
            found.append(f"{key}: {_show(old)} in the run, {_show(value)} on the command line")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# What other trainers call a key of the recipe, in their options.
OTHER_NAMES = {
    "b": "batch_size",
    "bs": "batch_size",
    "batch": "batch_size",
    "e": "schedule.epochs",
    "epoch": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "num_train_epochs": "schedule.epochs",
    "max_epochs": "schedule.epochs",
    "learning_rate": "optimizer.lr",
    "blr": "optimizer.lr",
    "base_lr": "optimizer.lr",
    "min_lr": "schedule.final_lr",
    "wd": "optimizer.weight_decay",
    "warmup": "schedule.warmup_epochs",
    "sched": "schedule.kind",
    "scheduler": "schedule.kind",
    "grad_clip": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "grad_accum": "accumulate",
    "accum_iter": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "smoothing": "augment.label_smoothing",
    "reprob": "augment.erasing",
    "hflip": "augment.flip",
    "aa": "augment.randaugment",
    "amp": "precision",
    "dtype": "precision",
    "model_ema": "ema",
    "model_ema_decay": "ema",
    "gradient_checkpointing": "grad_checkpointing",
    "checkpointing": "grad_checkpointing",
    "activation_checkpointing": "grad_checkpointing",
    "random_seed": "seed",
    "val_split": "data.val",
    "validation": "data.val",
    "log_interval": "log_every",
    "log_freq": "log_every",
    "logging_steps": "log_every",
    "save_freq": "save_every",
    "save_steps": "save_every",
    "eval_every": "val_every",
    "img_size": "model.config.input_size",
    "image_size": "model.config.input_size",
    "size": "model.config.input_size",
    "resolution": "model.config.input_size",
    "drop_path": "model.config.drop_path_rate",
}
# Constructor arguments that trainers have options for.
MODEL_ARGUMENTS = ("input_size", "in_chans", "drop_path_rate", "head_dropout", "num_classes")


def key_of_option(option: str) -> str | None:
    """Return the key of the recipe that an option of another trainer sets, or None.

    `--epochs` -> "schedule.epochs", `--batch-size` -> "batch_size", `--lr` -> "optimizer.lr"
    """
    return _key_of(option.strip("-").replace("-", "_").lower(), similar=True)


def _key_of(word: str, *, similar: bool) -> str | None:
    """Return the key that a word means: its last part, or its name in another trainer.

    Args:
        word: The word.
        similar: Also take a word that is spelt nearly like this one.
    """
    keys = flatten(_plain_recipe()).keys()
    by_word = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
    by_word |= {key.replace(".", "_"): key for key in keys}
    by_word |= {name: f"model.config.{name}" for name in MODEL_ARGUMENTS} | OTHER_NAMES
    if word in by_word:
        return by_word[word]
    if not similar:
        return None
    found = difflib.get_close_matches(word, [w for w in by_word if len(w) > 3], 1, 0.8)
    return by_word[found[0]] if found else None


def names() -> list[str]:
    """Return the names of the models that have a built-in recipe: all models in the zoo."""
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
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise UsageError(
            f"--set {text}: the value is not valid YAML", "quote it, e.g. --set 'key=\"value\"'"
        ) from error


def apply_settings(values: dict[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Change values by dotted key, in place, and return them.

    Raises:
        UsageError: A setting is no dotted key, or one of a value that is no section.
    """
    for key, value in (settings or {}).items():
        if not isinstance(key, str):
            raise UsageError(f"the setting {key!r} is no key", "give a text: 'optimizer.lr'")
        key = "keep_checkpoints" if key == "keep" else key
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            if section.get(parent) is None and parent in OPTIONAL_SECTIONS:
                section[parent] = {}
            if not isinstance(section.setdefault(parent, {}), dict):
                raise UsageError(f"{key}: {parent} holds no further keys", "see --print-recipe")
            section = section[parent]
        # A copy, because a later setting may add keys to a dictionary that the caller passed.
        section[last] = copy.deepcopy(value)
    return values


def _shorten_warmup(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Shorten the warm-up of a built-in recipe in proportion to the epochs, if it would otherwise
    take more than half of them, and a user has given the epochs but no warm-up."""
    wanted, name = flatten(given), flatten(values).get("model.name")
    if "schedule.epochs" not in wanted or "schedule.warmup_epochs" in wanted:
        return
    base = flatten(_built_in_values(name)) if name in names() else {}
    warmup, usual = base.get("schedule.warmup_epochs"), base.get("schedule.epochs")
    try:
        epochs = float(wanted["schedule.epochs"])
    except (TypeError, ValueError):
        return  # `Recipe.from_dict` raises the error
    if not (warmup and usual and 0 < epochs < 2 * warmup):
        return
    shorter = float(f"{warmup * epochs / usual:.3g}")
    values["schedule"]["warmup_epochs"] = shorter
    log.info(
        "warm-up is shortened from %g to %g epochs, in proportion to schedule.epochs; "
        "schedule.warmup_epochs sets it",
        warmup,
        shorter,
    )


def _is_same(saved: object, given: object) -> bool:
    """Return whether two values of a recipe are the same, however they are written."""
    if isinstance(saved, list | tuple) and isinstance(given, list | tuple):
        pairs = zip(saved, given, strict=False)
        return len(saved) == len(given) and all(_is_same(a, b) for a, b in pairs)
    if saved == given:
        return True
    if isinstance(saved, str) and isinstance(given, str):  # maybe two spellings of a path
        return os.path.realpath(saved) == os.path.realpath(given)
    if isinstance(saved, bool) or isinstance(given, bool) or saved is None or given is None:
        return False
    try:
        return float(saved) == float(given)  # type: ignore[arg-type]  # YAML parses 1e-3 as text
    except (TypeError, ValueError):
        return False


def _show(value: object) -> str:
    return "none" if value is None else str(value)


def _load_values(
    recipe: str | Path,
    built_in: Callable[[str], dict[str, Any]],
    extended_by: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Return the values of a built-in recipe or a file, merged with those that it extends.

    Args:
        recipe: Name of a model, or path of a file.
        built_in: Returns the values of a built-in recipe by its name.
        extended_by: The files whose `extends` led here, resolved.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if (path / "recipe.yaml").is_file():
            raise UsageError(
                f"{path} is the folder of a run",
                f"hiera train --resume {path} continues it; {path / 'recipe.yaml'} is its recipe",
            )
        return built_in(str(recipe))
    resolved = Path(os.path.realpath(path))
    if resolved in extended_by:
        raise UsageError(f"recipe {str(path)!r} extends itself", "change its `extends`")
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split()).lower() if isinstance(error, OSError) else reason
        hint = did_you_mean(path.stem, names())
        raise UsageError(f"recipe {str(path)!r} cannot be read ({reason})", hint) from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {str(path)!r} holds no keys", "start it with `extends: MODEL`")
    if "keep" in values:  # renamed before files are merged, so that later layers can override it
        values.setdefault("keep_checkpoints", values.pop("keep"))
    if "extends" in values:
        base = str(values.pop("extends"))
        parent = path.parent / base if base.endswith((".yaml", ".yml")) else base
        values = _merge(_load_values(parent, built_in, (*extended_by, resolved)), values)
    return values


def _built_in_values(name: str) -> dict[str, Any]:
    """Return the values of a model's built-in recipe."""
    for path in sorted(RECIPES.glob("*.yaml")):
        shared = _read_built_in(path)
        if name in shared["models"]:
            specific = shared.pop("models")[name]
            return _merge(_merge(shared, {"model": {"name": name}}), specific or {})
    if name in zoo.models():
        zoo.check_is_hiera(zoo.get(name).family, name)
    raise UsageError(
        f"no recipe {name!r}",
        did_you_mean(name, names()) or "give a .yaml file or a model from the zoo",
    )


def _plain_recipe() -> dict[str, Any]:
    return Recipe.from_dict(_built_in_values(zoo.DEFAULT_IMAGE_MODEL)).to_dict()


def _task_and_model(name: str) -> dict[str, Any]:
    """Return what a user chooses with the name of a built-in recipe."""
    return {"task": _built_in_values(name)["task"], "model": {"name": name}}


def _read_built_in(path: Path) -> dict[str, Any]:
    """Read a file of recipes/: values that its models share, and under `models` those of each."""
    recipe: dict[str, Any] = read_yaml(path)
    return recipe


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries. Where both have a value, that of `override` is used."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
