"""Read recipes: built-in ones by model name, YAML files with `extends`, and values of --set."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import UsageError, did_you_mean
from ..plain_data import parse_yaml, read_yaml
from .recipe import Recipe

RECIPES = Path(__file__).with_name("recipes")


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
        key = "keep_checkpoints" if key == "keep" else key
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


def _load_values(recipe: str | Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a built-in recipe or a file, merged with those that it extends.

    Args:
        recipe: Name of a model, or path of a file.
        extended_by: The files whose `extends` led here, resolved.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return _built_in_values(str(recipe))
    resolved = Path(os.path.realpath(path))
    if resolved in extended_by:
        raise UsageError(f"recipe {str(path)!r} extends itself", "change its `extends`")
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = did_you_mean(path.stem, names())
        raise UsageError(f"recipe {str(path)!r} cannot be read ({reason})", hint) from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {str(path)!r} holds no keys", "start it with `extends: MODEL`")
    if "keep" in values:  # renamed before files are merged, so that later layers can override it
        values.setdefault("keep_checkpoints", values.pop("keep"))
    if "extends" in values:
        base = str(values.pop("extends"))
        parent = path.parent / base if base.endswith((".yaml", ".yml")) else base
        values = _merge(_load_values(parent, (*extended_by, resolved)), values)
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
