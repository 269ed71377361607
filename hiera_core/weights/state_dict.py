"""Find the weights of a Hiera in what a checkpoint file holds.

Trainers put the state dict into dictionaries, beside the state of the optimizer, and wrappers (DDP,
FSDP, torch.compile, Lightning, averages of weights) put prefixes before the names of parameters.
The patch embedding, which every Hiera has once, shows where the weights are. Importing this module
does not import torch.
"""

from __future__ import annotations

import argparse
import collections
import logging
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

log = logging.getLogger("hiera")
T = TypeVar("T")

# The patch embedding's weight: the name in the reference and timm, and those in transformers, of
# Hiera and of SAM 2.
ANCHORS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "patch_embed.projection.weight",
)
# transformers puts the encoder of a model with a head or decoder under this name.
TRANSFORMERS_ENCODER = "hiera."
# Parts that wrappers insert anywhere in a name: torch.compile, FSDP, activation checkpointing,
# DeepSpeed.
WRAPPER_PARTS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
# Keys under which a file may hold the weights; the first of these that it has is used.
STATE_KEYS = ("model_state", "state_dict", "model", "state_dict_ema", "model_ema")
# Words in the names of second copies of a model: averages, and networks that give targets.
COPIES = ("ema", "avg", "average", "teacher", "target", "momentum")
MAX_DEPTH = 5  # of nested dictionaries


class IgnoredValue:
    """Stands for an object in a pickle. It takes what the pickle gives it, and keeps nothing.

    A few bytes of a file could otherwise make the object's own code follow a pointer, or allocate
    any amount of memory. No weights are lost, because those are tensors.
    """

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class NumPyValue(IgnoredValue):
    """Stands for a NumPy object."""


class IgnoredList(list[Any]):
    """Stands for a list of another type, and keeps nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


# Values that settings of a trainer hold: of Python, and of OmegaConf (Hydra, Lightning).
IGNORED = (
    *("builtins." + name for name in "frozenset range slice int float bool str".split()),
    *("datetime." + name for name in "date datetime time timedelta timezone".split()),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "zoneinfo.ZoneInfo._unpickle"),
    *("typing." + name for name in "Any Dict List Tuple Optional".split()),
    *("omegaconf." + name for name in "dictconfig.DictConfig listconfig.ListConfig".split()),
    *("omegaconf.base." + name for name in "Metadata ContainerMetadata".split()),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in "Any String Integer Float Boolean Bytes Path Enum".split()
    ),
)


def safe_types() -> list[Any]:
    """Return types that trainers save beside the weights, and that do nothing but hold values.

    They are for `torch.serialization.safe_globals`; a pair is a type and the name that stands in
    the file. Paths become pure paths, because a path of another system cannot be built. NumPy's
    objects become a `NumPyValue`, and those of `IGNORED` an `IgnoredValue`.
    """
    import numpy as np

    found: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        collections.defaultdict,
    ]
    numpy_names = ["dtype", "ndarray", *(f"dtypes.{name}" for name in np.dtypes.__all__)]
    for module in ("core.multiarray", "_core.multiarray"):  # before and since NumPy 2
        numpy_names += [f"{module}.scalar", f"{module}._reconstruct"]
    found += [(NumPyValue, f"numpy.{name}") for name in numpy_names]
    found += [(IgnoredValue, name) for name in IGNORED]
    found.append((IgnoredList, "collections.deque"))
    for module in ("pathlib", "pathlib._local"):  # before and since Python 3.13
        for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
            for name in (pure.__name__, pure.__name__.removeprefix("Pure")):
                found.append((pure, f"{module}.{name}"))
    return found


def find_state_dict(loaded: Any) -> Mapping[Any, Any] | None:
    """Return the dictionary of weights in what was loaded; None if there is no dictionary.

    A dictionary with a patch embedding is taken for it. If there are several, that is the one under
    the first of `STATE_KEYS`, else one that is no average or teacher, else the first. Without any,
    it is the one under the first of `STATE_KEYS`, so that messages speak of its names.
    """
    if not isinstance(loaded, Mapping):
        return None
    found = list(_dictionaries(loaded, (), set()))
    holding = [(path, state) for path, state in found if _has_anchor(state)]
    if holding:
        path, state = min(holding, key=lambda item: _rank(item[0]))
        if len(holding) > 1:
            log.info("weights are taken from %s", ".".join(map(str, path)) or "the file itself")
        return dict(state)
    named = [state for path, state in found if len(path) == 1 and path[0] in STATE_KEYS]
    return min(named, key=lambda state: _key_rank(loaded, state)) if named else loaded


def unwrap_names(state: Mapping[str, T]) -> dict[str, T]:
    """Remove what wrappers put before and into the names of parameters.

    `module._orig_mod.blocks.0.norm1.weight` -> `blocks.0.norm1.weight`

    If the names of a Hiera begin with a prefix, such as `model.` or `backbone.`, parameters without
    that prefix are those of something else, such as a loss. They are left out, and logged.
    """
    cleaned = {_without_wrapper_parts(name): value for name, value in state.items()}
    prefixes = {_prefix(name, anchor) for name in cleaned for anchor in ANCHORS}
    prefixes.discard(None)
    if not prefixes or "" in prefixes:
        return cleaned
    prefix = min((p for p in prefixes if p is not None), key=lambda p: (_is_copy([p]), len(p)))
    kept = {n.removeprefix(prefix): v for n, v in cleaned.items() if n.startswith(prefix)}
    others = [name for name in cleaned if not name.startswith(prefix)]
    if others:
        log.info(
            "not used, because they are beside %s*: %d of the tensors (%s%s)",
            prefix,
            len(others),
            ", ".join(others[:3]),
            ", ..." if len(others) > 3 else "",
        )
    return kept


def _dictionaries(
    value: Mapping[Any, Any], path: tuple[Any, ...], visited: set[int]
) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """Yield (keys, dictionary) of a dictionary and all dictionaries in it, outer ones first.

    `visited` holds the ids of those that were yielded: a dictionary may contain itself.
    """
    visited.add(id(value))
    yield path, value
    if len(path) < MAX_DEPTH:
        for key, item in value.items():
            if isinstance(item, Mapping) and id(item) not in visited:
                yield from _dictionaries(item, (*path, key), visited)


def _has_anchor(state: Mapping[Any, Any]) -> bool:
    import torch

    return any(
        isinstance(value, torch.Tensor) and _without_wrapper_parts(str(name)).endswith(ANCHORS)
        for name, value in state.items()
    )


def _rank(path: tuple[Any, ...]) -> tuple[bool, int, int]:
    known = [STATE_KEYS.index(key) for key in path if key in STATE_KEYS]
    return _is_copy(path), min(known, default=len(STATE_KEYS)), len(path)


def _key_rank(loaded: Mapping[Any, Any], state: Mapping[Any, Any]) -> int:
    return min(STATE_KEYS.index(k) for k, v in loaded.items() if v is state and k in STATE_KEYS)


def _is_copy(path: Iterable[Any]) -> bool:
    """Return whether keys or prefixes name a second copy of a model: `model_ema`, `teacher.`."""
    words = {word for key in path for word in str(key).lower().replace(".", "_").split("_")}
    return not words.isdisjoint(COPIES)


def _without_wrapper_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def _prefix(name: str, anchor: str) -> str | None:
    """Return what stands before the names of a Hiera, if this is its patch embedding."""
    before = name.removesuffix(anchor)
    if before == name or (before and not before.endswith(".")):
        return None
    return before.removesuffix(TRANSFORMERS_ENCODER) if anchor == ANCHORS[1] else before
