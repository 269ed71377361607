"""What Ray's workers do: read and decode inputs, run the model, and write rows."""

from __future__ import annotations

import functools
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
from .input_table import InputTable, Listing
from .row_folder import Facts, RowFolder, check_facts

DECODED_TOGETHER = 32  # inputs that a task decodes before it hands them on
SHOWN_ERRORS = 5  # of each file, for messages
# Columns with figures, and with what the rows depend on. They are not written.
BUSY, WAITED, SIZE, FACTS = "_busy", "_waited", "_size", "_facts"


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
    """Yield the decoded inputs of chunks, some at a time."""
    import pyarrow as pa

    decoding = decoding.of_this_process()
    for chunk in chunks.to_pylist():
        wanted = set(chunk["wanted"])
        waiting = []
        for source in decoding.table.read(range(chunk["start"], chunk["stop"])):
            if not wanted or source.position in wanted:
                waiting.append(_in_folder(source, decoding.folder))
            if len(waiting) >= DECODED_TOGETHER:
                yield pa.table({DECODED: pa.array(decoding.decoder.decode(iter(waiting)))})
                waiting = []
        if waiting:
            yield pa.table({DECODED: pa.array(decoding.decoder.decode(iter(waiting)))})


def _in_folder(source: Source, folder: Path) -> Source:
    return source if source.path is None else replace(source, path=folder / source.path)


class Compute:
    """The model on an actor."""

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
        import pyarrow as pa

        if not self._is_ready:  # an error in the constructor would be reported as one of Ray
            self._model.pipeline.on_model(self._note_model)
            self._is_ready = True
        begin = time.monotonic()
        waited = 0.0 if self._last is None else begin - self._last
        values = batch[DECODED]
        records = self._model.records({DECODED: object_column(list(values))})
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


def write_rows(folder: RowFolder, table: Any) -> Any:
    """Write rows, and return one row about them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    facts: Facts = {}
    for one in pc.unique(table[FACTS]).to_pylist():
        facts |= json.loads(one)
    figures = {name: pc.sum(table[name]).as_py() for name in (BUSY, WAITED, SIZE)}
    rows = table.drop_columns([BUSY, WAITED, SIZE, FACTS])
    written = folder.write(rows, facts)
    failed = rows.filter(pc.equal(rows["status"], "error"))
    errors = [
        f"{row['input']}: {'; '.join(filter(None, (row['error_message'], row['error_hint'])))}"
        for row in failed.slice(0, SHOWN_ERRORS).to_pylist()
    ]
    known = {
        "rows": rows.num_rows,
        "failed": failed.num_rows,
        "written": written,
        "errors": errors,
        **{name.strip("_"): value for name, value in figures.items()},
    }
    number, seconds = pa.int64(), pa.float64()
    counts = [("rows", number), ("failed", number), ("written", number), ("size", number)]
    figures_of_time = [("busy", seconds), ("waited", seconds)]
    schema = pa.schema([*counts, *figures_of_time, ("errors", pa.list_(pa.string()))])
    return pa.Table.from_pylist([known], schema)
