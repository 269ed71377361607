"""Class names. ImageNet-1k's and Kinetics-400's come from torchvision's weight metadata."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..errors import UsageError


@functools.cache
def class_names(classes: str) -> tuple[str, ...]:
    """Names of a label set, by class number: `imagenet1k` (1000) or `kinetics400` (400)."""
    attribute = {"imagenet1k": "_IMAGENET_CATEGORIES", "kinetics400": "_KINETICS400_CATEGORIES"}
    names = getattr(_metadata(), attribute[classes], None)
    return tuple(names if names is not None else _from_public_api(classes))


def for_classes(num_classes: int, known: Sequence[str] | None = None) -> Sequence[str] | None:
    """Names for a model with so many classes: its own, else the set of that size, else none."""
    if known is not None and len(known) == num_classes:
        return known
    sets = {1000: "imagenet1k", 400: "kinetics400"}
    return class_names(sets[num_classes]) if num_classes in sets else None


def read_labels(path: str | Path) -> list[str]:
    """One name a line.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"labels {path} cannot be read ({error})") from error


def _metadata() -> ModuleType | None:
    """torchvision's list of names alone: importing torchvision takes seconds, this takes none."""
    package = importlib.util.find_spec("torchvision")
    for root in (package.submodule_search_locations or []) if package else []:
        path = Path(root) / "models" / "_meta.py"
        if path.is_file():
            spec = importlib.util.spec_from_file_location("_torchvision_meta", path)
            if spec and spec.loader:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


def _from_public_api(classes: str) -> list[str]:
    from torchvision import models

    weights = {
        "imagenet1k": lambda: models.ResNet50_Weights.DEFAULT,
        "kinetics400": lambda: models.video.MViT_V2_S_Weights.DEFAULT,
    }
    names: list[str] = weights[classes]().meta["categories"]
    return names
