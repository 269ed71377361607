"""Write features to one file, or to a folder of shards, where an interrupted run can resume.

A file holds an array [inputs, *shape] for each feature. Its metadata holds the names and indices of
the inputs, the shapes, and the settings that the features were computed with; see
`feature_formats`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError, UsageError
from ..records import Kind, Record
from . import feature_formats

SHARD_INPUTS = 1000  # maximum number of inputs in a shard
SHARD_BYTES = 64 << 20  # size above which a shard is written before it is full
SHARD_NAME = re.compile(r"(image|video)-(\d{5,})")


@dataclass
class _Shard:
    """Features that have not been written yet, a row for each input."""

    path: Path
    model: str
    inputs: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    rows: list[feature_formats.Arrays] = field(default_factory=list)
    size: int = 0  # bytes


class FeatureStore:
    """Writes the features of records to files, each file atomically. Use it in a `with` block.

    Args:
        path: A file with an extension in `feature_formats.FORMATS`, or a folder. A single file is
            written at the end of the block, so its features are held in memory until then. A folder
            gets shards `image-00000.safetensors`, `video-00000.safetensors` and so on.
        save_as: Format of the shards: safetensors, npz or parquet.
        settings: What the features depend on. A folder can be resumed with the same settings only.
        shard_inputs: Maximum number of inputs in a shard.
        resume: Continue the folder of an interrupted run.

    Raises:
        UsageError: The format needs a package that is not installed. When resuming: the folder has
            other settings, or a shard cannot be read.
    """

    def __init__(
        self,
        path: Path,
        save_as: str = "safetensors",
        *,
        settings: dict[str, Any] | None = None,
        shard_inputs: int = SHARD_INPUTS,
        resume: bool = False,
    ) -> None:
        self.path, self.settings, self.shard_inputs = path, settings or {}, shard_inputs
        self.is_file = path.suffix in feature_formats.FORMATS
        self.format = path.suffix.removeprefix(".") if self.is_file else save_as
        feature_formats.check_format(self.format)
        self._open: dict[Kind, _Shard] = {}
        self._next_numbers: dict[str, int] = {}  # of shards, by kind
        self._done: dict[tuple[int, str], dict[str, Any]] = {}  # by index and name of the input
        if resume:
            self._read_shards()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        """Write all features that were added, even if an error ends the block."""
        for kind in list(self._open):
            self._write(kind)

    def add(self, record: Record) -> None:
        """Add the features of a record, and store their location as `file` in its `extra`.

        Raises:
            InputError: A single file holds features of images, and this is a video, or vice versa.
            OutputError: A shard is full, and cannot be written.
        """
        kind = record.kind
        if self.is_file and self._open and kind not in self._open:
            raise InputError(
                f"{self.path.name} holds features of {next(iter(self._open))}s, and this is a "
                f"{kind}",
                "name a folder to write to",
            )
        row = {name: values.numpy().copy() for name, values in record.result.items()}
        size = sum(values.nbytes for values in row.values())
        shard = self._open.get(kind)
        if shard is not None and not self.is_file:
            is_full = len(shard.rows) >= self.shard_inputs
            if is_full or (shard.rows and shard.size + size > SHARD_BYTES):
                self._write(kind)
                shard = None
        if shard is None:
            shard = self._open[kind] = _Shard(self._next_path(kind), record.model)
        record.extra["file"] = {"name": str(shard.path), "row": len(shard.rows)}
        shard.inputs.append(record.input)
        shard.indices.append(record.index)
        shard.rows.append(row)
        shard.size += size

    def find(self, name: str, index: int) -> dict[str, Any] | None:
        """Return what an earlier run wrote for an input: `kind`, `model`, `shapes` and `file`.

        Args:
            name: Name of the input.
            index: Its position among the inputs.

        Returns:
            A dictionary, or None if the input is not finished.
        """
        return self._done.get((index, name))

    def _next_path(self, kind: Kind) -> Path:
        if self.is_file:
            return self.path
        number = self._next_numbers.get(kind, 0)
        self._next_numbers[kind] = number + 1
        return self.path / f"{kind}-{number:05}.{self.format}"

    def _write(self, kind: Kind) -> None:
        """Write the open shard of a kind.

        Raises:
            OutputError: The disk is full, or the folder cannot be written.
        """
        shard = self._open.pop(kind)
        stacked = {name: np.stack([row[name] for row in shard.rows]) for name in shard.rows[0]}
        metadata = {
            "inputs": shard.inputs,
            "indices": shard.indices,
            "kind": kind,
            "model": shard.model,
            "shapes": {name: list(array.shape[1:]) for name, array in stacked.items()},
            "settings": self.settings,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.is_file:
                self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be created ({error.strerror})") from error
        feature_formats.write(shard.path, stacked, metadata)

    def _read_shards(self) -> None:
        """Read which inputs the shards of an earlier run contain.

        Raises:
            UsageError: A shard was made with other settings, or cannot be read.
        """
        for path in sorted(self.path.glob(f"*.{self.format}")):
            match = SHARD_NAME.fullmatch(path.stem)
            if match is None:
                continue
            kind, number = match[1], int(match[2])
            self._next_numbers[kind] = max(self._next_numbers.get(kind, 0), number + 1)
            metadata = feature_formats.read_metadata(path)
            if metadata["settings"] != self.settings:
                raise UsageError(
                    f"{path} was made with {_describe(metadata['settings'])}, not "
                    f"{_describe(self.settings)}",
                    "resume with the same options, or write to another folder",
                )
            inputs = zip(metadata["indices"], metadata["inputs"], strict=True)
            for row, (index, name) in enumerate(inputs):
                self._done[index, name] = {
                    **{key: metadata[key] for key in ("kind", "model", "shapes")},
                    "file": {"name": str(path), "row": row},
                }


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "no settings"
