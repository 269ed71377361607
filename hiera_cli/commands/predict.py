"""`hiera predict`: classify images and videos."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hiera_core.errors import UsageError
from hiera_core.records import Record

from .. import load_model, media_run, options, output_formats
from ..options import OnError
from ..output_files.picture_outputs import PictureOutput
from ..result_stream import ResultStream
from ..scale import scale_options
from ..scale.input_selection import InputSelection
from ..scale.scale_options import Engine


def predict(
    context: typer.Context,
    inputs: scale_options.InputsOpt = None,
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    topk: Annotated[
        int,
        typer.Option(
            "--topk", "-k", min=1, max=options.MAX_TOPK, help="Number of classes for each input."
        ),
    ] = 5,
    labels: Annotated[
        str | None,
        typer.Option(
            parser=options.parse_name,
            help="File with class names, one per line; also a URL.",
            metavar="FILE",
            show_default="the names that belong to the model",
        ),
    ] = None,
    recursive: options.RecursiveOpt = False,
    manifest: scale_options.ManifestOpt = None,
    path_column: scale_options.PathColumnOpt = None,
    id_column: scale_options.IdColumnOpt = None,
    private_urls: scale_options.PrivateUrlsOpt = False,
    clips: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_CLIPS,
            help="Number of clips, evenly spread over a video or segment.",
            show_default="5, or 1 with --segments",
        ),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_CROPS,
            help="Number of crops of each clip, evenly spread over its longer side.",
            show_default="3, or 1 with --segments",
        ),
    ] = None,
    stride: options.StrideOpt = None,
    fps: options.FpsOpt = None,
    segments: Annotated[
        float | None,
        typer.Option(
            help="Split videos into segments of this length, and also classify each segment.",
            metavar="SECONDS",
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            help="Classify videos with an image model, using one frame every SECONDS seconds.",
            metavar="SECONDS",
        ),
    ] = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    fast_jpeg: options.FastJpegOpt = False,
    decoder: options.DecoderOpt = options.Decoder.pillow,
    save_images: Annotated[
        str | None,
        typer.Option(
            parser=options.parse_place,
            help="Folder for images that show the results: annotated inputs, and contact sheets of "
            "videos. For a single input, it may be a .png file. Also a URL such as s3://bucket/x.",
            metavar="DIR|FILE",
        ),
    ] = None,
    output: options.ResultsOpt = None,
    format: options.FormatOpt = output_formats.Format.auto,
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = False,
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
    """Classify images and videos.

    This prints the most probable classes of each input, in the order of the inputs. Transparent
    images are placed on a white background. An animated image is a video for a model that takes
    videos; otherwise its first frame is used. The probabilities of a video are averaged over
    several clips and crops.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    media_run.check_counts(context)
    rows_run = media_run.row_run(context)
    chosen = rows_run.chosen
    rows_run.check(
        {"--output": output, "--save-images": save_images, "--format": format.value != "auto"}
    )
    class_names = None if labels is None else load_model.read_label_file(labels)
    if rows_run.is_wanted:
        load_model.check_model_name(model)
        from hiera_core.inference.columns import callables

        computing = media_run.pipeline_options(context, rows_run.device)
        on_columns = callables.Classifier(
            load_model.row_model(model, checkpoint, random_init),
            topk=topk,
            class_names=class_names,
            checkpoint=checkpoint,
            random_init=random_init,
            **computing,
        )
        settings = media_run.settings_of(computing, topk=topk)
        return chosen.exit_code(rows_run.run(context, on_columns, (), settings))
    pictures = _picture_output(save_images, chosen)
    path, upload = context.with_resource(chosen.output_of(output, overwrite))
    out = ResultStream(
        path,
        format,
        topk=topk,
        details=(*chosen.id_fields, *(["picture"] if pictures else [])),
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
        upload=upload,
    )
    context.with_resource(out.claim())
    out.count, out.is_numbered = chosen.count(), chosen.is_numbered
    out.may_be_empty, out.origin = not chosen.shard.is_whole, chosen.origin
    if pictures is not None:
        context.with_resource(pictures.claim(overwrite or resume))
        out.pictures = pictures.shown
    chosen.check()
    found = chosen.sources(out.passed_over)
    if pictures is not None:
        found = pictures.assign(found)
    load_model.check_model_name(model)
    if out.is_finished:
        named = load_model.models_by_kind(model, checkpoint, single_frames=every is not None)
        what = "random weights" if random_init else "the weights"
        note = "" if named and not random_init else f"; {what} are not compared"
        return chosen.exit_code(out.check_finished(found, named, note=note))
    from hiera_core.inference.model_fingerprint import model_fingerprint
    from hiera_core.inference.predict import Classifier, Predictor
    from hiera_core.viz.annotate import draw_record
    from hiera_core.viz.grid import save_png

    computing = media_run.pipeline_options(context, rows_run.device)
    predictor = Predictor(
        load_model.load_model("classifier", model, checkpoint, random_init),
        topk=topk,
        keep_thumbnails=pictures is not None,
        class_names=class_names,
        **computing,
    )

    def note_model(classifier: Classifier) -> None:
        if out.is_resumable:
            out.depends_on(classifier.kind, model_fingerprint(classifier))

    out.depends_on("settings", media_run.settings_of(computing, topk=topk))
    predictor.on_model(note_model)

    def save_picture(record: Record) -> None:
        if pictures is not None and record.thumbnails:
            (path,) = pictures.files(record, (".png",))
            save_png(draw_record(record), path)
            (record.extra["picture"],) = pictures.finish([path])
            record.lines = [f"-> {record.extra['picture']}"]

    records = predictor(out.skip_done(found))
    return chosen.exit_code(out.write_all(records, save_picture, stop=on_error is OnError.stop))


def _picture_output(save_images: str | None, chosen: InputSelection) -> PictureOutput | None:
    """Return what --save-images names.

    Raises:
        UsageError: There are no inputs, or they are divided, so that names could meet.
    """
    if not chosen.inputs and chosen.manifest is None:
        raise UsageError("there are no INPUTS", "name files or folders, or give --manifest FILE")
    if save_images is None:
        return None
    if chosen.is_numbered:
        raise UsageError(
            "--save-images goes with neither --shard nor --manifest", "draw in a run of its own"
        )
    return PictureOutput(save_images, chosen.inputs, chosen.recursive)
