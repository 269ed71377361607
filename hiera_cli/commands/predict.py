"""`hiera predict`: the classes of pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from hiera_core.data import sources
from hiera_core.records import Record
from hiera_core.zoo.labels import read_labels

from .. import load_model, options, output_formats
from ..options import OnError, auto_or_count
from ..results import ResultStream, check_folder


def predict(
    inputs: options.InputsArg,
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes for each input.")] = 5,
    labels: Annotated[
        str | None, typer.Option(help="File with class names, one a line.", metavar="FILE")
    ] = None,
    recursive: options.RecursiveOpt = False,
    clips: Annotated[
        int | None,
        typer.Option(min=1, help="Clips along a video (default: 5; 1 a segment)."),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(min=1, help="Crops of each clip (default: 3; 1 in segments)."),
    ] = None,
    stride: options.StrideOpt = None,
    segments: Annotated[
        float | None,
        typer.Option(help="Label videos in pieces of so many seconds.", metavar="SECONDS"),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            help="Show an image model one frame of videos every so many seconds.", metavar="SECONDS"
        ),
    ] = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="Write annotated pictures, and contact sheets of videos, to a folder.",
            metavar="DIR",
        ),
    ] = None,
    output: options.OutputOpt = None,
    format: options.FormatOpt = output_formats.Format.auto,
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = False,
    device: options.DeviceOpt = options.Device.auto,
    dtype: options.DtypeOpt = options.Dtype.auto,
    batch_size: options.BatchSizeOpt = "auto",
    workers: options.WorkersOpt = "auto",
    compile: options.CompileOpt = False,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Name what is on pictures and in videos: the most probable classes of each, in input order.

    Transparent pictures are seen on white; of animations, the first frame. Videos are seen in 5
    clips x 3 crops.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_count(workers)
    out = ResultStream(output, format, topk=topk, overwrite=overwrite, resume=resume, quiet=quiet)
    if save_images is not None:
        check_folder(save_images, overwrite or resume)
    sources.check_inputs(inputs, recursive=recursive)
    names = read_labels(labels) if labels else None
    load_model.check_model_name(model)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference.predict import Predictor
    from hiera_core.viz import annotate

    predictor = Predictor(
        load_model.load_model("classifier", model, checkpoint, random_init),
        sampling=Sampling(clips, crops, stride, segments, every, max_pixels),
        topk=topk,
        workers=threads,
        keep_thumbnails=save_images is not None,
        device=device,
        dtype=dtype,
        batch_size=batch,
        class_names=names,
        compile=compile,
    )

    def each(record: Record) -> None:
        if save_images is not None and record.thumbnails:
            annotate.save_annotated(record, save_images)

    records = predictor(out.skip_done(sources.expand(inputs, recursive=recursive)))
    return out.write_all(records, each, stop=on_error is OnError.stop)
