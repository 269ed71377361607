"""Read and write files of named arrays with metadata, as safetensors, npz or parquet."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..atomic import atomic_file
from ..errors import UsageError
from ..weights.files import as_os_error

TIMES = ("start", "end")  # of the segments of videos, in seconds
PLAIN = ".npy"  # ending of a file with one array and no metadata, which `read` does not read
Arrays = dict[str, np.ndarray]
Metadata = dict[str, Any]


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read the features of a file or shard.

    Returns:
        Tensors [rows, *shape] by the name of the feature, and the name of each row's input. An
        input has one row; a video that is split into segments has a row for each. `start` and `end`
        [rows] are then among the tensors, in seconds, float64.

    Raises:
        UsageError: The file is damaged, or not a file of features.
    """
    path = Path(path)
    metadata = read_metadata(path)
    arrays = FORMATS[path.suffix.lower()].read(path)
    return {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, metadata["inputs"]


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a file: `inputs`, `indices`, `occurrences`, `kind`, `model`, `shapes`
    and `settings`, for segments of videos `start` and `end`, and for inputs from a manifest `ids`.

    Raises:
        UsageError: The file is damaged, or not a file of features, or its format needs a package
            that is not installed.
    """
    if path.suffix.lower() == PLAIN:
        raise UsageError(f"{path} is a plain array without metadata", "read it with numpy.load")
    check_format(path.suffix.lower().removeprefix("."))
    try:
        metadata = FORMATS[path.suffix.lower()].metadata(path)
        # Files of earlier versions do not tell inputs of one name apart.
        metadata.setdefault("occurrences", _occurrences(metadata["inputs"]))
        is_usable = _is_usable(metadata)
    except Exception as error:  # readers raise many types on damaged files
        raise UsageError(
            f"{path} is damaged, or not a file of features ({type(error).__name__})", "remove it"
        ) from error
    if not is_usable:
        raise UsageError(f"{path} holds no features", "remove it")
    return metadata


def _occurrences(names: list[str]) -> list[int]:
    """Return for each name how often it comes before."""
    seen: Counter[str] = Counter()
    numbers = []
    for name in names:
        numbers.append(seen[name])
        seen[name] += 1
    return numbers


def _is_usable(metadata: Metadata) -> bool:
    """Return whether all values have the right types."""
    shapes, count = metadata["shapes"], len(metadata["inputs"])
    return (
        isinstance(metadata["inputs"], list)
        and all(isinstance(name, str) for name in metadata["inputs"])
        and all(_are_counts(metadata[key], count) for key in ("indices", "occurrences"))
        and metadata["kind"] in ("image", "video")
        and isinstance(metadata["model"], str)
        and isinstance(shapes, dict)
        and bool(shapes)
        and all(_are_counts(shape, len(shape)) for shape in shapes.values())
        and isinstance(metadata["settings"], dict)
        and (
            not any(name in metadata for name in TIMES)
            or all(_are_times(metadata[name], count) for name in TIMES)
        )
    )


def _are_counts(values: object, length: int) -> bool:
    """Return whether values are a list of whole numbers of that length, none of them negative."""
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) is int and value >= 0 for value in values)
    )


def _are_times(values: object, length: int) -> bool:
    """Return whether values are a list of numbers of that length."""
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) in (int, float) for value in values)
    )


def write(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    """Write a file atomically, in the format of its extension.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        FORMATS[path.suffix.lower()].write(temporary, arrays, metadata)


def write_plain(path: Path, array: np.ndarray) -> None:
    """Write one array as a `.npy` file, atomically.

    Raises:
        OutputError: See `write`.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def check_format(name: str) -> None:
    """Check that the package of a format is installed.

    Raises:
        UsageError: The package is not installed.
    """
    if name == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "parquet needs pyarrow, which is not installed",
                "pip install 'hiera-toolkit[parquet]', or --save-as safetensors",
            ) from error


# Formats ------------------------------------------------------------------------------------------


def _write_safetensors(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path, metadata={"format": "pt", "hiera": json.dumps(metadata)})
    except SafetensorError as error:
        raise as_os_error(error) from error


def _read_safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _safetensors_metadata(path: Path) -> Metadata:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata: Metadata = json.loads((file.metadata() or {})["hiera"])
    return metadata


def _write_npz(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays, metadata=np.array(json.dumps(metadata)))  # type: ignore[arg-type]


def _read_npz(path: Path) -> Arrays:
    with path.open("rb") as opened, np.load(opened) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def _npz_metadata(path: Path) -> Metadata:
    with zipfile.ZipFile(path) as archive:
        # NumPy does not compress it. A file that does may be a bomb.
        if archive.getinfo("metadata.npy").file_size > path.stat().st_size:
            raise ValueError("the metadata are larger than the file")
    with path.open("rb") as opened, np.load(opened) as file:
        metadata: Metadata = json.loads(str(file["metadata"]))
    return metadata


def _write_parquet(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    """Write a table.

    The columns are the name of each row's input, its index, its `id` in a manifest, `start` and
    `end` if there are any, and for each feature a flat list of numbers. The shapes are in the
    metadata of the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    printable = [n.encode("utf-8", "backslashreplace").decode() for n in metadata["inputs"]]
    columns: dict[str, Any] = {"input": pa.array(printable), "index": pa.array(metadata["indices"])}
    if "ids" in metadata:
        texts = any(isinstance(value, str) for value in metadata["ids"])
        ids = [v if v is None or not texts else str(v) for v in metadata["ids"]]
        columns["id"] = pa.array(ids)
    columns |= {name: pa.array(arrays[name]) for name in TIMES if name in arrays}
    for name in metadata["shapes"]:
        array = arrays[name]
        flat = pa.array(array.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, array[0].size)
    table = pa.table(columns).replace_schema_metadata({"hiera": json.dumps(metadata)})
    pq.write_table(table, path)


def _read_parquet(path: Path) -> Arrays:
    import pyarrow.parquet as pq

    table, shapes = pq.read_table(path), _parquet_metadata(path)["shapes"]
    arrays = {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        for name, shape in shapes.items()
    }
    times = [name for name in TIMES if name in table.column_names]
    return {**arrays, **{name: table[name].to_numpy() for name in times}}


def _parquet_metadata(path: Path) -> Metadata:
    import pyarrow.parquet as pq

    metadata: Metadata = json.loads(pq.read_schema(path).metadata[b"hiera"])
    return metadata


class Format(NamedTuple):
    """The functions that write and read files of one format."""

    write: Callable[[Path, Arrays, Metadata], None]
    read: Callable[[Path], Arrays]
    metadata: Callable[[Path], Metadata]


FORMATS = {
    ".safetensors": Format(_write_safetensors, _read_safetensors, _safetensors_metadata),
    ".npz": Format(_write_npz, _read_npz, _npz_metadata),
    ".parquet": Format(_write_parquet, _read_parquet, _parquet_metadata),
}
