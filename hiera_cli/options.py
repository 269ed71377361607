"""Options that several commands share, as Annotated types."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hiera_core.errors import UsageError, did_you_mean

from .output_formats import Format


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnError(StrEnum):
    skip = "skip"
    stop = "stop"


def auto_or_count(text: str) -> int | None:
    """`auto` -> None, `8` -> 8."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither auto nor a positive number")
    return int(text)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """--config: options from a YAML file become defaults, so the command line wins."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"config {str(path)!r} cannot be read ({reason})") from error
    if not isinstance(values, dict):
        raise UsageError(f"config {str(path)!r} holds no options", "write `option: value` lines")
    known = {_spelling(p): p for p in context.command.params if p.name != "config"}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        option = str(key).replace("_", "-")
        if option not in known:
            hint = did_you_mean(option, known) or f"options are {', '.join(sorted(known))}"
            raise UsageError(f"config {str(path)!r}: unknown option {key!r}", hint)
        defaults[str(known[option].name)] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _spelling(parameter: Any) -> str:
    """`--batch-size/-b` -> `batch-size`."""
    longest: str = max(parameter.opts, key=len)
    return longest.removeprefix("--").lower()


INPUTS_HELP = (
    "Pictures, videos, folders, globs, http(s) URLs, @list.txt, or - for standard input (paths, or "
    "one file)."
)
InputsArg = Annotated[
    list[str], typer.Argument(help=INPUTS_HELP, metavar="INPUTS", show_default=False)
]
RecursiveOpt = Annotated[
    bool, typer.Option("--recursive", "-r", help="Also folders within folders.")
]
OnErrorOpt = Annotated[
    OnError, typer.Option(help="skip: report a bad input and go on; stop: end there.")
]
MaxPixelsOpt = Annotated[
    int, typer.Option(min=1, help="Refuse larger pictures before decoding (width x height).")
]
MAX_PIXELS = 178_956_970  # as preprocess.image, which needs torch, has it
StrideOpt = Annotated[
    int | None,
    typer.Option(min=1, help="Frames between sampled ones at 30 a second (default: 4)."),
]
ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name from `hiera models` (NAME.CHECKPOINT picks one), hub repository, folder or "
        "file. (default: hiera_base_224, or what --checkpoint holds)",
    ),
]
CheckpointOpt = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Weights for the model: a tag, file, folder, URL or hub repository, in the naming of "
        "hiera-transformer, timm or transformers.",
    ),
]
RandomInitOpt = Annotated[
    bool,
    typer.Option("--random-init", help="Random weights: a dry run, the outputs mean nothing."),
]
DeviceOpt = Annotated[Device, typer.Option(help="Where to compute.")]
DtypeOpt = Annotated[
    Dtype,
    typer.Option(help="auto: fp16 on CUDA, bf16 on a CPU that has it natively, else fp32."),
]
BatchSizeOpt = Annotated[
    str,
    typer.Option(
        "--batch-size", "-b", metavar="auto|N", help="Inputs a pass. Out of memory halves it."
    ),
]
WorkersOpt = Annotated[
    str, typer.Option("--workers", "-j", metavar="auto|N", help="Decoding threads.")
]
CompileOpt = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Use torch.compile: slow start, then faster.")
]
OutputOpt = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File for the results (default: standard output)."),
]
FormatOpt = Annotated[
    Format,
    typer.Option(
        "--format", "-f", help="auto: by the output's ending; table on a terminal, else jsonl."
    ),
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Go on with the output of an interrupted run (jsonl).")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
ConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        help="YAML file with any of these options; the command line wins.",
    ),
]
