"""Find the files of a checkpoint that the user names by its path, and read weights that are spread
over several files."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from . import files, names
from .download import CONFIG_NAMES, FetchedFiles
from .integrity import DamagedFile, as_unreadable

# What trainers save beside the weights.
STATE_OF_TRAINERS = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|sampler|random_states|rng_state|training_args|"
    r"dl_state_dict|custom_checkpoint)\b.*|.*(optim_states|_optimizer)\W.*"
)
DISTRIBUTED = ".distcp"  # ending of the files that torch.distributed.checkpoint writes
MAX_NAMED = 3  # files that a message names


def find_local(path: Path) -> FetchedFiles | None:
    """Return the files of a checkpoint; None if there is no file or folder of this name.

    Raises:
        CheckpointError: It is a folder without weights, one that cannot be read, or a part of
            weights in several files.
    """
    if not names.exists(path):
        return None
    try:
        if path.is_dir():
            return _find_in_folder(path)
    except OSError as error:
        raise as_unreadable(path, error) from error
    if names.PART.fullmatch(path.name):
        raise CheckpointError(
            f"{path} is one of several files with the weights", f"name the folder: {path.parent}"
        )
    return FetchedFiles(path, *_find_configs(path)) if path.is_file() else None


def find_description(path: Path) -> FetchedFiles | None:
    """Return config.json and what is beside it in a folder, with or without weights; None if this
    is no folder with a config.json."""
    configs = _configs_in(path)
    return None if configs[0] is None else FetchedFiles(path, *configs)


def read(
    path: Path, parts: Mapping[str, Path] = MappingProxyType({})
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a weights file, see `files.read`, or all files that an index lists.

    Args:
        path: The file, or the index.
        parts: Where files that an index lists are, by name. Others are beside the index.

    Raises:
        DamagedFile: The index is not valid, or lists tensors that its files do not hold.
        CheckpointError: See `files.read`.
    """
    if not path.name.endswith(names.INDEX_ENDING):
        return files.read(path)
    listed = files.read_weight_map(path)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(listed.values())):
        part = parts.get(name, path.with_name(name))
        if not (names.exists(part) and part.is_file()):
            raise CheckpointError(f"{path} lists {name}, which is not there", "get it, too")
        # A file may hold older values of tensors that the index expects in another one.
        tensors |= {k: v for k, v in files.read(part)[0].items() if listed.get(k, name) == name}
    if missing := sorted(set(listed) - set(tensors)):
        raise DamagedFile(path, f"lists {missing[0]}, which its files do not hold")
    return tensors, {}


def _find_in_folder(folder: Path) -> FetchedFiles:
    """Return the weights of a folder: a file or an index with a usual name, or the only file."""
    usual = [folder / name for name in names.USUAL_NAMES]
    others = list(_weights_in(folder))
    for path in usual + (others if len(others) == 1 else []):
        if path.is_file():
            return FetchedFiles(path, *_configs_in(folder))
    raise CheckpointError(
        f"{folder} holds no {' or '.join(names.WEIGHT_NAMES)}", _hint_about(folder)
    )


def _weights_in(folder: Path) -> Iterator[Path]:
    """Yield the files that may hold weights, in name order."""
    for path in sorted(folder.iterdir()):
        is_other = STATE_OF_TRAINERS.fullmatch(path.name) or names.PART.fullmatch(path.name)
        if path.name.endswith(names.FILE_ENDINGS) and not is_other and path.is_file():
            yield path


def _hint_about(folder: Path) -> str:
    """Return what to name in place of a folder: the weights in it, or in the folders within it."""
    quoted = shlex.quote(str(folder))
    if any(folder.glob(f"*{DISTRIBUTED}")):
        return (
            "it is a distributed checkpoint: make a file of it with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{quoted} model.pth`"
        )
    if all((folder / name).is_file() for name in ("recipe.yaml", "log.jsonl")):
        return f"it is a run that has not finished: `hiera train --resume {quoted}` continues it"
    found = list(_weights_in(folder))
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        with contextlib.suppress(OSError):  # a folder that may not be read is not what is meant
            found += _weights_in(inner)
    if not found:
        return "name the file itself"
    shown = [str(path.relative_to(folder)) for path in found[:MAX_NAMED]]
    more = ", ..." if len(found) > MAX_NAMED else ""
    return f"name the file itself: {', '.join(shown)}{more}"


def _find_configs(path: Path) -> list[Path | None]:
    """Return config.json, hiera.json and preprocessor_config.json next to a weights file.

    They belong to the weights only if the file has one of the usual names, such as
    model.safetensors.
    """
    is_usual = path.name in names.USUAL_NAMES
    return _configs_in(path.parent) if is_usual else [None] * len(CONFIG_NAMES)


def _configs_in(folder: Path) -> list[Path | None]:
    paths = [folder / name for name in CONFIG_NAMES]
    return [p if p.is_file() else None for p in paths]
