"""The engine on Ray Data: decoding on CPUs, the model on actors, rows to Parquet files.

    numbers of chunks -> read and decode (tasks) -> model (actors) -> write files (tasks)

A chunk is a range of rows of the inputs. Pixels travel as 8-bit bytes; the content of files ends
where it is decoded. Without GPUs, Ray runs the first two steps in the same actors, so that pixels
do not travel at all.

An interrupted run goes on by the `index` of the rows that are in its files: see `RowFolder`. Ray's
own checkpoints (`CheckpointConfig`) are not used. They record a row after its file is written, so a
driver that is killed in between would write the row a second time.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.division.manifest import Manifest
from ..data.sources import Source
from ..errors import HieraError, OutputError, UsageError, first_line
from ..inference.columns.batch_columns import DECODED, object_column
from ..inference.columns.callables import Classifier, Decoder, Embedder
from ..inference.fingerprint import plain
from ..inference.model_fingerprint import model_fingerprint
from ..weights import names
from .input_table import InputTable, Listing
from .row_folder import ROWS_PER_FILE, DoneRows, Facts, RowFolder, check_facts

CHUNK_ROWS = 256
CHECKED_ROWS = 16  # of an earlier run, whose inputs are looked at again
MAX_BLOCKS = 5000  # tasks that read
DECODED_TOGETHER = 32  # inputs that a task decodes before it hands them on
MODEL_BATCH = 64  # rows that an actor takes, at most; the device's own batches are within
SHOWN_ERRORS = 5  # of each file, for messages
# Columns with figures, and with what the rows depend on. They are not written.
BUSY, WAITED, SIZE, FACTS = "_busy", "_waited", "_size", "_facts"


@dataclass(frozen=True)
class RayOptions:
    """How Ray is used.

    Args:
        address: A cluster, `auto` for the one on this machine, or None for a new one in this
            process (or the cluster of RAY_ADDRESS).
        cpus: Number of CPUs of a new one; None for all.
        device: `auto`, `cpu` or `cuda`: whether actors take a GPU each.
    """

    address: str | None = None
    cpus: int | None = None
    device: str = "auto"


@dataclass
class RunSummary:
    """What a run has done.

    Attributes:
        ok, failed: Numbers of inputs, without those of earlier runs.
        earlier_ok, earlier_failed: Those of earlier runs.
        seconds: Duration, from the first chunk to the last file.
        busy, waited: Seconds that the actors computed, and waited for decoded inputs.
        decoded, written: Bytes that went to the actors, and to files.
        errors: Some of the errors.
    """

    ok: int = 0
    failed: int = 0
    earlier_ok: int = 0
    earlier_failed: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    decoded: int = 0
    written: int = 0
    errors: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return one line for a person."""
        count = self.ok + self.failed
        share = self.waited / max(self.busy + self.waited, 1e-9)
        return (
            f"{count} inputs in {self.seconds:.1f} s, {count / max(self.seconds, 1e-9):.1f}/s; "
            f"the model waited {share:.0%} of its time; {self.failed} errors; "
            f"{self.decoded / 1e9:.3f} GB decoded, {self.written / 1e9:.3f} GB written"
        )


def run_on_ray(
    inputs: InputTable,
    model: Embedder | Classifier,
    folder: RowFolder,
    settings: dict[str, Any],
    *,
    options: RayOptions,
    done: DoneRows,
    on_progress: Callable[[RunSummary], None] = lambda summary: None,
) -> RunSummary:
    """Compute the rows of all inputs that are not written yet.

    Args:
        inputs: What each row is computed from.
        model: What computes; its options are those of every worker.
        folder: Gets the rows. Every worker must see it under this path.
        settings: What the rows depend on, besides the model.
        options: How Ray is used.
        done: The rows of earlier runs.
        on_progress: Called after each file.

    Raises:
        UsageError: Ray is not installed, or rows of an earlier run depend on something else.
        CheckpointError, HubError, DeviceError: From the model, in a worker.
        OutputError: A file cannot be written, or Ray cannot be reached or gives up.
    """
    ray, is_ours = _connect(options)
    try:
        return _run(ray, inputs, model, folder, settings, options, done, on_progress)
    except Exception as error:
        raise _as_hiera_error(error) from error
    finally:
        if is_ours:
            ray.shutdown()


def _run(
    ray: Any,
    inputs: InputTable,
    model: Embedder | Classifier,
    folder: RowFolder,
    settings: dict[str, Any],
    options: RayOptions,
    done: DoneRows,
    on_progress: Callable[[RunSummary], None],
) -> RunSummary:
    table = inputs.open()
    total = len(table)
    check_facts(done.where, done.facts, {"settings": settings})
    for row in done.some(CHECKED_ROWS):  # an error if another input is there now
        collections.deque(done.skip(table.read(range(row, row + 1))), maxlen=0)
    summary = RunSummary(earlier_ok=done.ok, earlier_failed=done.failed)
    chunks = list(_chunks(total, done))
    if not chunks:
        return summary
    gpus = _gpus(ray, options.device)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    started = time.monotonic()
    model = _with_absolute_paths(model)
    decoding = _Decoding(secrets.token_hex(8), _decoder_of(model), inputs, Path.cwd())
    decode = functools.partial(_decode_chunks, decoding)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or max(1, cpus))
    rows = ray.data.from_arrow(_blocks(chunks)).map_batches(
        decode, batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    rows = rows.map_batches(
        _Compute,
        fn_constructor_args=(model, folder, settings, done.facts),
        batch_size=MODEL_BATCH,
        batch_format="numpy",
        compute=pool,
        **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
    )
    rows = rows.map_batches(
        functools.partial(_write, folder),
        batch_size=ROWS_PER_FILE,
        batch_format="pyarrow",
        num_cpus=0,  # they wait for a disk or network; actors may hold all CPUs
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for one in batch.to_pylist():
            _count(summary, one)
            summary.seconds = time.monotonic() - started
            on_progress(summary)
    _check_whole(folder, table)
    return summary


def _check_whole(folder: RowFolder, table: Manifest | Listing) -> None:
    """Check that each input has a row. Rows that were written twice are removed. Empty lines of a
    manifest are no inputs."""
    total = len(table)
    left = folder.read_done(total).missing(range(total))
    if not len(left):
        return
    is_left = np.zeros(total, bool)
    is_left[left] = True
    found = table.read(range(int(left[0]), int(left[-1]) + 1))
    missing = sum(bool(is_left[source.position]) for source in found)
    if missing:
        raise OutputError(
            f"{missing} of {total} rows are missing in {folder.place.text}", "--resume"
        )


def _chunks(total: int, done: DoneRows) -> Iterator[dict[str, Any]]:
    """Yield ranges of rows, with the rows that are left of those that are partly written."""
    for start in range(0, total, CHUNK_ROWS):
        stop = min(total, start + CHUNK_ROWS)
        left = done.missing(range(start, stop))
        if len(left):
            wanted = [] if len(left) == stop - start else left.tolist()
            yield {"start": start, "stop": stop, "wanted": wanted}


def _blocks(chunks: list[dict[str, Any]]) -> list[Any]:
    import pyarrow as pa

    number = pa.int64()
    schema = pa.schema([("start", number), ("stop", number), ("wanted", pa.list_(number))])
    size = -(-len(chunks) // MAX_BLOCKS)
    return [pa.Table.from_pylist(chunks[i : i + size], schema) for i in range(0, len(chunks), size)]


def _with_absolute_paths(model: Embedder | Classifier) -> Embedder | Classifier:
    """Return a copy whose weights are found from any folder: workers may run in another one."""
    copied = copy.copy(model)
    for name in ("model", "checkpoint"):
        value = getattr(model, name)
        is_path = isinstance(value, str | Path) and names.exists(value)
        if is_path and not names.is_in_zoo(value):
            setattr(copied, name, str(Path(value).absolute()))
    return copied


def _decoder_of(model: Embedder | Classifier) -> Decoder:
    known = {**model.options, "workers": 1}
    known.pop("compile", None)
    return Decoder(model.model, checkpoint=model.checkpoint, random_init=model.random_init, **known)


# In the workers -----------------------------------------------------------------------------------


@dataclass
class _Decoding:
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

    def of_this_process(self) -> _Decoding:
        """Return the copy that this process has used before, or else this one."""
        if not _kept or _kept[0].run != self.run:
            _kept[:] = [self]
        return _kept[0]


_kept: list[_Decoding] = []


def _decode_chunks(decoding: _Decoding, chunks: Any) -> Iterator[Any]:
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


class _Compute:
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


def _write(folder: RowFolder, table: Any) -> Any:
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


# In the driver ------------------------------------------------------------------------------------


def _count(summary: RunSummary, one: dict[str, Any]) -> None:
    summary.failed += one["failed"]
    summary.ok += one["rows"] - one["failed"]
    summary.busy += one["busy"]
    summary.waited += one["waited"]
    summary.decoded += one["size"]
    summary.written += one["written"]
    summary.errors += one["errors"]


def check_ray() -> None:
    """Check that Ray is installed.

    Raises:
        UsageError: It is not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", "pip install 'hiera-toolkit[ray]'"
        ) from error


def _connect(options: RayOptions) -> tuple[Any, bool]:
    """Return Ray, connected to a cluster or to a new one on this machine, and whether it was
    connected here."""
    check_ray()
    import logging

    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        is_new = options.address is None and "RAY_ADDRESS" not in os.environ
        local: dict[str, Any] = {"num_cpus": options.cpus, "include_dashboard": False}
        try:
            with _kept_signals():
                ray.init(
                    address="local" if is_new else options.address,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    **(local if is_new else {}),
                )
        except Exception as error:  # Ray raises many types, also a plain Exception
            where = options.address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise OutputError(
                f"no Ray cluster at {where} ({first_line(error)})", "check --address"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):  # they print tracebacks of errors that we report in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray, is_ours


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Restore the handlers of signals, which Ray replaces by its own."""
    is_main = threading.current_thread() is threading.main_thread()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if is_main and handler is not None:
                signal.signal(number, handler)


def _gpus(ray: Any, device: str) -> int:
    """Return the number of actors with a GPU; 0 for actors on CPUs.

    Raises:
        UsageError: The cluster has no GPU, and one is asked for.
    """
    count = int(ray.cluster_resources().get("GPU", 0))
    if device.startswith("cuda") and not count:
        raise UsageError("the Ray cluster has no GPU", "leave out --device, or add a node")
    return 0 if device == "cpu" else count


def _as_hiera_error(error: BaseException) -> HieraError:
    """Return the error of a worker that is for users, or one about Ray."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or one in seen:
            continue
        if isinstance(one, HieraError):
            # Ray's own class is derived from ours; return ours.
            kind = next(c for c in type(one).__mro__ if c.__module__ == HieraError.__module__)
            cause: Any = getattr(one, "cause", one)
            known = cause if isinstance(cause, HieraError) else one
            return kind(known.message, known.hint)
        seen.append(one)
        waiting += [one.__cause__, one.__context__, getattr(one, "cause", None)]
    return OutputError(
        f"Ray stopped ({type(error).__name__}: {first_line(error)})",
        "what is written stays; --resume continues, --debug shows more",
    )
