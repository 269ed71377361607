"""`hiera predict`: the classes of pictures."""

from __future__ import annotations

import itertools
import logging
from typing import Annotated, Any

import typer

from hiera_core import hub, zoo
from hiera_core import inputs as sources
from hiera_core.errors import UsageError
from hiera_core.labels import from_file

from . import options
from .errors import OK, SOME_FAILED, say
from .options import OnError, auto_or_count
from .output import Output


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders, globs, http(s) URLs, @list.txt, or - for standard input "
            "(paths, or one picture).",
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
    on_error: Annotated[
        OnError, typer.Option(help="skip: report a bad input and go on; stop: end there.")
    ] = OnError.skip,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse larger pictures before decoding (width x height).")
    ] = 178_956_970,
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
    """Name what is on pictures: the most probable classes of each, in input order.

    Transparent pictures are seen on white; of animations, the first frame.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_count(workers)
    out = Output(output, format, topk=topk, overwrite=overwrite, resume=resume, quiet=quiet)
    sources.check(inputs, recursive=recursive)
    names = from_file(labels) if labels else None
    if model is not None and not hub.is_place(model):
        zoo.get(zoo.split_tag(model)[0])  # a mistyped name is found before torch is imported
    from hiera_core.predictor import Predictor

    built = _model(model, checkpoint, random_init)
    predictor = Predictor(
        built,
        device=device,
        dtype=dtype,
        batch_size=batch,
        workers=threads,
        topk=topk,
        class_names=names,
        max_pixels=max_pixels,
        compile=compile,
    )
    with out:
        stream = sources.expand(inputs, recursive=recursive)
        todo = itertools.islice(stream, out.done, None)
        for record in predictor(todo):
            record.index += out.done
            out.record(record)
            if record.error is not None and on_error is OnError.stop:
                out.whole = False
                break
    if not (out.done or out.ok or out.failed):
        raise UsageError("no inputs", "the list, pattern or standard input holds none")
    out.closing_line()
    return SOME_FAILED if out.failed else OK


def _model(model: str | None, checkpoint: str | None, random_init: bool) -> Any:
    from hiera_core import factory, weights

    if random_init:
        import torch

        if checkpoint is not None or (model is not None and hub.is_place(model)):
            raise UsageError("--random-init takes no weights", "give a name from `hiera models`")
        say("--random-init: weights are random, the outputs mean nothing")
        torch.manual_seed(0)  # but the same in every run
        return factory.create_model(model or zoo.DEFAULT_IMAGE_MODEL)
    if checkpoint is None:
        return factory.create_model(model or zoo.DEFAULT_IMAGE_MODEL, pretrained=True)
    if model is None:
        return factory.from_checkpoint(weights.read(checkpoint))
    return factory.create_model(model, pretrained=True, checkpoint=checkpoint)
