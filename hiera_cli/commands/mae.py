"""`hiera mae`: what an autoencoder makes of what it cannot see."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated

import typer

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.records import Record

from .. import load_model, options, output_formats
from ..exit_codes import print_message
from ..options import OnError, auto_or_count
from ..results import ResultStream, check_folder

SCALED = (
    "patches are shown with the true mean and contrast, since the models predict normalised pixels"
)


def mae(
    inputs: options.InputsArg,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the pictures.", show_default=False),
    ],
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of mask units that are hidden, in (0, 1). (default: 0.6 for pictures, 0.9 "
            "for video)"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the mask, which is the same for every input.")
    ] = 0,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Show what the decoder drew in visible patches too."),
    ] = False,
    only: Annotated[
        bool,
        typer.Option("--reconstruction-only", help="Not beside original and masked, at its size."),
    ] = False,
    recursive: options.RecursiveOpt = False,
    stride: options.StrideOpt = None,
    on_error: options.OnErrorOpt = OnError.skip,
    max_pixels: options.MaxPixelsOpt = options.MAX_PIXELS,
    format: options.FormatOpt = output_formats.Format.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
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
    """Hide parts of pictures and videos and show how a masked autoencoder fills them in.

    A picture becomes a PNG: original, masked, reconstruction. Of a video the centre clip becomes an
    MP4 of the three, at the rate of the frames that are predicted, and a PNG of them all. The
    models predict pixels normalised by each patch's own mean and deviation; they are shown with
    the original's, so colours and contrast are given, and the content is the model's.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_count(workers)
    _check_ratio(mask_ratio)
    out = ResultStream(None, format, details=("mae", "files"), quiet=quiet)
    check_folder(output, overwrite)
    sources.check_inputs(inputs, recursive=recursive)
    row = load_model.check_model_name(model)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference import reconstruct
    from hiera_core.models.masking import check_mask_ratio

    if mask_ratio is not None:  # before weights load
        defaults = map(zoo.get, reconstruct.Reconstructor.default_models.values())
        for known in [row] if row else defaults if model is None and checkpoint is None else []:
            if known.autoencoder:
                check_mask_ratio(mask_ratio, reconstruct.mask_units(known))
    pipeline = reconstruct.Reconstructor(
        load_model.load_model("autoencoder", model, checkpoint, random_init),
        mask_ratio=mask_ratio,
        seed=seed,
        raw=raw,
        sampling=Sampling(stride=stride, max_pixels=max_pixels),
        workers=threads,
        device=device,
        dtype=dtype,
        batch_size=batch,
        compile=compile,
    )

    def each(record: Record) -> None:
        files = reconstruct.save_reconstruction(record, output, pipeline.runner(record.kind), only)
        record.extra["files"] = [str(file) for file in files]
        found = record.extra["mae"]
        record.lines = [
            f"loss {found['loss']:.4f}, mask ratio {found['mask_ratio']:g}: {found['visible']} "
            f"units visible, {found['masked']} masked",
            *(f"-> {file}" for file in files),
        ]
        record.result = None

    code = out.write_all(
        pipeline(sources.expand(inputs, recursive=recursive)), each, stop=on_error is OnError.stop
    )
    if out.ok and not quiet:
        print_message(SCALED)
    return code


def _check_ratio(ratio: float | None) -> None:
    """As `mae.check_mask_ratio`, which needs torch."""
    if ratio is not None and not (math.isfinite(ratio) and 0 < ratio < 1):
        raise UsageError(f"mask ratio {ratio} is outside (0, 1)", "use 0.6, or 0.9 for video")
