"""meta.json of a checkpoint: what it holds, and checks of a file that somebody else may have sent.

A checkpoint is two files without code: meta.json, and state.safetensors with the tensors. Nothing
else in its folder is read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...weights import files

META, STATE = "meta.json", "state.safetensors"
FORMAT = 1  # increases when older versions could not read a checkpoint
MAX_BYTES = 64 << 20  # of meta.json; the names of 100,000 classes take 2 MB
# A checkpoint of PyTorch (also those that versions before November 2026 wrote) is made of pickles,
# which can run code when they are read.
PICKLES = (".distcp", ".pkl", ".pickle", ".pth", ".pt", ".bin", ".ckpt", ".joblib")
TORCH_METADATA = ".metadata"

REQUIRED: dict[str, type] = {
    "step": int,  # number of steps that are done
    "recipe": dict,
    "card": dict,  # contents of hiera.json
    "data": str,  # fingerprint of the training data
    "seen": int,  # views since the start of the run
    "unread": int,  # unreadable ones among them
    "scaler": dict,  # state of the loss scaler; empty if there is none
    "sha256": str,  # of state.safetensors
}
# The measurements in meta.json. A value that is not finite is null.
MEASUREMENTS = ("epoch", "loss", "unreadable", "val", "probe")


def read_meta(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's meta.json, checked.

    Args:
        path: Folder of the checkpoint.

    Raises:
        CheckpointError: The checkpoint is in another format, or meta.json is damaged.
    """
    file = path / META
    try:
        _refuse_pickles(path)
        size = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if size > MAX_BYTES:
        raise CheckpointError(f"{file} is too large to be a checkpoint's", "get it again")
    meta = files.read_json(file)
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {meta.get('format')!r}, and this version reads {FORMAT}",
            "resume with the version of hiera-toolkit that wrote it",
        )
    for key, kind in REQUIRED.items():
        value = meta.get(key)
        is_valid = isinstance(value, kind) and not isinstance(value, bool)
        if not is_valid or (isinstance(value, int) and value < 0):
            raise _unusable(file, key)
    for key in MEASUREMENTS:
        values = meta.get(key)
        groups = ("val", "probe")
        for value in values.values() if key in groups and isinstance(values, dict) else [values]:
            if not (value is None or _is_finite(value)):
                raise _unusable(file, key)
    if not (meta.get("best") is None or _is_finite(meta["best"])):
        raise _unusable(file, "best")
    if not _are_rows(meta.get("rows", []), meta["step"]):
        raise _unusable(file, "rows")
    _check_card(file, meta["card"])
    return meta


def _are_rows(rows: object, step: int) -> bool:
    """Return whether a value can be the statistics of steps that were not reported: four numbers
    for each, null if one is not finite."""
    return (
        isinstance(rows, list)
        and len(rows) <= step
        and all(
            isinstance(row, list) and len(row) == 4 and all(v is None or _is_finite(v) for v in row)
            for row in rows
        )
    )


def _refuse_pickles(path: Path) -> None:
    """Refuse a checkpoint with pickles in it, although nothing would read them.

    Raises:
        CheckpointError: The folder holds a pickle.
    """
    for file in sorted(path.iterdir()):
        if file.name == TORCH_METADATA or file.suffix.lower() in PICKLES:
            raise CheckpointError(
                f"{file} is a pickle, which can run code; nothing of {path} was read",
                "begin a new run, with --init-from and the model.safetensors of the old one",
            )


def _check_card(file: Path, card: dict[str, Any]) -> None:
    """Check the parts of a model's card that training uses.

    Raises:
        CheckpointError: A part has the wrong type.
    """
    if not isinstance(card.get("preprocessing", {}), dict):
        raise _unusable(file, "card.preprocessing")
    classes = card.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _unusable(file, "card.classes")


def _unusable(file: Path, key: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key} is missing or not usable", "the file is damaged")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False
