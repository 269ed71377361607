"""Find the files of a checkpoint that the user names by its path."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from . import names
from .download import FetchedFiles
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
    return FetchedFiles(path, *_find_config_and_card(path)) if path.is_file() else None


def _find_in_folder(folder: Path) -> FetchedFiles:
    """Return the weights file of a folder: one with a usual name, or the only one."""
    usual = [folder / name for name in names.WEIGHT_NAMES]
    others = sorted(p for p in folder.iterdir() if p.suffix in names.FILE_ENDINGS)
    for path in usual + (others if len(others) == 1 else []):
        if path.is_file():
            return FetchedFiles(path, *_find_config_and_card(path))
    raise CheckpointError(
        f"{folder} holds no {' or '.join(names.WEIGHT_NAMES)}", "name the file itself"
    )


def _find_config_and_card(path: Path) -> tuple[Path | None, Path | None]:
    """Return the config.json and the hiera.json next to a weights file, if they exist.

    They belong to the weights only if the file has one of the usual names, such as
    model.safetensors.
    """
    if path.name not in names.WEIGHT_NAMES:
        return None, None
    paths = [path.with_name(name) for name in ("config.json", "hiera.json")]
    config, card = (p if p.is_file() else None for p in paths)
    return config, card
