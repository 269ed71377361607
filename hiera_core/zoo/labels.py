"""Class names of ImageNet-1k and Kinetics-400, and of files with one name per line.

class_names.json holds the names as torchvision's weights list them (`meta["categories"]`), and the
WordNet IDs of ImageNet-1k, which are in the order of its classes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError, first_line

MAX_LABELS_BYTES = 64 << 20
LABEL_SETS = {1000: "imagenet1k", 400: "kinetics400"}  # by number of classes


def class_names(classes: str) -> tuple[str, ...]:
    """Return the names of `imagenet1k`, `imagenet1k_wnids` or `kinetics400`, in the order of class
    indices."""
    return _label_sets()[classes]


def for_classes(num_classes: int, known: Sequence[str] | None = None) -> Sequence[str] | None:
    """Return class names for a model.

    Args:
        num_classes: Number of classes of the model.
        known: The model's own names. They are ignored if their number differs.

    Returns:
        The model's own names, else those of the label set with the same number of classes,
        else None.
    """
    if known is not None and len(known) == num_classes:
        return known
    return class_names(LABEL_SETS[num_classes]) if num_classes in LABEL_SETS else None


def read_labels(path: str | Path) -> list[str]:
    """Read class names from a file with one name per line.

    Raises:
        UsageError: The file cannot be read, or is not a text file.
    """
    try:
        text = _read_text(Path(path))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        hint = "give a text file with one class name per line"
        raise UsageError(f"labels {path} cannot be read ({reason})", hint) from error
    return text.splitlines()


def _read_text(path: Path) -> str:
    """Read a file. Devices can be endless and pipes can wait for ever, so these are refused.

    Raises:
        OSError, ValueError: It cannot be read, or is not a text file of a usual size.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > MAX_LABELS_BYTES:
        raise ValueError("it is too large")
    text = path.read_text(encoding="utf-8")
    if "\0" in text:
        raise ValueError("it is not a text file")
    return text


@functools.cache
def _label_sets() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("class_names.json").read_text(encoding="utf-8")
    return {name: tuple(names) for name, names in json.loads(text).items()}
