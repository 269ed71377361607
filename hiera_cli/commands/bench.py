"""`hiera bench`: measure the speed of models, and compare it with that of others."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.weights import names as model_names
from hiera_core.zoo.input_sizes import parse_size

from .. import completion, options
from ..bench_rows import ShownRows, progress_line, render
from ..exit_codes import OK, SOME_FAILED, print_message
from ..options import auto_or_count, auto_or_workers
from ..output_files.claims import claim_file, target_of, write_text
from ..output_formats import Format, resolve_format
from ..text_tables import fit_table, stderr_width

if TYPE_CHECKING:
    from hiera_core.benchmarking.job import Mode as JobMode
    from hiera_core.benchmarking.measurement import Measurement


SAVED = (
    "Another checkpoint is read for its architecture, and measured with random weights, which "
    "does not change the speed."
)


class Mode(StrEnum):
    """Values of --mode."""

    infer = "infer"
    grad = "grad"
    train = "train"


class Attention(StrEnum):
    """Values of --attention."""

    both = "both"
    fused = "fused"
    eager = "eager"


def bench(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names from `hiera models`, or checkpoints: what --model of `hiera predict` "
            "takes. Write ./NAME for a folder that is named like a model. " + SAVED,
            metavar="MODELS",
            autocompletion=completion.classifiers_and_autoencoders,
            show_default=zoo.DEFAULT_IMAGE_MODEL,
        ),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="Measure the ten classifiers from the paper.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            parser=options.parse_name,
            autocompletion=completion.classifiers_and_autoencoders,
            metavar="MODEL",
            help="The same as an argument. May be given several times.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            parser=options.parse_name,
            metavar="INPUTS",
            help="Measure from files to answers, as `hiera predict` runs: read, decode and "
            "classify these files or folders, and decode them alone. --against timm does it in "
            "timm's way. May be given several times.",
            show_default=False,
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="With --from: also read subfolders.")
    ] = False,
    fast_jpeg: options.FastJpegOpt = False,
    decoder: options.DecoderOpt = options.Decoder.pillow,
    mode: Annotated[
        Mode,
        typer.Option(
            help="infer: the forward pass. grad: forward and backward. train: a step of `hiera "
            "train`, without reading data; for other implementations forward, backward and a step "
            "of AdamW."
        ),
    ] = Mode.infer,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels: 384, or 224x448 for height x width. For videos, also the "
            "number of frames: 16x256.",
            metavar="SIZE",
            show_default="the size of each model",
        ),
    ] = None,
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-sizes",
            "-b",
            metavar="auto|N,N",
            help="Batch sizes to measure. auto: one that suits the device. If memory runs out, "
            "the size is halved.",
        ),
    ] = "auto",
    attention: Annotated[
        Attention,
        typer.Option(
            help="Implementation of attention: fused, eager (as in the paper's measurements), "
            "or both."
        ),
    ] = Attention.both,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Also measure the model compiled with torch.compile."
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Also measure other implementations that are installed: reference, timm, "
            "transformers, hiera-optim, vit; on a CPU openvino, onnxruntime. PEER:fp32 measures "
            "one in a dtype other than --dtype.",
            metavar="PEER,PEER",
            autocompletion=completion.peers,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="How long to measure each variant, in seconds.",
            show_default="3 or more, depending on the device",
        ),
    ] = None,
    export: Annotated[
        list[Path] | None,
        typer.Option(
            parser=options.parse_path,
            help="Also write the results to this file: .json (with every sample), .csv or .md. May "
            "be given several times.",
            metavar="FILE",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parse_path,
            help="Draw throughput and latency as a chart. Needs matplotlib.",
            metavar="FILE.png",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            parser=options.parse_path,
            help="Compare the results with an earlier --export FILE.json.",
            metavar="OLD.json",
        ),
    ] = None,
    fail_over: Annotated[
        str | None,
        typer.Option(
            help="With --compare, exit with 1 if a model has become slower by more than this.",
            metavar="PERCENT",
            show_default="5%",
        ),
    ] = None,
    output: options.OutputOpt = None,
    format: options.FormatOpt = Format.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    device: options.DeviceOpt = options.Device.auto,
    dtype: Annotated[
        options.Dtype,
        typer.Option(
            metavar="DTYPE",
            help="Data type of weights and activations; with --mode train, of autocast: fp32, bf16 "
            "or fp16. auto: fp16 on CUDA (bf16 with --mode grad or train), bf16 on a CPU with "
            "fast bf16 (fp32 with --mode train), else fp32.",
        ),
    ] = options.Dtype.auto,
    workers: Annotated[
        str,
        typer.Option(
            "--workers",
            "-j",
            metavar="auto|N",
            help="With --from: threads that decode inputs, and for timm processes. auto: one for "
            "each core that this process may use.",
        ),
    ] = "auto",
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Measure throughput, latency and memory of models, with and without fused attention.

    Each model runs in its own process with random weights, so nothing is downloaded. The variants
    of a model and the other implementations are measured alternately, so that a busy machine
    slows all of them down alike.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    named = [*(models or []), *(model or [])]
    names = _model_names(named, all_models, files or [], recursive)
    _check_options_of_files(
        files, recursive, workers != "auto", fast_jpeg, decoder is not options.Decoder.pillow
    )
    if files and mode is not Mode.infer:
        raise UsageError("--from measures what `hiera predict` does", "leave out --mode")
    if files and attention is not Attention.both:
        raise UsageError("--from measures what `hiera predict` does", "leave out --attention")
    pixels = None if size is None else parse_size(size)
    sizes, tolerance = _parse_sizes(batch_sizes), _parse_percent(fail_over or "5%")
    if fail_over is not None and compare is None:
        raise UsageError("--fail-over is for --compare", "add --compare OLD.json")
    peer_names = _split_names(against)
    from hiera_core.benchmarking import job as jobs
    from hiera_core.benchmarking import machine, peers, report
    from hiera_core.benchmarking.bench import check_models, file_inputs, measure_models
    from hiera_core.benchmarking.given_model import describe_models

    for path in export or []:
        report.check_ending(path)
    if plot is not None:
        report.check_plot(plot)
    _check_different([path for path in (output, plot, *(export or [])) if path is not None])
    output, plot = (_claim(context, path, overwrite) for path in (output, plot))
    exports = [context.with_resource(claim_file(path, overwrite)) for path in export or []]
    format = resolve_format(format, output)
    for peer in peer_names:
        peers.check(peer)
    old = None if compare is None else report.read(compare)
    threads = auto_or_workers(workers)
    kind: JobMode = mode.value
    inputs = None
    if files:
        inputs = file_inputs(
            files, peer_names, recursive=recursive, workers=threads, decoder=decoder.value,
            fast_jpeg=fast_jpeg,
        )  # fmt: skip
        kind = "files"
    described = describe_models(names)
    check_models(described, pixels, kind)
    header, length = machine.settings(device, dtype, kind, seconds)
    for line in header.lines() if not quiet else ():
        print(line, file=sys.stderr)
    attentions = ("fused", "eager") if attention is Attention.both else (attention.value,)
    template = jobs.Job(
        jobs.OURS, "", 0, header.device, header.dtype, kind, attentions, compile, pixels,
        files=inputs,
    )  # fmt: skip
    measurements: list[Measurement] = []
    begun: list[str] = []  # models, the last of which may not be finished
    written = [path for path in (output, *exports) if path is not None]
    shown = ShownRows(header, format, names) if output is None else None
    try:
        with progress_line(not quiet) as progress:
            for group in measure_models(
                described, sizes, template, peer_names, length, progress, begun.append
            ):
                measurements += group
                progress.add(group)
                if shown is not None:
                    shown.add(group)
                if output is not None:
                    write_text(render(measurements, header, format), output)
                for path in exports:
                    report.export(path, header, measurements)
    except BaseException as error:
        for note in _how_to_go_on([*described], begun, measurements, written):
            error.add_note(note)
        raise
    finally:  # an interruption does not lose what has been measured
        if shown is not None:
            shown.end()
    if plot is not None:
        report.plot(plot, header, measurements)
        print_message(f"the chart is in {plot}")
    for note in report.notes(measurements):
        print_message(note)
    slower = 0 if old is None else _print_comparison(old, measurements, tolerance)
    return _exit_code(measurements, slower)


def _check_options_of_files(files: list[str] | None, *given: bool) -> None:
    """Check that options of --from are given only with it.

    Raises:
        UsageError: One of them is given without it.
    """
    if not files and any(given):
        raise UsageError(
            "--recursive, --workers, --decoder and --fast-jpeg are for --from", "add --from FOLDER"
        )


def _claim(context: typer.Context, path: Path | None, overwrite: bool) -> Path | None:
    """Lock an output file until the command ends, and return the file to write."""
    return None if path is None else context.with_resource(claim_file(path, overwrite))


def _check_different(paths: Sequence[Path]) -> None:
    """Check that no two outputs go to one file.

    Raises:
        UsageError: Two of them do.
    """
    targets = [target_of(path).resolve() for path in paths]
    for path in targets:
        if targets.count(path) > 1:
            raise UsageError(f"{str(path)!r} is given for two outputs", "name different files")


def _model_names(
    models: list[str], all_models: bool, files: Sequence[str], recursive: bool
) -> list[str]:
    """Return the names of the models to measure, and check them before torch is imported.

    Without a name, the first of the files chooses a model for images or for videos.
    """
    if all_models and models:
        raise UsageError("--all and names were given", "give one of them")
    if all_models:  # the paper gives a speed for its classifiers only
        return [name for name, entry in zoo.models().items() if entry.speed is not None]
    if not models and files:
        from hiera_core.data import sources

        is_stream = not sources.can_be_listed_twice(files[0])
        first = None if is_stream else next(sources.expand(files[:1], recursive=recursive), None)
        is_video = first is not None and first.looks_like_video
        return [zoo.DEFAULT_VIDEO_MODEL if is_video else zoo.DEFAULT_IMAGE_MODEL]
    models = models or [zoo.DEFAULT_IMAGE_MODEL]
    for name in models:
        model_names.find_entry(name)
    return models


def _parse_sizes(text: str) -> list[int]:
    """Parse batch sizes: `1,8,64` -> [1, 8, 64], `auto` -> []."""
    counts = [auto_or_count(part.strip(), option="--batch-sizes") for part in text.split(",")]
    return [count for count in counts if count is not None]


def _parse_percent(text: str) -> float:
    """Parse a percentage, with or without its sign: `5%` -> 0.05, `5` -> 0.05."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?%?", text.strip()):
        raise typer.BadParameter(f"{text!r} is no percentage", param_hint="--fail-over")
    return float(text.strip().removesuffix("%")) / 100


def _split_names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _how_to_go_on(
    names: Sequence[str],
    begun: Sequence[str],
    measurements: Sequence[Measurement],
    files: Sequence[Path],
) -> list[str]:
    """Return what to say about a benchmark that ends early: where its rows are, and how to measure
    the other models."""
    if not measurements:
        return []
    count = len(measurements)
    rows = "1 row is" if count == 1 else f"{count} rows are"
    kept = [f"{rows} in {' and '.join(map(str, files))}"] if files else []
    missing = shlex.join(names[max(0, len(begun) - 1) :])
    return [*kept, f"to go on: hiera bench {missing}, with the same options and another file"]


def _print_comparison(
    old: Sequence[Measurement], new: Sequence[Measurement], tolerance: float
) -> int:
    """Print on stderr how measurements have changed, and return how many are slower."""
    from hiera_core.benchmarking import compare

    changes = compare.compare(old, new, tolerance)
    compared = [change for change in changes if change.change is not None]
    if compared:
        names, rows = compare.cells(compared)
        optional = [name for name in compare.OPTIONAL if name in names]
        print(fit_table(names, rows, stderr_width(), optional), end="", file=sys.stderr)
    slower = sum(change.verdict == "slower" for change in compared)
    message = f"{slower} of {len(compared)} rows slower by more than {tolerance:.0%}"
    counts = [
        f"{number} only measured {when}"
        for verdict, when in (("new", "now"), ("gone", "earlier"))
        if (number := sum(change.verdict == verdict for change in changes))
    ]
    print_message("; ".join([message, *([f"not compared: {', '.join(counts)}"] if counts else [])]))
    return slower


def _exit_code(measurements: Sequence[Measurement], slower: int) -> int:
    """Return 1 if a measurement failed or is slower than before.

    Raises:
        DeviceError, InputError: All measurements failed.
    """
    from hiera_core.benchmarking.bench import total_failure

    if error := total_failure(measurements):
        raise error
    failed = any(m.error is not None for m in measurements)
    return SOME_FAILED if failed or slower else OK
