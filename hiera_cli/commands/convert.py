"""`hiera convert`: a checkpoint in another format, proven."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hiera_core.conversion import formats

from .. import load_model, options
from ..exit_codes import OK
from ..options import Dtype
from ..output_formats import Format, write_rows

if TYPE_CHECKING:
    from hiera_core.conversion.converter import Conversion
    from hiera_core.conversion.verify import Proof


class Target(StrEnum):
    hub = "hub"
    pth = "pth"
    timm = "timm"
    transformers = "transformers"
    onnx = "onnx"
    pt2 = "pt2"


class Verify(StrEnum):
    auto = "auto"
    forward = "forward"


class Resample(StrEnum):
    absolute_window = "absolute-window"
    bicubic = "bicubic"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Name from `hiera models` (NAME.CHECKPOINT picks one), hub repository, folder, "
            "URL or file, in the naming of hiera-transformer, timm or transformers.",
            show_default=False,
        ),
    ],
    dest: Annotated[
        Path,
        typer.Argument(
            help="What to write: a folder for hub, timm and transformers, else a file.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="hub: safetensors and config.json of hiera-transformer and this package; pth: its "
            "older form; timm, transformers: what these libraries load; onnx, pt2: programs with "
            "any batch size, from normalised pixels to logits.",
            show_default=False,
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels: 384 or 224x448 (y, x); for video with frames, 16x256 or "
            "16x224x288. (default: the source's)",
            metavar="SIZE",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Precision of the weights; auto: the source's (onnx and pt2: fp32)."),
    ] = Dtype.auto,
    resample: Annotated[
        Resample,
        typer.Option(
            help="How position embeddings come to another size: what repeats in every window tiles "
            "and the rest is interpolated, or all is interpolated."
        ),
    ] = Resample.absolute_window,
    verify: Annotated[
        Verify,
        typer.Option(
            help="auto: tensors bit by bit; where values or the program change, answers on real "
            "pictures, by the target's own library. forward: answers in any case."
        ),
    ] = Verify.auto,
    pictures: Annotated[
        list[str] | None,
        typer.Option(
            help="Pictures to compare answers on (files, folders, globs; again for more). "
            "(default: a photograph and the samples that ship here)",
            metavar="PATH",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Publish the result in a hub repository too.", metavar="REPO"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST.")] = False,
    format: options.FormatOpt = Format.auto,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Write a checkpoint in another format, size or precision, and prove it is the same model.

    DEST appears when it is proven, or not at all.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.WARNING)
    pixels = None if size is None else formats.parse_size(size)
    formats.check_destination(dest, to, dtype=dtype, overwrite=overwrite)
    load_model.check_model_name(source)
    from hiera_core.conversion import converter

    done = converter.convert(
        source,
        dest,
        to,
        size=pixels,
        dtype=dtype,
        resample=resample.value,
        verify=verify,
        pictures=pictures or (),
        overwrite=overwrite,
        push_to_hub=push_to_hub,
    )
    if format is Format.auto:
        format = Format.table if sys.stdout.isatty() else Format.jsonl
    sys.stdout.write(render(done, format))
    return OK


def render(done: Conversion, format: Format) -> str:
    """What was written and how it was proven."""
    values = done.to_json()
    if format is Format.json:
        return json.dumps(values, indent=2) + "\n"
    if format is not Format.table:
        proof = {f"proof_{k}": v for k, v in values.pop("proof").items()}
        row: dict[str, Any] = {**values, **proof} if format is Format.csv else done.to_json()
        return write_rows([row], list(row), format)
    size = "x".join(map(str, done.input_size))
    lines = [
        f"{done.output}: {done.model} for {done.format}, {size}, {done.dtype}, "
        f"{done.bytes / 1e6:.1f} MB",
        *(f"  {note}" for note in done.notes),
        *(f"  {line}" for line in proof_lines(done.proof)),
    ]
    if done.url:
        lines.append(f"  published at {done.url}")
    return "\n".join(lines) + "\n"


def proof_lines(proof: Proof) -> list[str]:
    """A proof in words."""
    lines = []
    if proof.tensors is not None:
        lines.append(f"proven: all {proof.tensors} tensors read back bit for bit")
    if proof.max_difference is not None:
        off = (
            f"differ by at most {proof.max_difference:.1g}" if proof.max_difference else "are equal"
        )
        lines.append(
            f"proven: {proof.reader} on {proof.samples}: {proof.what} {off}"
            + _same(proof.agree, proof.inputs)
        )
    if proof.cost is not None:
        what = "features" if proof.what == "features" else "probabilities"
        lines.append(
            f"cost: {what} differ from the source's by at most {proof.cost.max_difference:.2g}"
            + _same(proof.cost.agree, proof.inputs)
        )
    return lines


def _same(agree: int | None, inputs: int) -> str:
    return "" if agree is None else f", top-1 the same on {agree} of {inputs}"
