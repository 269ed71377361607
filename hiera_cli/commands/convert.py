"""`hiera convert`: convert a checkpoint to another format, and verify the result."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core.conversion import formats
from hiera_core.errors import UsageError
from hiera_core.plain_data import to_json
from hiera_core.zoo.input_sizes import parse_size

from .. import completion, help_text, load_model, options
from ..exit_codes import OK
from ..options import Dtype
from ..output_formats import Format, print_text, resolve_format, write_rows
from ..text_tables import stdout_width, wrap_line

if TYPE_CHECKING:
    from hiera_core.conversion.converter import Conversion
    from hiera_core.conversion.verify import Proof


class Target(StrEnum):
    """Values of --to."""

    hub = "hub"
    pth = "pth"
    timm = "timm"
    transformers = "transformers"
    sam2 = "sam2"
    onnx = "onnx"
    pt2 = "pt2"
    aoti = "aoti"


class Verify(StrEnum):
    """Values of --verify."""

    auto = "auto"
    forward = "forward"


class Resample(StrEnum):
    """Values of --resample."""

    absolute_window = "absolute-window"
    bicubic = "bicubic"


def _parse_dest(text: str) -> str:
    """Return DEST as it was written: a slash at its end names a folder.

    Raises:
        BadParameter: See `options.parse_path`.
    """
    options.parse_path(text)
    return text


def convert(
    source: Annotated[
        str,
        typer.Argument(
            parser=options.parse_name,
            help="What to convert: name from `hiera models` (NAME.CHECKPOINT chooses one of its "
            "checkpoints), hub repository, folder (./NAME if it is named like a model), URL or "
            "file, with parameters named as in hiera-transformer, timm or transformers.",
            metavar="SOURCE",
            autocompletion=completion.models,
            show_default=False,
        ),
    ],
    dest: Annotated[
        str,
        typer.Argument(
            parser=_parse_dest,
            help="What to write: a folder for hub, timm and transformers, else a file.",
            metavar="DEST",
            show_default=False,
        ),
    ],
    to: Annotated[
        Target | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="Format of DEST. hub: safetensors and config.json, for hiera-transformer and this "
            "package. pth: the older format of hiera-transformer. timm, transformers: a folder "
            "that these libraries load. sam2: a file named as in Meta's files of SAM 2. onnx, pt2: "
            "a program that computes what --returns names from normalised pixels, for any batch "
            "size up to a limit that depends on the model. aoti: the same, compiled for this "
            "machine's CPU and for one batch size.",
            show_default="by the extension of DEST: .onnx, .pt2 or .pth",
        ),
    ] = None,
    returns: Annotated[
        str | None,
        typer.Option(
            help="What a program returns, one or several: logits, probabilities, embedding, maps "
            "(of all stages), reconstruction (of an autoencoder, from the mask units that are its "
            "second input).",
            metavar="NAME,NAME",
            autocompletion=completion.returns,
            show_default="logits; embedding without a head, reconstruction of an autoencoder, "
            "maps of SAM 2",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels: 384, or 224x448 for height x width. For videos, also the "
            "number of frames: 16x256 or 16x224x288.",
            metavar="SIZE",
            show_default="the size of the source",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="DTYPE",
            help="Data type of the weights: fp32, bf16 or fp16. auto: that of the source, but fp32 "
            "for onnx, pt2 and aoti.",
        ),
    ] = Dtype.auto,
    resample: Annotated[
        Resample,
        typer.Option(
            metavar="METHOD",
            help="How position embeddings are resized for another --size. absolute-window: tile "
            "the part that repeats in every window, and interpolate the rest. bicubic: interpolate "
            "all of it.",
        ),
    ] = Resample.absolute_window,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Size of every batch that an aoti program takes.",
            metavar="N",
            show_default="1",
        ),
    ] = None,
    verify: Annotated[
        Verify,
        typer.Option(
            help="How DEST is verified. auto: the tensors of a weights file are compared bit by "
            "bit. If values change, or DEST is a program, the library that DEST is for computes "
            "outputs on real images, and these are compared. forward: outputs are compared in any "
            "case."
        ),
    ] = Verify.auto,
    pictures: Annotated[
        list[str] | None,
        typer.Option(
            help="Images to compare outputs on: files, folders or globs. May be given several "
            "times.",
            metavar="PATH",
            show_default="a photograph and digits that ship in the package",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Also upload the result to this hub repository.", metavar="REPO"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DEST if it exists.")
    ] = False,
    format: options.PrintFormatOpt = Format.auto,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Convert a checkpoint to another format, input size or precision, and verify the result.

    DEST is written only if the verification shows that it holds the intended model.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.WARNING)
    pixels = None if size is None else parse_size(size)
    names = [part.strip() for part in (returns or "").split(",") if part.strip()]
    if returns is not None and not names:
        raise UsageError("--returns names no output", f"use {', '.join(formats.OUTPUTS)}")
    chosen = to or formats.format_of(dest)
    if chosen is None:
        in_folder = "for a .safetensors file: --to hub writes a folder that holds one"
        example = f"for example: {help_text.EXAMPLES['convert'][0]}"
        raise UsageError(
            f"Missing option '--to'. Choose from: {', '.join(Target)}",
            in_folder if dest.lower().endswith(".safetensors") else example,
        )
    formats.check_ending(dest, chosen)
    formats.check_destination(Path(dest), chosen, dtype=dtype, overwrite=overwrite)
    formats.check_program_options(chosen, names, batch_size)
    load_model.check_model_name(source)
    from hiera_core.conversion import converter

    conversion = converter.convert(
        source,
        dest,
        chosen,
        size=pixels,
        dtype=dtype,
        resample=resample.value,
        verify=verify,
        pictures=pictures or (),
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        returns=names,
        batch_size=batch_size,
    )
    print_text(render(conversion, resolve_format(format, None), stdout_width()))
    return OK


def render(conversion: Conversion, format: Format, width: int | None = None) -> str:
    """Return what was written, and how it was verified, as text in a format. Lines of text are
    broken at `width` characters."""
    values = conversion.to_json()
    if format is Format.json:
        return to_json(values, indent=2) + "\n"
    if format is Format.csv:
        proof = {f"proof_{k}": v for k, v in conversion.proof.to_json().items()}
        del values["proof"]
        values |= proof
    if format is not Format.table:
        return write_rows([values], list(values), format)
    size = "x".join(map(str, conversion.input_size))
    lines = [
        f"{conversion.output}: {conversion.model} for {conversion.format}, {size}, "
        f"{conversion.dtype}, {conversion.bytes / 1e6:.1f} MB",
        *(f"  {note}" for note in conversion.notes),
        *(f"  {line}" for line in proof_lines(conversion.proof)),
    ]
    if conversion.url:
        lines.append(f"  published at {conversion.url}")
    return "".join(f"{part}\n" for line in lines for part in wrap_line(line, width, 4))


def proof_lines(proof: Proof) -> list[str]:
    """Return a proof as lines of text."""
    lines = []
    if proof.tensors is not None:
        lines.append(f"proven: all {proof.tensors} tensors read back bit for bit")
    if proof.max_difference is not None:
        result = (
            f"differ by at most {proof.max_difference:.1g}" if proof.max_difference else "are equal"
        )
        lines.append(
            f"proven: {proof.reader} on {proof.samples}: {proof.what} {result}"
            + _agreement(proof.agree, proof.inputs)
        )
    if proof.cost is not None:
        what = "embeddings" if proof.what.startswith("embeddings") else "probabilities"
        lines.append(
            f"cost: {what} differ from the source's by at most {proof.cost.max_difference:.2g}"
            + _agreement(proof.cost.agree, proof.inputs)
        )
    return lines


def _agreement(agree: int | None, inputs: int) -> str:
    """Return how many inputs have the same top-1 class, as text; "" if there are no classes."""
    return "" if agree is None else f", top-1 the same on {agree} of {inputs}"
