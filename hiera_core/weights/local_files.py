"""Find the files of a checkpoint that the user names by its path."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from . import names
from .download import CONFIG_NAMES, FetchedFiles
from .integrity import as_unreadable


def find_local(path: Path) -> FetchedFiles | None:
    """Return the files of a checkpoint; None if there is no file or folder of this name.

    Raises:
        CheckpointError: It is a folder without weights, or one that cannot be read.
    """
    if not names.exists(path):
        return None
    try:
        if path.is_dir():
            return _find_in_folder(path)
    except OSError as error:
        raise as_unreadable(path, error) from error
    return FetchedFiles(path, *_find_configs(path)) if path.is_file() else None


def _find_in_folder(folder: Path) -> FetchedFiles:
    """Return the weights file of a folder: one with a usual name, or the only one."""
    usual = [folder / name for name in names.WEIGHT_NAMES]
    others = sorted(p for p in folder.iterdir() if p.suffix in names.FILE_ENDINGS)
    for path in usual + (others if len(others) == 1 else []):
        if path.is_file():
            return FetchedFiles(path, *_find_configs(path))
    raise CheckpointError(
        f"{folder} holds no {' or '.join(names.WEIGHT_NAMES)}", "name the file itself"
    )


def _find_configs(path: Path) -> list[Path | None]:
    """Return config.json, hiera.json and preprocessor_config.json next to a weights file.

    They belong to the weights only if the file has one of the usual names, such as
    model.safetensors.
    """
    is_usual = path.name in names.WEIGHT_NAMES
    paths = [path.with_name(name) for name in CONFIG_NAMES if is_usual]
    return [p if p.is_file() else None for p in paths]
