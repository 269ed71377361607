"""The recipe of a run with its data and weights: a new one, or that of the run to resume."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from ...data.datasets import is_built_in, is_url
from ...data.indexed.parquet_data import without_columns
from ...data.remote.web_ranges import names_server
from ...device import select_device
from ...errors import CheckpointError, UsageError, check_type
from ...weights import names
from ..distributed import World
from ..recipe import Recipe, RunOptions
from ..recipe_reader import apply_settings, flatten, read_recipe, resumed_recipe
from . import checkpoint
from .checkpoint_meta import META, read_meta

RECIPE_NAME = "recipe.yaml"
PATTERN = re.compile(r"\.(tar|parquet)(\?.*)?$")  # files that a pattern may stand for


def complete_recipe(
    recipe: str | Path | Recipe | None,
    data: str | Path | None,
    folder: Path,
    options: RunOptions,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of a run, with its data and the weights to start from.

    If the run resumes, this is the recipe that it was begun with. What is given here, apart from
    CHANGEABLE_KEYS, has to be the same.

    Args:
        recipe, settings: See `train`.
        data: The training data. None: that of the recipe.
        folder: Folder of the run.
        options: See `train`.

    Raises:
        UsageError: The recipe or a setting is not usable, or is not that of the run to resume.
        CheckpointError: The checkpoint to resume from is damaged.
    """
    check_type("recipe", recipe, (str, Path, Recipe, NoneType), "the name of a model, or a path")
    kinds = (Mapping, NoneType)
    check_type("settings", settings, kinds, "a dictionary, such as {'optimizer.lr': 1e-3}")
    more: dict[str, Any] = {} if data is None else {"data.path": _absolute_data(data)}
    if options.init_from is not None:
        more["init_from"] = _absolute_weights(options.init_from)
    if isinstance(recipe, Recipe):
        return with_absolute_paths(Recipe.from_dict(apply_settings(recipe.to_dict(), more)))
    saved, wanted = _saved_recipe(folder, options), {**(settings or {}), **more}
    if saved is None and recipe is None:
        raise UsageError("no recipe", "name a model or a .yaml file, or resume a run")
    if saved is None:
        assert recipe is not None
        return with_absolute_paths(read_recipe(recipe, wanted, shorten_warmup=True))
    if "init_from" not in saved:  # of an earlier version, which did not record it
        wanted.pop("init_from", None)
    chosen, lines = resumed_recipe(saved, recipe, wanted)
    if lines:
        raise other_recipe(lines, folder, options)
    return with_absolute_paths(chosen)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe so that it can be used in any folder: with absolute paths of the data and
    of the weights to start from. Names stay as they are."""
    path, val, init_from = recipe.data.path, recipe.data.val, recipe.init_from
    path = None if path is None else _absolute_data(path)
    val = _absolute_data(val) if isinstance(val, str) else val
    init_from = None if init_from is None else _absolute_weights(init_from)
    return replace(recipe, data=replace(recipe.data, path=path, val=val), init_from=init_from)


def _saved_recipe(folder: Path, options: RunOptions) -> dict[str, Any] | None:
    """Return the recipe of the run that is to be resumed, or None if there is none."""
    found = checkpoint.find_checkpoint(options.resume, folder) if options.resume else None
    if found is not None:
        recipe: dict[str, Any] = read_meta(found)["recipe"]
        try:
            # Keys that the version of the run did not know get their default, but for `init_from`.
            known = Recipe.from_dict(recipe).to_dict()
        except UsageError as error:
            raise CheckpointError(
                f"{found / META}: its recipe is not usable ({error.message})", "the file is damaged"
            ) from error
        return {key: value for key, value in known.items() if key in recipe or key != "init_from"}
    path = folder / RECIPE_NAME
    if not options.resume or options.overwrite or not path.is_file():
        return None
    return read_recipe(path).to_dict()


def _absolute_data(location: str | Path) -> str:
    """Return the absolute path of data. A built-in data set, a URL and what is missing stay."""
    text = str(location)
    if is_url(location):
        return text
    is_path = os.path.lexists(without_columns(text)) or PATTERN.search(text) is not None
    is_path = (is_path and not is_built_in(location)) or isinstance(location, Path)
    return str(Path(text).absolute()) if is_path else text


def _absolute_weights(location: str | Path) -> str:
    """Return the absolute path of weights. The name of a model, and what does not exist, stays."""
    is_path = os.path.lexists(location) and names.find_entry(location) is None
    return str(Path(location).absolute()) if is_path else str(location)


def other_recipe(lines: list[str], folder: Path, options: RunOptions) -> UsageError:
    """Return the error about values that differ from those of the run; see `differences`."""
    run = folder if options.resume in (None, "auto") else Path(str(options.resume))
    return UsageError(
        "the run was begun with another recipe",
        f"to continue it with its own: {resume_command(run)}; to train with another, begin a new "
        "run with --init-from",
        lines,
    )


def default_folder(recipe: str | Path | None, resume: str | None = None) -> Path:
    """Return the folder of a run that has no name: `runs/RECIPE`, or without a recipe the folder
    of the run to resume.

    Raises:
        UsageError: There is no recipe, and no path of a run.
    """
    if recipe is not None:
        return Path("runs") / Path(recipe).stem
    if resume in (None, "auto"):
        raise UsageError(
            "no recipe", "name a model or a .yaml file, or continue a run: --resume FOLDER"
        )
    path = Path(str(resume))
    is_checkpoint = (path / META).is_file() and path.parent.name == checkpoint.FOLDER
    return path.parent.parent if is_checkpoint else path


def resume_command(
    folder: Path,
    options: RunOptions | None = None,
    world: World | None = None,
    recipe: Recipe | None = None,
) -> str:
    """Return the command that continues a run.

    Args:
        folder: The folder of the run, or a checkpoint.
        options, world: How the run is carried out, if that is to stay the same.
        recipe: Its recipe. What the caller has named of its URLs is named again, because they may
            lead into private networks only then.
    """
    words = ["hiera", "train", "--resume", str(folder)]
    if world is not None and world.size > 1:
        count = os.environ.get("LOCAL_WORLD_SIZE", str(world.size))
        words[:1] = ["torchrun", "--nproc-per-node", count, "-m", "hiera_cli"]
    if options is not None:
        words += [] if options.workers is None else ["-j", str(options.workers)]
        words += ["--parallel", options.parallel] if options.parallel != "ddp" else []
        flags = ("compile", "tensorboard", "blocking_saves")
        words += [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name)]
        words += ["--private-urls"] if options.private_urls else _named_again(options, recipe)
        words += [word for name in options.track for word in ("--track", name)]
    if world is not None and world.device.type != select_device().type:
        words += ["--device", str(world.device)]
    return shlex.join(words)


def _named_again(options: RunOptions, recipe: Recipe | None) -> list[str]:
    """Return the options that name those URLs of a recipe that the caller has named. The weights to
    start from are not read again."""
    values = {} if recipe is None else flatten(recipe.to_dict())
    values.pop("init_from", None)
    named = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if isinstance(value, str) and value in options.named_urls and names_server(value)
    ]
    return [word for setting in named for word in ("--set", setting)]
