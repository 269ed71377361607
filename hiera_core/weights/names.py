"""What the name of a model means: a model in the zoo, or the location of weights.

The same rule holds for every command and function that takes a model:

1. A name in the zoo, with or without one of its checkpoints, is that model. It stays that model if
   a file or folder has the same name.
2. Everything else is a location: a URL, a file or folder, or a hub repository. Text with a `/` or
   `\\` is never a name in the zoo, so `./hiera_base_224` is the folder of that name.

This module does not import torch, so that a mistyped name is reported at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import zoo
from ..errors import UsageError, check_type

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # in a folder or hub repository
INDEX_ENDING = ".index.json"  # of a file that lists the files over which weights are spread
USUAL_NAMES = tuple(name + ending for name in WEIGHT_NAMES for ending in ("", INDEX_ENDING))
# One of the files over which weights are spread; a single one is the whole.
PART = re.compile(r".+-\d{5}-of-(?!00001\b)\d{5}\.\w+")
WEIGHT_ENDINGS = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar")
FILE_ENDINGS = (*WEIGHT_ENDINGS, INDEX_ENDING)


def find_entry(name: str | Path) -> zoo.ModelEntry | None:
    """Return the zoo's entry for a name; None if it names a location.

    Args:
        name: What the user gave. A `Path` is always a location.

    Raises:
        UsageError: The name is empty, or neither a model in the zoo nor a location.
    """
    check_not_empty(name)
    if isinstance(name, Path):
        return None
    base, tag = zoo.split_tag(name)
    entry = zoo.models().get(base)
    if entry is not None and (tag is None or tag in entry.checkpoints):
        return entry
    return None if is_location(name) else zoo.get(base)


def is_in_zoo(name: str | Path) -> bool:
    """Return whether this names a model in the zoo, with or without a tag."""
    return isinstance(name, str) and zoo.split_tag(name)[0] in zoo.models()


def is_location(text: str | Path) -> bool:
    """Return whether this is a path, URL or hub repository, and not the name of a model."""
    return (
        isinstance(text, Path)
        or "/" in text
        or "\\" in text
        or text.endswith(FILE_ENDINGS)
        or exists(text)
    )


def exists(text: str | Path) -> bool:
    """Return whether there is a file or folder of this name.

    A name that the system does not allow, such as one that is too long, is the name of none.
    """
    try:
        return bool(str(text)) and Path(text).exists()
    except (OSError, ValueError):
        return False


def check_not_empty(name: str | Path) -> None:
    """Check that a name is not "", as a shell variable that is not set gives it. As a path, it
    would be the current folder.

    Raises:
        UsageError: It is.
    """
    check_type("the name of the model or checkpoint", name, (str, Path), "a text or a path")
    if not str(name).strip():
        raise UsageError(
            "the name of the model or checkpoint is empty",
            "give a name from `hiera models`, a file, folder, URL or hub repository",
        )
