"""`hiera features`: compute embeddings and feature maps, write them to files, or draw them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.places.remote_requests import is_remote
from hiera_core.plain_data import counted
from hiera_core.records import Record
from hiera_core.zoo.input_sizes import parse_size

from .. import feature_options, load_model, media_run, options, output_formats
from ..exit_codes import print_message
from ..feature_options import Pool, SaveAs
from ..options import OnError
from ..output_files.feature_outputs import FeatureOutputs
from ..output_files.remote_outputs import RESUME_HINT
from ..result_stream import ResultStream
from ..scale import scale_options
from ..scale.input_selection import InputSelection, check_division
from ..scale.scale_options import Engine

if TYPE_CHECKING:
    from hiera_core.inference.feature_store import FeatureStore
    from hiera_core.inference.features import FeatureExtractor, FeatureSelection
    from hiera_core.inference.pipeline import PipelineOptions

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
    shard_size: feature_options.ShardSizeOpt = None,
    visualize: feature_options.VisualizeOpt = None,
    recursive: options.RecursiveOpt = False,
    manifest: scale_options.ManifestOpt = None,
    path_column: scale_options.PathColumnOpt = None,
    id_column: scale_options.IdColumnOpt = None,
    private_urls: scale_options.PrivateUrlsOpt = False,
    clips: feature_options.ClipsOpt = 1,
    crops: feature_options.CropsOpt = 1,
    stride: options.StrideOpt = None,
    fps: options.FpsOpt = None,
    segments: feature_options.SegmentsOpt = None,
    every: feature_options.EveryOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    fast_jpeg: options.FastJpegOpt = False,
    decoder: options.DecoderOpt = options.Decoder.pillow,
    format: feature_options.PrintedFormatOpt = output_formats.Format.auto,
    overwrite: feature_options.OverwriteFilesOpt = False,
    resume: feature_options.ResumeFolderOpt = False,
    retry_failed: scale_options.RetryFailedOpt = False,
    rows: scale_options.RowsOpt = None,
    device: options.DeviceOpt = options.Device.auto,
    dtype: options.DtypeOpt = options.Dtype.auto,
    batch_size: options.BatchSizeOpt = "auto",
    workers: options.WorkersOpt = "auto",
    compile: options.CompileOpt = False,
    shard: scale_options.ShardOpt = None,
    engine: scale_options.EngineOpt = Engine.local,
    address: scale_options.AddressOpt = None,
    dry_run: scale_options.DryRunOpt = None,
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
    media_run.check_counts(context)
    rows_run = media_run.row_run(context)
    chosen = rows_run.chosen
    others = {"--output": output, "--save-as": save_as, "--visualize": visualize}
    rows_run.check({**others, "--format": format is not output_formats.Format.auto})
    shows_sample = chosen.are_none
    selected = _parse_stages(stages, default_all=return_intermediates or shows_sample)
    if shows_sample:
        model = SAMPLE_MODEL if model is None and checkpoint is None else model
        format = output_formats.Format.table if format is output_formats.Format.auto else format
    pooled = selected == () if pool is None else pool is Pool.mean
    times = () if segments is None and every is None else ("start", "end")
    details = (*chosen.id_fields, "features", *times, "file", "picture")
    out = ResultStream(None, format, details=details, quiet=quiet)
    if rows_run.is_wanted:
        _check_rows(selected, pooled, attention, times)
        load_model.check_model_name(model)
        from hiera_core.inference.columns import callables
        from hiera_core.inference.features import FeatureSelection

        selection = FeatureSelection(selected, pooled)
        computing = media_run.pipeline_options(context, rows_run.device)
        on_columns = callables.Embedder(
            load_model.row_model(model, checkpoint, random_init),
            selection=selection,
            checkpoint=checkpoint,
            random_init=random_init,
            **computing,
        )
        names = tuple(f"stage{stage}" for stage in selected or ()) or ("embedding",)
        settings = _settings(selection, computing)
        return chosen.exit_code(rows_run.run(context, on_columns, names, settings))
    if resume and output is not None and is_remote(output):
        raise UsageError("--resume does not continue a remote folder of -o", RESUME_HINT)
    outputs = context.with_resource(
        _parse_outputs(output, save_as, visualize, chosen, overwrite=overwrite)
    )
    outputs.check(inputs or [], selected, attention)
    if resume and (output is None or outputs.is_file):
        raise UsageError("--resume needs -o with a folder", "use -o features/")
    prefix = chosen.prefix
    may_exist = overwrite or resume
    outputs = outputs.claim(context, overwrite=overwrite, may_exist=may_exist, prefix=prefix)
    out.count, out.pictures = chosen.count(), outputs.pictures
    out.may_be_empty, out.origin = bool(prefix), chosen.origin
    chosen.check()
    load_model.check_model_name(model)
    pixels = None if size is None else parse_size(size)
    from hiera_core.inference import feature_formats
    from hiera_core.inference.feature_store import SHARD_INPUTS, FeatureStore
    from hiera_core.inference.features import FeatureExtractor, FeatureSelection

    feature_formats.check_format(outputs.format_name(save_as))
    selection = FeatureSelection(selected, pooled, attention)
    computing = media_run.pipeline_options(context, rows_run.device)
    draws = visualize is not None
    selection.check_views(media_run.sampling_of(computing), draws)  # before weights are loaded
    extractor = FeatureExtractor(
        load_model.load_model("encoder", model, checkpoint, random_init, pixels),
        selection=selection,
        visualize=draws,
        **computing,
    )
    if outputs.features is None or outputs.array is not None:
        code = _run(out, extractor, chosen, None, outputs, on_error)
        message = f"features are in {outputs.shown}" if outputs.array is not None and out.ok else ""
    else:
        store = FeatureStore(
            outputs.features,
            save_as or SaveAs.safetensors,
            settings=_settings(selection, computing),
            shard_inputs=shard_size or SHARD_INPUTS,
            resume=resume,
            overwrite=overwrite,
            prefix=prefix,
            upload=outputs.upload,
        )
        with store.connected(extractor):
            code = _run(out, extractor, chosen, store, outputs, on_error)
            message = f"features are in {outputs.shown}" if out.complete else store.stop()
    if message and ((out.ok and not quiet) or not out.complete):
        print_message(message)
    return chosen.exit_code(code)


def _settings(selection: FeatureSelection, computing: PipelineOptions) -> dict[str, object]:
    """Return what features depend on, besides the model."""
    sampling = media_run.sampling_of(computing)
    lengths = {"segments": sampling.segments, "every": sampling.every}
    windows = [f"{name} {length} s" for name, length in lengths.items() if length is not None]
    return {
        "stages": list(selection.stages) if selection.stages is not None else "all",
        "pool": selection.pool,
        "views": [sampling.clips, sampling.crops, sampling.stride, sampling.fps, *windows],
        "max pixels": sampling.max_pixels,
        "fast JPEG": sampling.fast_jpeg,
        "decoder": sampling.decoder,
        "attention": selection.attention,
    }


def _run(
    out: ResultStream,
    extractor: FeatureExtractor,
    chosen: InputSelection,
    store: FeatureStore | None,
    outputs: FeatureOutputs,
    on_error: OnError,
) -> int:
    """Extract the features of all inputs, or of the sample, and return the exit code."""
    from hiera_core.data import toy_datasets
    from hiera_core.viz import grid
    from hiera_core.viz.output_names import OutputNames

    shows_sample = chosen.are_none

    def listed() -> Iterator[sources.Source]:
        return sources.expand(chosen.inputs, recursive=chosen.recursive, ahead=True)

    in_folder = outputs.pictures is not None and not outputs.is_picture
    names = OutputNames(outputs.pictures, listed) if outputs.pictures and in_folder else None

    def save(record: Record) -> None:
        if record.result is not None:
            if store is not None:
                store.add(record)
            elif outputs.array is not None:
                _write_array(record, outputs.array)
                if outputs.upload is not None:
                    record.extra["file"] = {"name": outputs.upload.send(outputs.array)}
            else:
                _add_values(record)
            if outputs.pictures is not None:
                path = outputs.pictures if names is None else names.path(record, ".png")
                grid.save_png(record.thumbnails[0], path)
                record.extra["picture"] = str(path)
        record.lines = list(_text_lines(record))
        if shows_sample:
            record.notes.append(f"by {record.model}")
        record.result, record.thumbnails = None, []

    if shows_sample:
        expanded = iter([toy_datasets.sample(extractor.kinds[0])])
    else:
        expanded = chosen.sources(out.passed_over)
    if names is not None:
        expanded = names.assign(expanded)
    return out.write_all(extractor(expanded), save, stop=on_error is OnError.stop)


def _check_rows(
    selected: tuple[int, ...] | None, pooled: bool, attention: int | None, times: tuple[str, ...]
) -> None:
    """Check that the features of an input fit into a row.

    Raises:
        UsageError: They are maps or attention, of all stages, or of the parts of a video.
    """
    if not pooled or attention is not None or selected is None or times:
        raise UsageError(
            "a row holds vectors of the whole input: the embedding, or --stages with --pool mean",
            "write others with -o and --save-as",
        )


@contextlib.contextmanager
def _parse_outputs(
    output: str | None,
    save_as: SaveAs | None,
    visualize: Path | None,
    chosen: InputSelection,
    *,
    overwrite: bool,
) -> Iterator[FeatureOutputs]:
    """Yield what the options name. The file of a shard has the shard in its name.

    Raises:
        UsageError: Pictures are drawn, and the inputs are divided, so that names could meet; see
            also `FeatureOutputs.parse`, `FeatureOutputs.remote` and `check_division`.
        OutputError: A remote place does not answer.
    """
    if visualize is not None and chosen.is_numbered:
        raise UsageError(
            "--visualize goes with neither --shard nor --manifest", "draw in a run of its own"
        )
    if output is not None and is_remote(output):
        with FeatureOutputs.remote(
            output,
            save_as,
            visualize,
            overwrite=overwrite,
            prefix=chosen.prefix,
            check=chosen.check_names,
        ) as outputs:
            yield outputs
        return
    path = None if output is None else Path(output)
    outputs = FeatureOutputs.parse(path, save_as, visualize)
    if path is not None and outputs.is_file and not chosen.shard.is_whole:
        outputs = FeatureOutputs.parse(chosen.output(path), save_as, visualize)
    elif path is not None and not outputs.is_file:
        check_division(path, chosen.shard)
    yield outputs


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
        cell = feature.get("cell") if len(feature["shape"]) > 1 else None  # pooled: no cells
        note = f"a cell is {'x'.join(map(str, cell))} pixels" if cell else ""
        if cell and len(cell) == 3:
            note = f"a cell is {cell[0]} frames of {cell[1]}x{cell[2]} pixels"
        yield f"{name:9} {shape:14} {note}".rstrip()
    if "start" in record.extra:
        start, end = record.extra["start"], record.extra["end"]
        yield f"{counted(len(start), 'segment')}, {start[0]:.1f} to {end[-1]:.1f} s"
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
