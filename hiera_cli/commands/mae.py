"""`hiera mae`: reconstruct masked images and videos."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.models.masking import check_mask_ratio
from hiera_core.plain_data import counted
from hiera_core.records import Record

from .. import load_model, media_run, options, output_formats
from ..exit_codes import print_message
from ..options import OnError
from ..output_files.picture_outputs import PictureOutput
from ..progress import InputCount
from ..result_stream import ResultStream

SCALED = (
    "each hidden patch is shown with its true mean brightness and contrast; its colours and its "
    "content are predicted"
)


def mae(
    context: typer.Context,
    inputs: options.InputsArg,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            parser=options.parse_place,
            metavar="DIR|FILE",
            help="Folder for the results; or, for a single input, a file: .png, or .mp4 for the "
            "movie of a video. Also a URL such as s3://bucket/folder/.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        options.model_option(
            f"mae_{zoo.DEFAULT_IMAGE_MODEL} for images, mae_{zoo.DEFAULT_VIDEO_MODEL} for videos"
        ),
    ] = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the mask units that are hidden, between 0 and 1.",
            show_default="0.6 for images, 0.9 for videos",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=options.parse_seed,
            metavar="N",
            help="Seed of the mask. All inputs get the same mask.",
        ),
    ] = 0,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Show the output of the decoder everywhere. Without this, visible patches show "
            "the original.",
        ),
    ] = False,
    reconstruction_only: Annotated[
        bool,
        typer.Option(
            "--reconstruction-only",
            help="Write the reconstruction alone, at its own size, without the original and the "
            "masked input beside it.",
        ),
    ] = False,
    recursive: options.RecursiveOpt = False,
    stride: options.StrideOpt = None,
    fps: options.FpsOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    decoder: options.DecoderOpt = options.Decoder.pillow,
    format: options.PrintFormatOpt = output_formats.Format.auto,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the file, or write into a folder that is not empty."
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
    """Mask parts of images and videos, and reconstruct them with a masked autoencoder.

    For an image, this writes a PNG file with the original, the masked image and the reconstruction.
    For a video, it takes the centre clip, and writes an MP4 file with the three side by side, at
    the rate of the predicted frames, and a PNG file with all frames.

    The models predict pixels that are normalised by the mean and standard deviation of each patch.
    For display, the normalisation is undone with the mean and standard deviation of the original
    patch. So the brightness and contrast of a patch are those of the original, and its colours and
    its content are predicted.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    media_run.check_counts(context)
    if mask_ratio is not None:
        check_mask_ratio(mask_ratio)
    out = ResultStream(None, format, details=("mae", "files"), quiet=quiet)
    pictures = PictureOutput(output, inputs, recursive, endings=(".png", ".mp4"))
    context.with_resource(pictures.claim(overwrite))
    out.count, out.pictures = InputCount(inputs, recursive), pictures.shown
    sources.check_inputs(inputs, recursive=recursive)
    found = sources.expand(inputs, recursive=recursive, passed_over=out.passed_over)
    found = pictures.assign(found)
    entry = load_model.check_model_name(model)
    from hiera_core.inference import reconstruct

    if mask_ratio is not None:
        _check_mask_units(mask_ratio, entry, defaults=model is None and checkpoint is None)
    pipeline = reconstruct.Reconstructor(
        load_model.load_model("autoencoder", model, checkpoint, random_init),
        mask_ratio=mask_ratio,
        seed=seed,
        raw=raw,
        **media_run.pipeline_options(context),
    )

    def save(record: Record) -> None:
        runner = pipeline.runner(record.kind)
        files = pictures.files(record, reconstruct.FILE_ENDINGS[record.kind])
        reconstruct.save_reconstruction(record, files, runner, reconstruction_only)
        record.extra["files"] = pictures.finish(files)
        facts = record.extra["mae"]
        record.lines = [
            f"loss {facts['loss']:.4f}, mask ratio {facts['mask_ratio']:g}: "
            f"{counted(facts['visible'], 'unit')} visible, {facts['masked']} masked",
            *(f"-> {file}" for file in record.extra["files"]),
        ]
        record.result = None

    code = out.write_all(pipeline(found), save, stop=on_error is OnError.stop)
    if out.ok and not quiet:
        print_message(SCALED)
    return code


def _check_mask_units(ratio: float, entry: zoo.ModelEntry | None, *, defaults: bool) -> None:
    """Check that a mask ratio suits the number of mask units of a model, before weights are loaded.

    Args:
        ratio: The mask ratio.
        entry: The model's entry in the zoo, if it is known.
        defaults: The default models may be used, so check these.

    Raises:
        UsageError: The ratio leaves no visible or no masked unit.
    """
    from hiera_core.inference import reconstruct

    entries = [entry] if entry is not None else []
    if defaults:
        entries += map(zoo.get, reconstruct.Reconstructor.default_models.values())
    for candidate in entries:
        if candidate.autoencoder:
            check_mask_ratio(ratio, reconstruct.mask_units(candidate))
