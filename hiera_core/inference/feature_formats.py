"""Read and write files of named arrays with metadata, as safetensors, npz or parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..atomic import atomic_file
from ..errors import UsageError
from ..weights.files import as_os_error

Arrays = dict[str, np.ndarray]
Metadata = dict[str, Any]


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read the features of a file or shard.

    Returns:
        Tensors [inputs, *shape] by the name of the feature, and the names of the inputs.

    Raises:
        UsageError: The file is damaged, or not a file of features.
    """
    path = Path(path)
    metadata = read_metadata(path)
    arrays = FORMATS[path.suffix.lower()].read(path)
    return {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, metadata["inputs"]


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a file: `inputs`, `indices`, `kind`, `model`, `shapes`, `settings`.

    Raises:
        UsageError: The file is damaged, or not a file of features.
    """
    try:
        metadata = FORMATS[path.suffix.lower()].metadata(path)
        is_consistent = len(metadata["inputs"]) == len(metadata["indices"])
        if is_consistent and metadata["shapes"] and isinstance(metadata["settings"], dict):
            return metadata
    except Exception as error:  # readers raise many types on damaged files
        raise UsageError(
            f"{path} is damaged, or not a file of features ({type(error).__name__})", "remove it"
        ) from error
    raise UsageError(f"{path} holds no features", "remove it")


def write(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    """Write a file atomically, in the format of its extension.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        FORMATS[path.suffix.lower()].write(temporary, arrays, metadata)


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
    with path.open("rb") as opened, np.load(opened) as file:
        metadata: Metadata = json.loads(str(file["metadata"]))
    return metadata


def _write_parquet(path: Path, arrays: Arrays, metadata: Metadata) -> None:
    """Write a table with a row for each input.

    The columns are its name, its index, and for each feature a flat list of numbers. The shapes are
    in the metadata of the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    printable = [n.encode("utf-8", "backslashreplace").decode() for n in metadata["inputs"]]
    columns: dict[str, Any] = {"input": pa.array(printable), "index": pa.array(metadata["indices"])}
    for name, array in arrays.items():
        flat = pa.array(array.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, array[0].size)
    table = pa.table(columns).replace_schema_metadata({"hiera": json.dumps(metadata)})
    pq.write_table(table, path)


def _read_parquet(path: Path) -> Arrays:
    import pyarrow.parquet as pq

    table, shapes = pq.read_table(path), _parquet_metadata(path)["shapes"]
    return {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        for name, shape in shapes.items()
    }


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
