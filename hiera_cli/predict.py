"""`hiera predict`: the classes of pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from hiera_core import hub, zoo
from hiera_core import inputs as sources
from hiera_core.errors import UsageError
from hiera_core.labels import from_file

from . import load, options
from .errors import OK, SOME_FAILED
from .options import OnError, auto_or_count
from .output import Output, check_folder


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, videos, folders, globs, http(s) URLs, @list.txt, or - for standard "
            "input (paths, or one file).",
            metavar="INPUTS",
            show_default=False,
        ),
    ],
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes for each input.")] = 5,
    labels: Annotated[
        str | None, typer.Option(help="File with class names, one a line.", metavar="FILE")
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also folders within folders.")
    ] = False,
    clips: Annotated[
        int | None,
        typer.Option(min=1, help="Clips along a video (default: 5; 1 a segment)."),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(min=1, help="Crops of each clip (default: 3; 1 in segments)."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Frames between sampled ones at 30 a second (default: 4)."),
    ] = None,
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
    on_error: Annotated[
        OnError, typer.Option(help="skip: report a bad input and go on; stop: end there.")
    ] = OnError.skip,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse larger pictures before decoding (width x height).")
    ] = 178_956_970,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="Write annotated pictures, and contact sheets of videos, to a folder.",
            metavar="DIR",
        ),
    ] = None,
    output: options.OutputOpt = None,
    format: options.FormatOpt = options.Format.auto,
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
    out = Output(output, format, topk=topk, overwrite=overwrite, resume=resume, quiet=quiet)
    if save_images is not None:
        check_folder(save_images, overwrite or resume)
    sources.check(inputs, recursive=recursive)
    names = from_file(labels) if labels else None
    if model is not None and not hub.is_place(model):
        zoo.get(zoo.split_tag(model)[0])  # a mistyped name is found before torch is imported
    from hiera_core import annotate
    from hiera_core.predictor import Predictor
    from hiera_core.preprocess.video import Sampling

    predictor = Predictor(
        load.classifier(model, checkpoint, random_init),
        sampling=Sampling(clips, crops, stride, segments, every, max_pixels),
        topk=topk,
        workers=threads,
        keep_shots=save_images is not None,
        device=device,
        dtype=dtype,
        batch_size=batch,
        class_names=names,
        compile=compile,
    )
    with out:
        for record in predictor(out.skip_done(sources.expand(inputs, recursive=recursive))):
            record.index += out.done
            if save_images is not None and record.shots:
                annotate.save(record, save_images)
            out.record(record)
            if record.error is not None and on_error is OnError.stop:
                out.whole = False
                break
    if not (out.ok or out.failed):
        raise UsageError("no inputs", "the list, pattern or standard input holds none")
    out.closing_line()
    return SOME_FAILED if out.failed else OK
