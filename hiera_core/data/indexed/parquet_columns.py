"""Which columns of a Parquet file hold images and labels, as the Hugging Face Hub writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, did_you_mean

METADATA = b"huggingface"  # key in the metadata of a schema
IMAGE_TYPES = ("Image", "Video")
IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "jpg", "png", "webp", "video")
LABEL_NAMES = ("label", "labels", "class", "class_id", "class_name", "category", "target", "cls")
BYTES, PATH = "bytes", "path"  # fields of a struct that holds an image


@dataclass(frozen=True)
class Columns:
    """Columns of a data set.

    Attributes:
        image: Column of the images.
        label: Column of the labels; None if they are not needed.
        classes: Names of the classes, if labels are numbers of these.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def find_columns(
    schema: Any, labelled: bool, image: str | None = None, label: str | None = None
) -> Columns:
    """Return the columns that hold images and labels.

    What the data set says itself (its `huggingface` metadata) counts first, then the types and the
    usual names. Where two columns could be the one that is looked for, nothing is guessed.

    Args:
        schema: The `pyarrow.Schema`.
        labelled: Whether labels are needed.
        image, label: Names of the columns, if the user has named them.

    Raises:
        UsageError: There is no such column, or there are several. The message names no file.
    """
    features = _features(schema)
    names: list[str] = schema.names
    declared = [n for n in names if _type_of(features.get(n)) in IMAGE_TYPES]
    possible = [n for n in names if holds_bytes(schema.field(n).type)]
    image = _choose("image", image, names, declared, possible, IMAGE_NAMES)
    if not holds_bytes(schema.field(image).type):
        raise UsageError(
            f"column {image!r} holds no encoded images",
            "store them as bytes; for paths and labels, write a .csv list",
        )
    if not labelled:
        return Columns(image, None, None)
    declared = [n for n in names if _type_of(features.get(n)) == "ClassLabel"]
    possible = [n for n in names if n != image and n in LABEL_NAMES]
    label = _choose("label", label, names, declared, possible, LABEL_NAMES)
    classes = features.get(label, {}).get("names") if label in declared else None
    if not _is_list_of_names(classes):
        classes = None
    return Columns(image, label, None if classes is None else tuple(classes))


def _choose(
    what: str,
    wanted: str | None,
    names: Sequence[str],
    declared: Sequence[str],
    possible: Sequence[str],
    usual: Sequence[str],
) -> str:
    """Return the name of a column: the one that the user wants, the only one that is declared, or
    the only one that is possible, with a usual name if there are several."""
    if wanted is not None:
        if wanted not in names:
            hint = did_you_mean(wanted, names) or f"there are {', '.join(names)}"
            raise UsageError(f"no column {wanted!r}", hint)
        return wanted
    found = declared or possible
    if len(found) > 1:
        named = [name for name in usual if name in found]
        found = named[:1] if len(named) == 1 or (not declared and named) else found
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"several columns may hold the {what}s ({', '.join(found)})",
            f"name it: ?{what}={found[0]} behind the name of the data",
        )
    raise UsageError(
        f"no column holds {what}s ({', '.join(names)})",
        f"name it: ?{what}=COLUMN behind the name of the data",
    )


def _features(schema: Any) -> dict[str, Any]:
    """Return what the data set says about its columns; empty if it says nothing."""
    text = (schema.metadata or {}).get(METADATA)
    try:
        features = json.loads(text or b"{}")["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _type_of(feature: dict[str, Any] | None) -> object:
    return (feature or {}).get("_type")


def holds_bytes(kind: Any) -> bool:
    """Return whether a type of Arrow is binary, or a struct with a binary field `bytes`."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index(BYTES)
        return index >= 0 and holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and bool(value)
