"""`hiera features`: compute embeddings and feature maps, write them to files, or draw them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.records import Record
from hiera_core.zoo.input_sizes import parse_size

from .. import feature_options, load_model, options, output_formats
from ..exit_codes import print_message
from ..feature_options import Pool, SaveAs
from ..options import OnError, auto_or_count, auto_or_workers
from ..output_files.feature_outputs import FeatureOutputs
from ..progress import InputCount
from ..result_stream import ResultStream

if TYPE_CHECKING:
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor, FeatureSelection

SAMPLE_MODEL = "hiera_nano_32"  # model for the sample; it ships in the package


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
    size: feature_options.SizeOpt = None,
    return_intermediates: feature_options.ReturnIntermediatesOpt = False,
    stages: feature_options.StagesOpt = None,
    pool: feature_options.PoolOpt = None,
    attention: feature_options.AttentionOpt = None,
    output: feature_options.FeaturesOutputOpt = None,
    save_as: feature_options.SaveAsOpt = None,
    shard_size: feature_options.ShardSizeOpt = 1000,
    visualize: feature_options.VisualizeOpt = None,
    recursive: options.RecursiveOpt = False,
    clips: feature_options.ClipsOpt = 1,
    crops: feature_options.CropsOpt = 1,
    stride: options.StrideOpt = None,
    fps: options.FpsOpt = None,
    segments: feature_options.SegmentsOpt = None,
    every: feature_options.EveryOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    format: feature_options.PrintedFormatOpt = output_formats.Format.auto,
    overwrite: feature_options.OverwriteFilesOpt = False,
    resume: feature_options.ResumeFolderOpt = False,
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
    centre clip is used; with --segments or --every, there are vectors along the video.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_workers(workers)
    selected = _parse_stages(stages, default_all=return_intermediates or not inputs)
    if not inputs:  # show the sample
        model = SAMPLE_MODEL if model is None and checkpoint is None else model
        format = output_formats.Format.table if format is output_formats.Format.auto else format
    pooled = selected == () if pool is None else pool is Pool.mean
    times = () if segments is None and every is None else ("start", "end")
    out = ResultStream(None, format, details=("features", *times, "file", "picture"), quiet=quiet)
    outputs = FeatureOutputs.parse(output, save_as, visualize)
    outputs.check(inputs or [], selected, attention)
    if resume and (output is None or outputs.is_file):
        raise UsageError("--resume needs -o with a folder", "use -o features/")
    outputs = outputs.claim(context, overwrite=overwrite, may_exist=overwrite or resume)
    out.count, out.pictures = InputCount(inputs or [], recursive), outputs.pictures
    sources.check_inputs(inputs or [], recursive=recursive)
    load_model.check_model_name(model)
    pixels = None if size is None else parse_size(size)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference import feature_formats
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor, FeatureSelection

    feature_formats.check_format(outputs.format_name(save_as))
    selection = FeatureSelection(selected, pooled, attention)
    sampling = Sampling(
        clips=clips,
        crops=crops,
        stride=stride,
        fps=fps,
        segments=segments,
        every=every,
        max_pixels=max_pixels,
    )
    selection.check_views(sampling, draws=visualize is not None)  # before weights are loaded
    extractor = FeatureExtractor(
        load_model.load_model("encoder", model, checkpoint, random_init, pixels),
        selection=selection,
        visualize=visualize is not None,
        sampling=sampling,
        workers=threads,
        device=device,
        dtype=dtype,
        batch_size=batch,
        compile=compile,
    )
    if outputs.features is None or outputs.array is not None:
        code = _run(out, extractor, inputs, None, outputs, recursive, on_error)
        message = f"features are in {outputs.array}" if outputs.array is not None and out.ok else ""
    else:
        store = FeatureStore(
            outputs.features,
            save_as or SaveAs.safetensors,
            settings=_settings(selection, sampling),
            shard_inputs=shard_size,
            resume=resume,
            overwrite=overwrite,
        )
        with store.connected(extractor):
            code = _run(out, extractor, inputs, store, outputs, recursive, on_error)
            message = f"features are in {output}" if out.complete else store.stop()
    if message and ((out.ok and not quiet) or not out.complete):
        print_message(message)
    return code


def _settings(selection: FeatureSelection, sampling: Sampling) -> dict[str, object]:
    """Return what features depend on, besides the model."""
    lengths = {"segments": sampling.segments, "every": sampling.every}
    windows = [f"{name} {length} s" for name, length in lengths.items() if length is not None]
    return {
        "stages": list(selection.stages) if selection.stages is not None else "all",
        "pool": selection.pool,
        "views": [sampling.clips, sampling.crops, sampling.stride, sampling.fps, *windows],
        "max pixels": sampling.max_pixels,
        "attention": selection.attention,
    }


def _run(
    out: ResultStream,
    extractor: FeatureExtractor,
    inputs: list[str] | None,
    store: FeatureStore | None,
    outputs: FeatureOutputs,
    recursive: bool,
    on_error: OnError,
) -> int:
    """Extract the features of all inputs, or of the sample, and return the exit code."""
    from hiera_core.data import toy_datasets
    from hiera_core.viz import grid
    from hiera_core.viz.output_names import OutputNames

    def listed() -> Iterator[sources.Source]:
        return sources.expand(inputs or [], recursive=recursive, ahead=True)

    in_folder = outputs.pictures is not None and not outputs.is_picture
    names = OutputNames(outputs.pictures, listed) if outputs.pictures and in_folder else None

    def save(record: Record) -> None:
        if record.result is not None:
            if store is not None:
                store.add(record)
            elif outputs.array is not None:
                _write_array(record, outputs.array)
            else:
                _add_values(record)
            if outputs.pictures is not None:
                path = outputs.pictures if names is None else names.path(record, ".png")
                grid.save_png(record.thumbnails[0], path)
                record.extra["picture"] = str(path)
        record.lines = list(_text_lines(record))
        if not inputs:
            record.notes.append(f"by {record.model}")
        record.result, record.thumbnails = None, []

    if inputs:
        expanded = sources.expand(inputs, recursive=recursive, passed_over=out.passed_over)
    else:
        expanded = iter([toy_datasets.sample(extractor.kinds[0])])
    if names is not None:
        expanded = names.assign(expanded)
    return out.write_all(extractor(expanded), save, stop=on_error is OnError.stop)


def _write_array(record: Record, path: Path) -> None:
    """Write the only feature of a record to a `.npy` file."""
    from hiera_core.inference.feature_formats import write_plain

    (name,) = record.extra["features"]
    write_plain(path, record.result[name].numpy())
    record.extra["file"] = {"name": str(path)}


def _add_values(record: Record) -> None:
    """Add the values of vectors to a record. Maps are too large for that."""
    for name, feature in record.extra["features"].items():
        values = record.result[name]
        if values.dim() == 1 or "start" in record.extra:
            feature["values"] = values.tolist()


def _text_lines(record: Record) -> Iterator[str]:
    """Yield the features of a record as lines of text."""
    for name, feature in record.extra["features"].items():
        shape = "x".join(map(str, feature["shape"]))
        cell = feature.get("cell")
        note = f"a cell is {'x'.join(map(str, cell))} pixels" if cell else ""
        if cell and len(cell) == 3:
            note = f"a cell is {cell[0]} frames of {cell[1]}x{cell[2]} pixels"
        yield f"{name:9} {shape:14} {note}".rstrip()
    if "start" in record.extra:
        start, end = record.extra["start"], record.extra["end"]
        yield f"{len(start)} segments, {start[0]:.1f} to {end[-1]:.1f} s"
    if "file" in record.extra:
        yield f"-> {_place(**record.extra['file'])}"
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


def _place(name: str, row: int | None = None, rows: int = 1) -> str:
    """Return a file and the rows in it as text."""
    if row is None:
        return name
    return f"{name}, row {row}" if rows == 1 else f"{name}, rows {row} to {row + rows - 1}"
