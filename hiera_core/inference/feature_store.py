"""Features on disk: one file, or a folder of shards that an interrupted run can go on with.

A file holds, by feature name, one array [inputs, *shape], and in its metadata the inputs' names and
places, the shapes, and the settings they were made with; see `arrays.read`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError, UsageError
from ..records import Kind, Record
from . import feature_files

SHARD_INPUTS = 1000  # in a shard, at most
SHARD_BYTES = 64 << 20  # and about so large
SHARD_NAME = re.compile(r"(image|video)-(\d{5,})")


@dataclass
class _Shard:
    """Rows that wait for their file."""

    path: Path
    model: str
    inputs: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    rows: list[feature_files.Arrays] = field(default_factory=list)
    size: int = 0  # bytes


class FeatureStore:
    """Takes features and writes them, whole files only.

    Args:
        path: a file with one of the endings of `arrays.FORMATS` (all its inputs are held until the
            end), or a folder for shards `image-00000.safetensors`, `video-00000.safetensors`, ...
        save_as: format of the shards: safetensors, npz or parquet.
        settings: what the features depend on; a folder takes those of one setting only.
        shard_inputs: how many inputs a shard holds, at most.
        resume: go on with the folder of an interrupted run.

    Raises:
        UsageError: a format that needs a package that is missing; a folder made with other
            settings, or with a shard that cannot be read.
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
        self.is_file = path.suffix in feature_files.FORMATS
        self.format = path.suffix.removeprefix(".") if self.is_file else save_as
        feature_files.check_format(self.format)
        self._open: dict[Kind, _Shard] = {}
        self._count: dict[str, int] = {}
        self._done: dict[tuple[int, str], dict[str, Any]] = {}
        if resume:
            self._read_done()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        """Rows are whole inputs: what there is is written, also when a run is interrupted."""
        for kind in list(self._open):
            self._write(kind)

    def add(self, record: Record) -> None:
        """Take a record's features; its `extra` says where they go.

        Raises:
            InputError: a file for pictures and a video, or the other way round.
            OutputError: a shard is full and cannot be written.
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
            full = len(shard.rows) >= self.shard_inputs
            if full or (shard.rows and shard.size + size > SHARD_BYTES):
                self._write(kind)
                shard = None
        if shard is None:
            shard = self._open[kind] = _Shard(self._next_path(kind), record.model)
        record.extra["file"] = {"name": str(shard.path), "row": len(shard.rows)}
        shard.inputs.append(record.input)
        shard.indices.append(record.index)
        shard.rows.append(row)
        shard.size += size

    def known(self, name: str, index: int) -> dict[str, Any] | None:
        """What an earlier run wrote of an input: `kind`, `model`, `shapes`, `file`."""
        return self._done.get((index, name))

    def _next_path(self, kind: Kind) -> Path:
        if self.is_file:
            return self.path
        number = self._count.get(kind, 0)
        self._count[kind] = number + 1
        return self.path / f"{kind}-{number:05}.{self.format}"

    def _write(self, kind: Kind) -> None:
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
            raise OutputError(f"{self.path} cannot be made ({error.strerror})") from error
        feature_files.write(shard.path, stacked, metadata)

    def _read_done(self) -> None:
        for path in sorted(self.path.glob(f"*.{self.format}")):
            match = SHARD_NAME.fullmatch(path.stem)
            if match is None:
                continue
            kind, number = match[1], int(match[2])
            self._count[kind] = max(self._count.get(kind, 0), number + 1)
            metadata = feature_files.read_metadata(path)
            if metadata["settings"] != self.settings:
                raise UsageError(
                    f"{path} was made with {_said(metadata['settings'])}, not "
                    f"{_said(self.settings)}",
                    "resume with the same options, or write to another folder",
                )
            for row, place in enumerate(zip(metadata["indices"], metadata["inputs"], strict=True)):
                self._done[place] = {
                    **{key: metadata[key] for key in ("kind", "model", "shapes")},
                    "file": {"name": str(path), "row": row},
                }


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "no settings"
