"""Class names of ImageNet-1k and Kinetics-400, and of files with one name per line.

class_names.json holds the names as torchvision's weights list them (`meta["categories"]`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..text_file import read_text

LABEL_SETS = {1000: "imagenet1k", 400: "kinetics400"}  # by number of classes


def class_names(classes: str) -> tuple[str, ...]:
    """Return the class names of `imagenet1k` or `kinetics400`, in the order of class indices."""
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
        UsageError: The file cannot be read, or is empty.
    """
    names = read_text(Path(path), "labels").splitlines()
    if not names:
        raise UsageError(f"labels {str(path)!r} are empty", "write one class name per line")
    return names


@functools.cache
def _label_sets() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("class_names.json").read_text(encoding="utf-8")
    return {name: tuple(names) for name, names in json.loads(text).items()}
