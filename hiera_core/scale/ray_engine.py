"""The engine on Ray Data: decoding on CPUs, the model on actors, rows to Parquet files.

    numbers of chunks -> read and decode (tasks) -> model (actors) -> write files (tasks)

A chunk is a range of rows of the inputs. Pixels travel as 8-bit bytes; the content of files ends
where it is decoded. Without GPUs, the first two steps are in the same actors, so that pixels do not
travel at all.

An interrupted run goes on by the `index` of the rows that are in its files: see `RowFolder`. Ray's
own checkpoints (`CheckpointConfig`) are not used. They record a row after its file is written, so a
driver that is killed in between would write the row a second time.
"""

from __future__ import annotations

import collections
import copy
import functools
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.division.manifest import Manifest
from ..errors import OutputError
from ..inference.columns.callables import Classifier, Decoder, Embedder
from ..weights import names
from .done_rows import DoneRows
from .input_table import InputTable, Listing
from .ray_cluster import RayOptions, as_hiera_error, connect, count_gpus
from .ray_workers import MODEL_BATCH, Compute, DecodeAndCompute, Decoding, decode_chunks
from .ray_writing import write_rows
from .row_folder import RowFolder, check_facts
from .run_summary import RunSummary

CHUNK_ROWS = 256  # of a task, at most
LEAST_ROWS = 16  # at least, if the inputs are few
TASKS_OF_ACTOR = 8  # if the inputs are few: all actors have work until near the end
CHECKED_ROWS = 16  # of an earlier run, whose inputs are looked at again
MAX_BLOCKS = 5000  # tasks that read
CPUS_PER_WRITER = 4  # Ray would start a process for each file that can be written


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
    ray, is_ours = connect(options)
    try:
        return _run(ray, inputs, model, folder, settings, options, done, on_progress)
    except Exception as error:
        raise as_hiera_error(error) from error
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
    done.check_end(total)
    # An error if another input is there now. What could not be listed may have another name.
    for row in done.some(CHECKED_ROWS, with_failed=not isinstance(table, Listing)):
        collections.deque(done.skip(table.read(range(row, row + 1))), maxlen=0)
    summary = RunSummary(earlier_ok=done.ok, earlier_failed=done.failed)
    gpus = count_gpus(ray, options.device)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    chunks = list(_chunks(total, done, _rows_of_task(total - len(done), cpus)))
    if not chunks:
        return summary
    started = time.monotonic()
    model = _with_absolute_paths(model)
    decoding = Decoding(secrets.token_hex(8), _decoder_of(model), inputs, Path.cwd())
    arguments = (model, folder, settings, done.facts)
    rows = ray.data.from_arrow(_blocks(chunks))
    if gpus:
        rows = rows.map_batches(
            functools.partial(decode_chunks, decoding),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        ).map_batches(
            Compute,
            fn_constructor_args=arguments,
            batch_size=MODEL_BATCH,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=gpus),
            num_gpus=1,
        )
    else:
        rows = rows.map_batches(
            DecodeAndCompute,
            fn_constructor_args=(decoding, *arguments),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(cpus, len(chunks))),
            num_cpus=1,
        )
    rows = rows.map_batches(
        functools.partial(write_rows, folder),
        batch_size=folder.rows_per_file,
        batch_format="pyarrow",
        num_cpus=0,  # they wait for a disk or network; actors may hold all CPUs
        compute=ray.data.TaskPoolStrategy(size=max(2, cpus // CPUS_PER_WRITER)),
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for one in batch.to_pylist():
            summary.add(one)
            summary.seconds = time.monotonic() - started
            on_progress(summary)
    _check_whole(folder, table)
    return summary


def _check_whole(folder: RowFolder, table: Manifest | Listing) -> None:
    """Check that each input has a row. Rows that were written twice are removed, and those that a
    retry has replaced. Empty lines of a manifest are no inputs."""
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


def _rows_of_task(left: int, workers: int) -> int:
    return min(CHUNK_ROWS, max(LEAST_ROWS, left // (TASKS_OF_ACTOR * workers)))


def _chunks(total: int, done: DoneRows, size: int = CHUNK_ROWS) -> Iterator[dict[str, Any]]:
    """Yield ranges of rows, with the rows that are left of those that are partly written."""
    for start in range(0, total, size):
        stop = min(total, start + size)
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
    decoder = Decoder(
        model.model, checkpoint=model.checkpoint, random_init=model.random_init, **known
    )
    decoder.may_split = not isinstance(model, Embedder)
    return decoder
