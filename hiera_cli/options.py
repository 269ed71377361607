"""Options that several commands share, as Annotated types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from hiera_core import zoo
from hiera_core.errors import UsageError, did_you_mean
from hiera_core.places.remote_requests import REMOTE as URL
from hiera_core.places.remote_requests import is_remote, is_web
from hiera_core.plain_data import read_yaml

from . import completion
from .output_formats import Format

# Largest values. Beyond them a command would only use up the memory, or never end.
MAX_BATCH_SIZE = 1_000_000
MAX_WORKERS = 4096
MAX_TOPK = 100_000
MAX_CLIPS, MAX_CROPS = 1000, 100
MAX_STRIDE = 1_000_000
MAX_SHARD = 1_000_000
MAX_SEED = 2**63 - 1  # what PyTorch takes
STANDARD_STREAM = "-"
STANDARD_OUTPUT = (STANDARD_STREAM, "/dev/stdout")


class Device(StrEnum):
    """Values of --device. A number may follow `cuda` and `xpu`, as in cuda:1, or `:all`. Several
    can be named, as in cuda:0,cuda:2."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"
    xpu = "xpu"


class Dtype(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnError(StrEnum):
    """Values of --on-error."""

    skip = "skip"
    stop = "stop"


class Decoder(StrEnum):
    """Values of --decoder."""

    pillow = "pillow"
    nvjpeg = "nvjpeg"
    torchcodec = "torchcodec"


def auto_or_count(
    text: str, most: int = MAX_BATCH_SIZE, option: str = "--batch-size"
) -> int | None:
    """Parse a number: `auto` -> None, `8` -> 8.

    Args:
        text: The value of the option.
        most: Largest number.
        option: Name of the option, for messages.

    Raises:
        BadParameter: The text is neither `auto` nor a positive number, or the number is above
            `most`.
    """
    if text == "auto":
        return None
    number = parse_number(text)
    if not number:
        message = f"{text!r} is neither auto nor a positive number"
        raise typer.BadParameter(message, param_hint=option)
    if number > most:
        message = f"{number} is too large; give a number of at most {most}"
        raise typer.BadParameter(message, param_hint=option)
    return number


def auto_or_workers(text: str) -> int | None:
    """Parse the value of --workers; see `auto_or_count`."""
    return auto_or_count(text, MAX_WORKERS, "--workers")


def parse_number(text: str) -> int | None:
    """Return a number that is written in decimal digits, or None for any other text.

    `str.isdigit` also accepts digits that `int` does not, such as `²`.
    """
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def parse_seed(text: object) -> int:
    """Return a seed.

    Raises:
        BadParameter: The text is not a number from 0 to `MAX_SEED`.
    """
    if re.fullmatch(r"[0-9]{1,19}", str(text)) and int(str(text)) <= MAX_SEED:
        return int(str(text))
    raise typer.BadParameter(f"{str(text)[:80]!r} is not a number from 0 to {MAX_SEED}")


def parse_device(text: str) -> str:
    """Check the name of a device.

    Raises:
        BadParameter: It is none of `Device`, nor several of them.
    """
    for part in text.split(","):
        kind, colon, which = part.partition(":")
        is_numbered = kind in (Device.cuda, Device.xpu)
        is_known = which == "all" or parse_number(which) is not None
        if kind not in list(Device) or (colon and not (is_numbered and is_known)):
            raise typer.BadParameter(
                f"{text!r} is not one of auto, cpu, cuda, cuda:N, cuda:all, mps, xpu"
            )
    return text


def parse_name(text: str) -> str:
    """Return the name of a model or of weights.

    Raises:
        BadParameter: The text is empty. As a path, it would be this folder.
    """
    if not text:
        raise typer.BadParameter("the name is empty")
    return text


def parse_path(text: str) -> Path:
    """Return the path of an option.

    Raises:
        BadParameter: The text is empty, which as a path would be this folder, or `-`, which means a
            standard stream elsewhere.
    """
    if not text:
        raise typer.BadParameter("the path is empty")
    if text == STANDARD_STREAM:
        raise typer.BadParameter("'-' is no file or folder; name one, or ./- for one of this name")
    if URL.match(text):
        raise typer.BadParameter(f"{text} is a URL; name a file or folder on this machine")
    return Path(text)


def parse_place(text: str) -> str:
    """Return the text of an option that names a file or folder, on this machine or at a remote
    place; `out.v2/` is a folder.

    Raises:
        BadParameter: See `parse_path`; or it is a URL of the web or file://, which are not written.
    """
    if URL.match(text) and not is_remote(text):
        raise typer.BadParameter(f"{text} cannot be written; name a file, a folder or s3://...")
    if not is_remote(text):
        parse_path(text)
    return text


def parse_input_file(text: str) -> str:
    """Return the text of an option that names a file to read, on this machine, in the web or at a
    remote place.

    Raises:
        BadParameter: See `parse_path`.
    """
    if not (is_remote(text) or is_web(text)):
        parse_path(text)
    return text


def parse_results(text: str) -> str | None:
    """Return the text of a file to write, see `parse_place`; None for standard output."""
    return None if text in STANDARD_OUTPUT else parse_place(text)


def parse_output(text: str) -> Path | None:
    """Return the path of a file to write; None for `-` or /dev/stdout, standard output.

    Raises:
        BadParameter: The text is empty.
    """
    return None if text in STANDARD_OUTPUT else parse_path(text)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read the YAML file of --config. Its values become the defaults of the command's options, so
    that the command line takes precedence.

    Raises:
        UsageError: The file cannot be read, or holds an option that the command does not have, or
            a value that no option can have.
    """
    if path is None:
        return None
    try:
        values = read_yaml(path) or {}
    except (OSError, ValueError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise UsageError(f"config {str(path)!r} cannot be read ({reason})") from error
    if not isinstance(values, dict):
        raise UsageError(f"config {str(path)!r} holds no options", "write `option: value` lines")
    known = {_option_name(p.opts): p for p in context.command.params if p.name != "config"}
    defaults: dict[str, object] = {}
    for key, value in values.items():
        option = str(key).replace("_", "-")
        if option not in known:
            hint = did_you_mean(option, known) or f"options are {', '.join(sorted(known))}"
            raise UsageError(f"config {str(path)!r}: unknown option {key!r}", hint)
        parameter = known[option]
        is_list = parameter.multiple or parameter.nargs == -1
        items = value if is_list and isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in items):
            raise UsageError(f"config {str(path)!r}: {option} takes a single value")
        # As text, so that a value means what it means on the command line.
        texts = [_as_text(item) for item in items if item is not None]
        if texts:
            defaults[str(parameter.name)] = texts if is_list else texts[0]
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _as_text(value: object) -> str:
    """Return a value of a YAML file as one would type it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_name(spellings: Sequence[str]) -> str:
    """Return the long name of an option: (`--batch-size`, `-b`) -> `batch-size`."""
    return max(spellings, key=len).removeprefix("--").lower()


# Inputs -----------------------------------------------------------------------------------------

INPUTS_HELP = (
    "Images and videos: files, folders, globs, tar files, http(s) URLs, @list.txt for a file with "
    "one path per line, @list.csv for a table, or - for standard input (paths, or the content of "
    "one file)."
)
InputsArg = Annotated[
    list[str], typer.Argument(help=INPUTS_HELP, metavar="INPUTS", show_default=False)
]
RecursiveOpt = Annotated[bool, typer.Option("--recursive", "-r", help="Also read subfolders.")]
OnErrorOpt = Annotated[
    OnError,
    typer.Option(help="What to do if an input cannot be processed: skip it and continue, or stop."),
]
MAX_PIXELS = 178_956_970  # equal to `image_reader.MAX_PIXELS`, whose module imports Pillow
MaxPixelsOpt = Annotated[
    int,
    typer.Option(
        min=1, help="Refuse images and frames with more pixels than this, before decoding them."
    ),
]
FastJpegOpt = Annotated[
    bool,
    typer.Option(
        "--fast-jpeg",
        help="Decode large JPEG files to a reduced size, and resize JPEG files by PyTorch. Faster; "
        "changes pixels a little.",
    ),
]
DecoderOpt = Annotated[
    Decoder,
    typer.Option(
        metavar="DECODER",
        help="What decodes inputs. pillow: Pillow images, PyAV videos. nvjpeg: a GPU of NVIDIA "
        "decodes JPEG files. torchcodec: torchcodec decodes videos. The last two change pixels a "
        "little; what they do not take is decoded as by pillow.",
    ),
]
StrideOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_STRIDE,
        help="Distance between the sampled frames of a clip, in frames at the rate of --fps.",
        show_default="the model's own, 4 for the released models",
    ),
]
FpsOpt = Annotated[
    float | None,
    typer.Option(
        help="Frame rate at which --stride is counted, in frames per second.",
        show_default="the model's own, 30 for the released models",
    ),
]

# Model ------------------------------------------------------------------------------------------


def model_option(default: str) -> OptionInfo:
    """Return the option --model, with a default that the help shows."""
    return typer.Option(
        "--model",
        "-m",
        parser=parse_name,
        autocompletion=completion.models,
        metavar="MODEL",
        help="Name from `hiera models`, hub repository, folder, file or URL. NAME.CHECKPOINT "
        "chooses one of the checkpoints of a model. Write ./NAME for a folder that is named like a "
        "model. With --checkpoint alone, the model is the one that the checkpoint was saved from.",
        show_default=default,
    )


ModelOpt = Annotated[
    str | None,
    model_option(f"{zoo.DEFAULT_IMAGE_MODEL} for images, {zoo.DEFAULT_VIDEO_MODEL} for videos"),
]
CheckpointOpt = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        parser=parse_name,
        autocompletion=completion.checkpoints,
        metavar="WEIGHTS",
        help="Weights to load in place of the model's own: a checkpoint name, another name from "
        "`hiera models`, file, folder (./NAME if it is named like a model), URL or hub repository, "
        "with parameters named as in hiera-transformer, timm or transformers.",
    ),
]
RandomInitOpt = Annotated[
    bool,
    typer.Option(
        "--random-init",
        help="Use random weights, for a dry run without a download. The outputs mean nothing.",
    ),
]

# Computation ------------------------------------------------------------------------------------

DeviceOpt = Annotated[
    str,
    typer.Option(
        parser=parse_device,
        autocompletion=completion.devices,
        metavar="DEVICE",
        help="Device that runs the model: cpu, cuda, cuda:N, mps or xpu. predict, features and mae "
        "also run on several: cuda:all, or cuda:0,cuda:2. auto: cuda, else xpu, mps or cpu.",
    ),
]
DtypeOpt = Annotated[
    Dtype,
    typer.Option(
        metavar="DTYPE",
        help="Data type of weights and activations: fp32, bf16 or fp16. auto: fp16 on CUDA (fp32 "
        "on cards where it is slow), bf16 on XPU and on a CPU with fast bf16, else fp32.",
    ),
]
BatchSizeOpt = Annotated[
    str,
    typer.Option(
        "--batch-size",
        "-b",
        metavar="auto|N",
        help="Images or clips in one forward pass. auto: a size that suits the device. If memory "
        "runs out, the size is halved.",
    ),
]
WorkersOpt = Annotated[
    str,
    typer.Option(
        "--workers",
        "-j",
        metavar="auto|N",
        help="Threads that decode inputs. auto: one for each core that this process may use.",
    ),
]
CompileOpt = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the model: this takes a while once, then it runs faster, in later runs, too.",
    ),
]

# Output -----------------------------------------------------------------------------------------

OutputOpt = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=parse_output,
        metavar="FILE",
        help="File to write the results to, - for standard output.",
        show_default="standard output",
    ),
]
ResultsOpt = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        parser=parse_results,
        metavar="FILE",
        help="File to write the results to, or a URL such as s3://bucket/out.csv; - for standard "
        "output.",
        show_default="standard output",
    ),
]
FormatOpt = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        metavar="FORMAT",
        help="Format of the results: table, json, jsonl or csv. auto: the extension of --output "
        "decides; without --output, table on a terminal, else jsonl.",
    ),
]
PrintFormatOpt = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        metavar="FORMAT",
        help="Format of what is printed: table, json, jsonl or csv. auto: table on a terminal, "
        "else jsonl.",
    ),
]
OverwriteOpt = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
]
ResumeOpt = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run: keep its results in --output (jsonl only), and process "
        "the remaining inputs.",
    ),
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")]
VerboseOpt = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print more messages on standard error.")
]
ConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=parse_path,
        metavar="FILE",
        callback=read_config,
        is_eager=True,
        help="YAML file with values for these options, as lines `option: value`. The command line "
        "takes precedence.",
    ),
]
