"""What Ray's workers do before rows are written: read and decode inputs, and run the model."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.division.manifest import Manifest
from ..data.sources import Source
from ..inference.columns.batch_columns import DECODED, object_column
from ..inference.columns.callables import Classifier, Decoder, Embedder
from ..inference.fingerprint import plain
from ..inference.model_fingerprint import model_fingerprint
from .done_rows import Facts
from .input_table import InputTable, Listing
from .ray_writing import BUSY, FACTS, SIZE, WAITED
from .row_folder import RowFolder, check_facts

DECODED_TOGETHER = 32  # inputs that a task decodes before it hands them on
MODEL_BATCH = 64  # rows that an actor takes, at most; the device's own batches are within


@dataclass
class Decoding:
    """What decodes in the workers. Ray gives each task a copy, and a process keeps its first one,
    with the model and the table that it has opened: a CSV file is scanned for that.

    Args:
        run: Something that only this run has.
        decoder, inputs: What decodes, and what.
        folder: Where relative paths begin.
    """

    run: str
    decoder: Decoder
    inputs: InputTable
    folder: Path

    @functools.cached_property
    def table(self) -> Manifest | Listing:
        return self.inputs.open()

    def of_this_process(self) -> Decoding:
        """Return the copy that this process has used before, or else this one."""
        if not _kept or _kept[0].run != self.run:
            _kept[:] = [self]
        return _kept[0]


_kept: list[Decoding] = []


def decode_chunks(decoding: Decoding, chunks: Any) -> Iterator[Any]:
    """Yield the decoded inputs of chunks as tables, some at a time."""
    import pyarrow as pa

    for found in _decode(decoding, chunks, DECODED_TOGETHER):
        yield pa.table({DECODED: pa.array(found)})


def _decode(decoding: Decoding, chunks: Any, count: int) -> Iterator[list[bytes]]:
    """Yield the decoded inputs of chunks, `count` at a time."""
    decoding = decoding.of_this_process()
    for chunk in chunks.to_pylist():
        wanted = set(chunk["wanted"])
        found = (
            _in_folder(source, decoding.folder)
            for source in decoding.table.read(range(chunk["start"], chunk["stop"]))
            if not wanted or source.position in wanted
        )
        while some := list(itertools.islice(found, count)):
            yield decoding.decoder.decode(iter(some))


def _in_folder(source: Source, folder: Path) -> Source:
    return source if source.path is None else replace(source, path=folder / source.path)


class Compute:
    """The model on an actor: decoded inputs in, rows out."""

    def __init__(
        self,
        model: Embedder | Classifier,
        folder: RowFolder,
        settings: dict[str, Any],
        earlier: Facts,
    ) -> None:
        self._model, self._folder, self._earlier = model, folder, earlier
        self.facts: Facts = {"settings": settings}
        self._last: float | None = None
        self._is_ready = False

    def _note_model(self, runner: Any) -> None:
        facts = {runner.kind: model_fingerprint(runner)}
        check_facts(self._folder.place.text, self._earlier, facts)
        self.facts |= facts

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        return self.compute(list(batch[DECODED]))

    def compute(self, values: list[bytes]) -> Any:
        """Return the rows of decoded inputs as a table, with figures."""
        import pyarrow as pa

        if not self._is_ready:  # an error in the constructor would be reported as one of Ray
            self._model.pipeline.on_model(self._note_model)
            self._is_ready = True
        begin = time.monotonic()
        waited = 0.0 if self._last is None else begin - self._last
        records = self._model.records({DECODED: object_column(values)})
        table = self._folder.layout.table(records)
        self._last = time.monotonic()
        figures = {
            BUSY: [self._last - begin] + [0.0] * (len(records) - 1),
            WAITED: [waited] + [0.0] * (len(records) - 1),
            SIZE: [len(value) for value in values],
        }
        for name, column in figures.items():
            table = table.append_column(name, pa.array(column))
        facts = json.dumps(plain(self.facts))
        return table.append_column(FACTS, pa.array([facts] * len(records)))


class DecodeAndCompute(Compute):
    """The model on an actor that also decodes, so that pixels do not travel: chunks in, rows out.

    Ray would fuse `decode_chunks` and `Compute` by itself. But it then takes the batch size of
    `Compute` for a number of chunks, and gives all of a small run to one actor.
    """

    def __init__(self, decoding: Decoding, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._decoding = decoding

    def __call__(self, chunks: Any) -> Iterator[Any]:
        for values in _decode(self._decoding, chunks, MODEL_BATCH):
            yield self.compute(values)
