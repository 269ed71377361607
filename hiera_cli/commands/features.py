"""`hiera features`: embeddings and stage maps, to files and as pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.records import Record

from .. import load_model, options, output_formats
from ..exit_codes import print_message
from ..options import OnError, auto_or_count
from ..results import ResultStream, check_file, check_folder

if TYPE_CHECKING:
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor

SAMPLE_MODEL = "hiera_nano_32"  # where neither inputs nor a model are named: needs no download
FILE_ENDINGS = (".safetensors", ".npz", ".parquet")


class Pool(StrEnum):
    mean = "mean"
    none = "none"


class SaveAs(StrEnum):
    safetensors = "safetensors"
    npz = "npz"
    parquet = "parquet"


def features(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help=options.INPUTS_HELP + " None: a sample, and the table of its shapes.",
            metavar="[INPUTS]",
            show_default=False,
        ),
    ] = None,
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    return_intermediates: Annotated[
        bool,
        typer.Option(
            "--return-intermediates", help="Stage maps, [*grid, channels] in their places."
        ),
    ] = False,
    stages: Annotated[
        str | None,
        typer.Option(help="Of these stages only.", metavar="1,2,...", show_default=False),
    ] = None,
    pool: Annotated[
        Pool | None,
        typer.Option(
            help="mean: one vector, averaged over space and time; none: maps. (default: mean, but "
            "none with --return-intermediates or --stages)"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.safetensors, .npz, .parquet), or folder for shards.",
            show_default=False,
        ),
    ] = None,
    save_as: Annotated[SaveAs, typer.Option(help="Format of the shards.")] = SaveAs.safetensors,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Inputs in a shard, at most (64 MiB end one, too).")
    ] = 1000,
    visualize: Annotated[
        Path | None,
        typer.Option(
            help="Write pictures to a folder: each stage's first three principal components as "
            "red, green and blue, beside the input.",
            metavar="DIR",
        ),
    ] = None,
    recursive: options.RecursiveOpt = False,
    clips: Annotated[
        int, typer.Option(min=1, help="Clips along a video; vectors are averaged.")
    ] = 1,
    crops: Annotated[int, typer.Option(min=1, help="Crops of each clip.")] = 1,
    stride: options.StrideOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    format: options.FormatOpt = output_formats.Format.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or write into folders in use.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the folder of an interrupted run.")
    ] = False,
    device: options.DeviceOpt = options.Device.auto,
    dtype: options.DtypeOpt = options.Dtype.auto,
    batch_size: options.BatchSizeOpt = "auto",
    workers: options.WorkersOpt = "auto",
    compile: options.CompileOpt = False,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """What the model sees: one vector for each picture or video, or the maps of its stages.

    The vector is what the classifier sees (of an autoencoder, what its decoder sees, averaged).
    Maps are in spatial order, channels last, before normalisation. Of a video the centre clip.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_count(workers)
    chosen = _stages(stages, every=return_intermediates or not inputs)
    if not inputs:  # the sample
        model = model or (None if checkpoint else SAMPLE_MODEL)
        format = output_formats.Format.table if format is output_formats.Format.auto else format
    pooled = chosen == () if pool is None else pool is Pool.mean
    out = ResultStream(None, format, details=("features", "file", "picture"), quiet=quiet)
    _check_outputs(output, visualize, overwrite, resume)
    sources.check_inputs(inputs or [], recursive=recursive)
    load_model.check_model_name(model)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference import feature_files
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor, FeatureSelection

    feature_files.check_format(
        output.suffix[1:] if output and output.suffix in FILE_ENDINGS else save_as
    )
    extractor = FeatureExtractor(
        load_model.load_model("encoder", model, checkpoint, random_init),
        selection=FeatureSelection(chosen, pooled),
        visualize=visualize is not None,
        sampling=Sampling(clips, crops, stride, max_pixels=max_pixels),
        workers=threads,
        device=device,
        dtype=dtype,
        batch_size=batch,
        compile=compile,
    )
    settings = {
        "model": checkpoint or model or "by the input",
        "stages": list(chosen) if chosen is not None else "all",
        "pool": pooled,
        "views": [clips, crops, stride],
    }
    if output is None:
        return _run(out, extractor, inputs, None, visualize, recursive, on_error)
    with FeatureStore(
        output, save_as, settings=settings, shard_inputs=shard_size, resume=resume
    ) as store:
        extractor.find_done = store.known
        code = _run(out, extractor, inputs, store, visualize, recursive, on_error)
    if out.ok and not quiet:
        print_message(f"features are in {output}")
    return code


def _run(
    out: ResultStream,
    extractor: FeatureExtractor,
    inputs: list[str] | None,
    store: FeatureStore | None,
    visualize: Path | None,
    recursive: bool,
    on_error: OnError,
) -> int:
    from hiera_core.data import toy_datasets
    from hiera_core.viz import grid
    from hiera_core.viz.output_paths import output_path

    def each(record: Record) -> None:
        if record.result is not None:
            if store is not None:
                store.add(record)
            else:
                _put_values(record)
            if visualize is not None:
                path = output_path(visualize, record.input, ".png")
                grid.save_png(record.thumbnails[0], path)
                record.extra["picture"] = str(path)
        record.lines = list(_lines(record))
        record.result, record.thumbnails = None, []

    if inputs:
        named = sources.expand(inputs, recursive=recursive)
    else:
        named = iter([toy_datasets.sample(extractor.kinds[0])])
    return out.write_all(extractor(named), each, stop=on_error is OnError.stop)


def _put_values(record: Record) -> None:
    """Vectors fit into the record; maps do not."""
    for name, values in record.result.items():
        if values.dim() == 1:
            record.extra["features"][name]["values"] = values.tolist()


def _lines(record: Record) -> Iterator[str]:
    """A record for people."""
    for name, found in record.extra["features"].items():
        shape = "x".join(map(str, found["shape"]))
        cell = found.get("cell")
        note = f"a cell is {'x'.join(map(str, cell))} pixels" if cell else ""
        if cell and len(cell) == 3:
            note = f"a cell is {cell[0]} frames of {cell[1]}x{cell[2]} pixels"
        yield f"{name:9} {shape:14} {note}".rstrip()
    if "file" in record.extra:
        yield f"-> {record.extra['file']['name']}, row {record.extra['file']['row']}"
    if "picture" in record.extra:
        yield f"-> {record.extra['picture']}"


def _stages(text: str | None, every: bool) -> tuple[int, ...] | None:
    """`1,3` -> (1, 3). None: all stages."""
    if text is None and every:
        return None
    parts = text.split(",") if text else []
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--stages {text!r}", "give numbers like 1,2,3,4")
    return tuple(sorted({int(part) for part in parts}))


def _check_outputs(
    output: Path | None, visualize: Path | None, overwrite: bool, resume: bool
) -> None:
    """Before work starts."""
    is_file = output is not None and output.suffix in FILE_ENDINGS
    if resume and (output is None or is_file):
        raise UsageError("--resume needs -o with a folder", "write to -o features/")
    if output is not None and is_file:
        check_file(output, overwrite)
    elif output is not None:
        check_folder(output, overwrite or resume)
    if visualize is not None:
        check_folder(visualize, overwrite or resume)
