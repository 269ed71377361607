"""Write features to one file, or to a folder of shards, where an interrupted run can resume.

A file holds an array [rows, *shape] for each feature. An input has one row; a video that is split
into segments has a row for each, and the file then also holds `start` and `end` [rows] in seconds.
The metadata of a file holds the name and index of each row's input, the shapes, and what the
features depend on: settings, weights, dtype, preprocessing; see `feature_formats`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..atomic import unfinished
from ..errors import InputError, OutputError, UsageError
from ..places.uploads import Upload
from ..plain_data import counted
from ..records import Kind, Record
from . import feature_formats, fingerprint
from .feature_formats import TIMES
from .features import BatchExtractor, FeatureExtractor
from .model_fingerprint import model_fingerprint

SHARD_INPUTS = 1000  # maximum number of inputs in a shard
SHARD_BYTES = 64 << 20  # size above which a shard is written before it is full
SHARD_NAME = r"(image|video)-(\d{5,})"
RESUME_HINT = "resume with the same options and weights, or write to another folder"


@dataclass
class _Rows:
    """The features of one input: one row, or one for each segment of a video."""

    name: str
    index: int
    occurrence: int  # number of earlier inputs of this name in the run
    values: feature_formats.Arrays  # [count, *shape]
    count: int
    id: str | int | None = None


@dataclass
class _Shard:
    """Features that have not been written yet."""

    path: Path
    model: str
    inputs: list[_Rows] = field(default_factory=list)
    rows: int = 0
    size: int = 0  # bytes


class FeatureStore:
    """Writes the features of records to files, each file atomically. Use it in a `with` block.

    Args:
        path: A file with an extension in `feature_formats.FORMATS`, or a folder. A single file is
            written at the end of the block, so its features are held in memory until then; if the
            block ends with an error, it is not written. A folder gets shards
            `image-00000.safetensors`, `video-00000.safetensors` and so on, and keeps the features
            that were added before an error.
        save_as: Format of the shards: safetensors, npz or parquet.
        settings: What the features depend on, besides the model. A folder can be resumed with the
            same settings only.
        shard_inputs: Maximum number of inputs in a shard.
        resume: Continue the folder of an interrupted run.
        hint: What to do if the folder was made in another way.
        prefix: Begins the names of the shards in a folder, `shard-00003-of-00016-`, where several
            processes write to it. Other shards are not looked at.
        overwrite: Remove the shards of an earlier run from the folder, unless it is resumed.
        upload: Sends each file to a remote place when it is complete; `path` is then its folder on
            this machine, or a file in it. A remote folder cannot be resumed.

    Raises:
        UsageError: The format needs a package that is not installed. When resuming: the folder has
            other settings or another format, or a shard cannot be read. When overwriting: a file
            has the name of a shard, and is none.
    """

    def __init__(
        self,
        path: Path,
        save_as: str = "safetensors",
        *,
        settings: dict[str, Any] | None = None,
        shard_inputs: int = SHARD_INPUTS,
        resume: bool = False,
        overwrite: bool = False,
        hint: str = RESUME_HINT,
        prefix: str = "",
        upload: Upload | None = None,
    ) -> None:
        self._hint, self._prefix, self._upload = hint, prefix, upload
        self._shard_name = re.compile(re.escape(prefix) + SHARD_NAME)
        self.path, self.settings, self.shard_inputs = path, settings or {}, shard_inputs
        self.is_file = path.suffix.lower() in feature_formats.FORMATS
        self.format = path.suffix.lower().removeprefix(".") if self.is_file else save_as
        feature_formats.check_format(self.format)
        self.is_stopped = False  # True if the run stops early, so that a single file is incomplete
        self._removes_shards = overwrite and not resume and not self.is_file
        self._open: dict[Kind, _Shard] = {}
        self._models: dict[Kind, dict[str, Any]] = {}
        self._next_numbers: dict[str, int] = {}  # of shards, by kind
        self._counts: Counter[str] = Counter()  # inputs so far, by name
        self._occurrences: dict[int, int] = {}  # by index, of inputs whose name was there before
        # What an earlier run wrote: for each kind, a shard and what it depends on; for each name
        # and occurrence of an input, its row.
        self._earlier: dict[Kind, tuple[Path, dict[str, Any]]] = {}
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        if resume:
            self._read_shards()
        if self._removes_shards:
            self._check_removable()

    def __enter__(self) -> FeatureStore:
        if self._removes_shards and self._upload is not None:
            self._remove_remote_shards(self._upload)
        elif self._removes_shards:
            try:
                for path in list(self._shards()):
                    path.unlink()
            except OSError as error:
                raise OutputError(f"{path} cannot be removed ({error.strerror})") from error
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        """Write what was added. If an error ends the block, a single file is not written."""
        if error is not None:
            error.add_note(self.stop())
        if self.is_file and self.is_stopped:
            return
        for kind in list(self._open):
            try:
                self._write(kind)
            except OutputError:
                if error is None:  # otherwise it would replace the first error
                    raise

    @contextlib.contextmanager
    def connected(self, extractor: FeatureExtractor) -> Iterator[None]:
        """Open the store, let the extractor skip what it has already, and note the models."""

        def note_model(runner: BatchExtractor) -> None:
            # With `every`, the model for images also computes the features of videos.
            is_for_all = extractor.sampling.every is not None
            kinds: tuple[Kind, ...] = ("image", "video") if is_for_all else (runner.kind,)
            facts = model_fingerprint(runner)
            for kind in kinds:
                self.use_model(kind, facts)

        extractor.on_model(note_model)
        extractor.find_done = self.find
        with self:
            yield

    def use_model(self, kind: Kind, facts: dict[str, Any]) -> None:
        """Set what the features of a kind depend on, see `model_fingerprint`.

        Raises:
            UsageError: The features of an earlier run, which is resumed, depend on something else.
        """
        if kind in self._earlier:
            path, earlier = self._earlier[kind]
            fingerprint.check_same(path, earlier, facts, self._hint)
        self._models[kind] = facts

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
        values = {name: value.numpy().copy() for name, value in record.result.items()}
        is_split = "start" in values
        if not is_split:
            values = {name: value[None] for name, value in values.items()}
        count = len(next(iter(values.values())))
        size = sum(value.nbytes for value in values.values())
        shard = self._open.get(kind)
        if shard is not None and not self.is_file:
            is_full = len(shard.inputs) >= self.shard_inputs
            if is_full or (shard.inputs and shard.size + size > SHARD_BYTES):
                self._write(kind)
                shard = None
        if shard is None:
            shard = self._open[kind] = _Shard(self._next_path(kind), record.model)
        name = self._name_of(shard.path)
        record.extra["file"] = _location(name, shard.rows, count if is_split else None)
        occurrence = self._occurrences.pop(record.index, 0)
        shard.inputs.append(_Rows(record.input, record.index, occurrence, values, count, record.id))
        shard.rows += count
        shard.size += size

    def find(self, name: str, index: int) -> dict[str, Any] | None:
        """Return what an earlier run wrote for an input: `kind`, `model`, `shapes`, `file`, and for
        a video that was split, `start` and `end`.

        This is called for every input, in their order. Inputs are known by their names, so it does
        not matter if others were added or removed. Inputs that share a name are told apart by
        their order, also if some of them failed.

        Args:
            name: Name of the input.
            index: Its position among the inputs.

        Returns:
            A dictionary, or None if the input is not finished.
        """
        occurrence = self._counts[name]
        self._counts[name] += 1
        if occurrence:
            self._occurrences[index] = occurrence
        return self._done.pop((name, occurrence), None)

    def stop(self) -> str:
        """End early: a single file will not be written. Return what to tell the user."""
        self.is_stopped = True
        if not self.is_file:
            hint = "; --resume continues" if self._upload is None else ""
            return f"finished features are in {self._name_of(self.path)}{hint}"
        count = sum(len(shard.inputs) for shard in self._open.values())
        hint = "be resumed" if self._upload is None else "keep them"
        return (
            f"{self._name_of(self.path)} is not written after {counted(count, 'input')}; "
            f"a folder could {hint}"
        )

    def _name_of(self, path: Path) -> str:
        """Return the name of a file or of the folder to show: a path, or a URL."""
        return str(path) if self._upload is None else self._upload.name_of(path)

    def _next_path(self, kind: Kind) -> Path:
        if self.is_file:
            return self.path
        number = self._next_numbers.get(kind, 0)
        self._next_numbers[kind] = number + 1
        return self.path / f"{self._prefix}{kind}-{number:05}.{self.format}"

    def _write(self, kind: Kind) -> None:
        """Write the open shard of a kind.

        Raises:
            OutputError: The disk is full, or the folder cannot be written.
        """
        shard = self._open[kind]
        parts = shard.inputs
        with unfinished.finish_first(shard.path):
            arrays = {n: np.concatenate([p.values[n] for p in parts]) for n in parts[0].values}
            metadata = {
                "inputs": [part.name for part in parts for _ in range(part.count)],
                "indices": [part.index for part in parts for _ in range(part.count)],
                "occurrences": [part.occurrence for part in parts for _ in range(part.count)],
                "kind": kind,
                "model": shard.model,
                "shapes": {n: list(a.shape[1:]) for n, a in arrays.items() if n not in TIMES},
                "settings": {**self.settings, **self._models.get(kind, {})},
                **{name: arrays[name].tolist() for name in TIMES if name in arrays},
            }
            if any(part.id is not None for part in parts):
                metadata["ids"] = [part.id for part in parts for _ in range(part.count)]
            del self._open[kind]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not self.is_file:
                    self.path.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"{self.path} cannot be created ({error.strerror})") from error
            feature_formats.write(shard.path, arrays, metadata)
        if self._upload is not None:
            self._upload.send(shard.path)

    def _remove_remote_shards(self, upload: Upload) -> None:
        for name in upload.place.names(self._prefix, ""):
            path = Path(name)
            if path.suffix in feature_formats.FORMATS and self._shard_name.fullmatch(path.stem):
                upload.place.remove(name)

    # An earlier run -------------------------------------------------------------------------------

    def _shards(self) -> Iterator[Path]:
        """Yield the shards in the folder, of all formats, in the order of their names."""
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if path.suffix in feature_formats.FORMATS and self._shard_name.fullmatch(path.stem):
                yield path

    def _check_removable(self) -> None:
        """Check that the files with names of shards are shards, or empty.

        Raises:
            UsageError: One of them is another file.
        """
        for path in self._shards():
            if not (path.is_file() and path.stat().st_size == 0):
                feature_formats.read_metadata(path)

    def _read_shards(self) -> None:
        """Read which inputs the shards of an earlier run contain.

        Raises:
            UsageError: A shard was made with other settings, or cannot be read.
        """
        for path in self._shards():
            match = self._shard_name.fullmatch(path.stem)
            assert match is not None
            kind, number = cast(Kind, match[1]), int(match[2])
            if path.suffix != f".{self.format}":
                raise UsageError(
                    f"{path} is not {self.format}", f"resume with --save-as {path.suffix[1:]}"
                )
            self._next_numbers[kind] = max(self._next_numbers.get(kind, 0), number + 1)
            metadata = feature_formats.read_metadata(path)
            fingerprint.check_same(path, metadata["settings"], self.settings, self._hint)
            self._earlier[kind] = path, metadata["settings"]
            self._done |= _rows_by_input(path, metadata)


def _location(path: str | Path, row: int, count: int | None) -> dict[str, Any]:
    """Return where the features of an input are: a file, the (first) row, and the number of rows
    for a video that is split."""
    return {"name": str(path), "row": row, **({} if count is None else {"rows": count})}


def _rows_by_input(
    path: Path, metadata: feature_formats.Metadata
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what `FeatureStore.find` returns, for each name and occurrence in a shard."""
    done: dict[tuple[str, int], dict[str, Any]] = {}
    keys = zip(metadata["inputs"], metadata["occurrences"], strict=True)
    row = 0
    for key, group in itertools.groupby(keys):
        count = len(list(group))
        rows, shapes, times = slice(row, row + count), metadata["shapes"], {}
        is_split = "start" in metadata
        if is_split:
            times = {name: metadata[name][rows] for name in TIMES}
            shapes = {name: [count, *shape] for name, shape in shapes.items()}
        file = _location(path, row, count if is_split else None)
        kind_and_model = {"kind": metadata["kind"], "model": metadata["model"]}
        done[key] = {**kind_and_model, "shapes": shapes, **times, "file": file}
        row += count
    return done
