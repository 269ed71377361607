"""`hiera features`: compute embeddings and feature maps, write them to files, or draw them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.records import Record

from .. import load_model, options, output_formats
from ..exit_codes import print_message
from ..options import OnError, auto_or_count, auto_or_workers
from ..outputs import claim_file, claim_folder
from ..progress import InputCount
from ..result_stream import ResultStream

if TYPE_CHECKING:
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor

SAMPLE_MODEL = "hiera_nano_32"  # model for the sample; it ships in the package
FILE_ENDINGS = (".safetensors", ".npz", ".parquet")


class Pool(StrEnum):
    """Values of --pool."""

    mean = "mean"
    none = "none"


class SaveAs(StrEnum):
    """Values of --save-as."""

    safetensors = "safetensors"
    npz = "npz"
    parquet = "parquet"


def features(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help=options.INPUTS_HELP + " Without inputs, the shapes of all stages are printed for "
            "a sample that ships in the package.",
            metavar="INPUTS",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        options.model_option(
            f"{zoo.DEFAULT_IMAGE_MODEL} for images, {zoo.DEFAULT_VIDEO_MODEL} for videos, "
            f"{SAMPLE_MODEL} without inputs"
        ),
    ] = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    return_intermediates: Annotated[
        bool,
        typer.Option(
            "--return-intermediates",
            help="Return the feature map of every stage, in spatial order, instead of a vector.",
        ),
    ] = False,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Return the feature maps of these stages, counted from 1.",
            metavar="1,2,...",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        Pool | None,
        typer.Option(
            help="mean: average the features over space and time, which gives vectors. none: "
            "return maps.",
            show_default="mean, or none with --stages or --return-intermediates",
        ),
    ] = None,
    attention: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also return the attention weights of this block, [heads, queries, keys] in the "
            "order of the grid. With --visualize, they are drawn over the input.",
            metavar="BLOCK",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.parse_path,
            metavar="FILE|DIR",
            help="Where to write the features: a file (.safetensors, .npz or .parquet), or a "
            "folder for several files (shards). Without it, json and jsonl results hold the "
            "values of vectors.",
            show_default=False,
        ),
    ] = None,
    save_as: Annotated[
        SaveAs | None,
        typer.Option(
            metavar="FORMAT",
            help="File format in the folder of --output: safetensors, npz or parquet.",
            show_default=SaveAs.safetensors.value,
        ),
    ] = None,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=options.MAX_SHARD,
            help="Largest number of inputs per file in the folder of --output. A new file also "
            "begins at about 64 MiB.",
        ),
    ] = 1000,
    visualize: Annotated[
        Path | None,
        typer.Option(
            parser=options.parse_path,
            help="Folder for images of the stages: their first three principal components as red, "
            "green and blue, beside the input.",
            metavar="DIR",
        ),
    ] = None,
    recursive: options.RecursiveOpt = False,
    clips: Annotated[
        int,
        typer.Option(
            min=1,
            max=options.MAX_CLIPS,
            help="Number of clips, evenly spread over a video. Their vectors are averaged; maps "
            "need a single clip.",
        ),
    ] = 1,
    crops: Annotated[
        int,
        typer.Option(
            min=1,
            max=options.MAX_CROPS,
            help="Number of crops of each clip. Their vectors are averaged; maps need a single "
            "crop.",
        ),
    ] = 1,
    stride: options.StrideOpt = None,
    fps: options.FpsOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    format: Annotated[
        output_formats.Format,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="Format of what is printed: table, json, jsonl or csv. auto: table on a terminal "
            "or without inputs, else jsonl.",
        ),
    ] = output_formats.Format.auto,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the output file, or write into folders that are not empty."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run: keep the files in the folder of --output, and "
            "process the remaining inputs.",
        ),
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
    """Compute features of images and videos: one vector for each, or the feature maps of stages.

    The vector of a classifier is the input of its head. The vector of an autoencoder is the input
    of its decoder, averaged over all tokens. Maps have the shape (height, width, channels), or
    (time, height, width, channels) for videos, and are taken before normalisation. For a video, the
    centre clip is used.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_workers(workers)
    selected = _parse_stages(stages, default_all=return_intermediates or not inputs)
    if not inputs:  # show the sample
        model = SAMPLE_MODEL if model is None and checkpoint is None else model
        format = output_formats.Format.table if format is output_formats.Format.auto else format
        if not quiet:
            print_message(f"no inputs: the features of a sample, by {model or checkpoint}")
    pooled = selected == () if pool is None else pool is Pool.mean
    out = ResultStream(None, format, details=("features", "file", "picture"), quiet=quiet)
    is_file = _is_feature_file(output, save_as)
    if resume and (output is None or is_file):
        raise UsageError("--resume needs -o with a folder", "use -o features/")
    may_exist = overwrite or resume
    if output is not None and is_file:
        output = context.with_resource(claim_file(output, overwrite))
    elif output is not None:
        context.with_resource(claim_folder(output, may_exist))
    if visualize is not None and (output is None or visualize.resolve() != output.resolve()):
        context.with_resource(claim_folder(visualize, may_exist))
    out.count, out.pictures = InputCount(inputs or [], recursive), visualize
    sources.check_inputs(inputs or [], recursive=recursive)
    load_model.check_model_name(model)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference import feature_formats
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import BatchExtractor, FeatureExtractor, FeatureSelection
    from hiera_core.inference.model_fingerprint import model_fingerprint

    shard_format = save_as or SaveAs.safetensors
    feature_formats.check_format(output.suffix.lower()[1:] if output and is_file else shard_format)
    extractor = FeatureExtractor(
        load_model.load_model("encoder", model, checkpoint, random_init),
        selection=FeatureSelection(selected, pooled, attention),
        visualize=visualize is not None,
        sampling=Sampling(clips=clips, crops=crops, stride=stride, fps=fps, max_pixels=max_pixels),
        workers=threads,
        device=device,
        dtype=dtype,
        batch_size=batch,
        compile=compile,
    )
    if output is None:
        return _run(out, extractor, inputs, None, visualize, recursive, on_error)
    settings = {
        "stages": list(selected) if selected is not None else "all",
        "pool": pooled,
        "views": [clips, crops, stride, fps],
        "max pixels": max_pixels,
        "attention": attention,
    }
    store = FeatureStore(
        output,
        shard_format,
        settings=settings,
        shard_inputs=shard_size,
        resume=resume,
        overwrite=overwrite,
    )

    def note_model(runner: BatchExtractor) -> None:
        store.use_model(runner.kind, model_fingerprint(runner))

    extractor.on_model(note_model)
    extractor.find_done = store.find
    with store:
        code = _run(out, extractor, inputs, store, visualize, recursive, on_error)
        message = f"features are in {output}" if out.complete else store.stop()
    if (out.ok and not quiet) or not out.complete:
        print_message(message)
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
    """Extract the features of all inputs, or of the sample, and return the exit code."""
    from hiera_core.data import toy_datasets
    from hiera_core.viz import grid
    from hiera_core.viz.output_names import OutputNames

    def listed() -> Iterator[sources.Source]:
        return sources.expand(inputs or [], recursive=recursive, ahead=True)

    names = None if visualize is None else OutputNames(visualize, listed)

    def save(record: Record) -> None:
        if record.result is not None:
            if store is not None:
                store.add(record)
            else:
                _add_values(record)
            if names is not None:
                path = names.path(record, ".png")
                grid.save_png(record.thumbnails[0], path)
                record.extra["picture"] = str(path)
        record.lines = list(_text_lines(record))
        record.result, record.thumbnails = None, []

    if inputs:
        expanded = sources.expand(inputs, recursive=recursive, passed_over=out.passed_over)
    else:
        expanded = iter([toy_datasets.sample(extractor.kinds[0])])
    if names is not None:
        expanded = names.assign(expanded)
    return out.write_all(extractor(expanded), save, stop=on_error is OnError.stop)


def _add_values(record: Record) -> None:
    """Add the values of vectors to a record. Maps are too large for that."""
    for name, values in record.result.items():
        if values.dim() == 1:
            record.extra["features"][name]["values"] = values.tolist()


def _text_lines(record: Record) -> Iterator[str]:
    """Yield the features of a record as lines of text."""
    for name, feature in record.extra["features"].items():
        shape = "x".join(map(str, feature["shape"]))
        cell = feature.get("cell")
        note = f"a cell is {'x'.join(map(str, cell))} pixels" if cell else ""
        if cell and len(cell) == 3:
            note = f"a cell is {cell[0]} frames of {cell[1]}x{cell[2]} pixels"
        yield f"{name:9} {shape:14} {note}".rstrip()
    if "file" in record.extra:
        yield f"-> {record.extra['file']['name']}, row {record.extra['file']['row']}"
    if "picture" in record.extra:
        yield f"-> {record.extra['picture']}"


def _parse_stages(text: str | None, default_all: bool) -> tuple[int, ...] | None:
    """Parse the numbers of stages: `1,3` -> (1, 3).

    If `text` is None, this returns None for all stages if `default_all` is set, else () for the
    embedding.

    Raises:
        UsageError: The text is not a list of numbers.
    """
    if text is None and default_all:
        return None
    parts = [] if text is None else text.split(",")
    numbers = [options.parse_number(part.strip()) for part in parts]
    if any(number is None for number in numbers):
        raise UsageError(f"--stages {text!r} is not a list of numbers", "give numbers like 1,2,3,4")
    return tuple(sorted({number for number in numbers if number is not None}))


def _is_feature_file(output: Path | None, save_as: SaveAs | None) -> bool:
    """Return whether --output names a file; otherwise it names a folder.

    Raises:
        UsageError: It looks like a file of a format that features are not written in.
    """
    if output is None or output.is_dir():
        return False
    if output.suffix.lower() in FILE_ENDINGS:
        return True
    if output.suffix and save_as is None:
        raise UsageError(
            f"unknown file extension in {output.name!r}",
            f"end it in {', '.join(FILE_ENDINGS)}; or, for a folder, make it first or give "
            "--save-as",
        )
    return False
