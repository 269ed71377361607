"""`hiera bench`: how fast the models are here, and beside others."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core import zoo
from hiera_core.errors import DeviceError, UsageError

from .. import options
from ..exit_codes import OK, SOME_FAILED, print_message
from ..options import auto_or_count
from ..output_formats import Format, write_rows
from ..results import check_file, resolve_format

if TYPE_CHECKING:
    from hiera_core.benchmarking.job import Measurement
    from hiera_core.benchmarking.machine import Header


class Mode(StrEnum):
    infer = "infer"
    grad = "grad"
    train = "train"


class Attention(StrEnum):
    both = "both"
    fused = "fused"
    eager = "eager"


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names from `hiera models` (default: hiera_base_224).", metavar="MODELS"
        ),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="The ten classifiers of the paper.")
    ] = False,
    mode: Annotated[
        Mode,
        typer.Option(help="grad: forward and backward; train: and a step of the optimiser."),
    ] = Mode.infer,
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-sizes",
            "-b",
            metavar="auto|N,N",
            help="Inputs a pass. Out of memory halves it.",
        ),
    ] = "auto",
    attention: Annotated[
        Attention, typer.Option(help="Fused, eager (as the paper was measured), or both.")
    ] = Attention.both,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure the compiled form, too.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Take turns with reference, timm, transformers, hiera-optim, vit (where "
            "installed); reference:fp32 in a dtype of its own.",
            metavar="PEER,PEER",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Measure each row for so long (default: 3 or more).")
    ] = None,
    export: Annotated[
        list[Path] | None,
        typer.Option(help="Also write a .json (every sample), .csv or .md file.", metavar="FILE"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput and latency.", metavar="FILE.png")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Hold against an earlier --export FILE.json.", metavar="OLD.json"),
    ] = None,
    fail_over: Annotated[
        str,
        typer.Option(help="Exit with 1 when a row has become slower by more.", metavar="PERCENT"),
    ] = "5%",
    output: options.OutputOpt = None,
    format: options.FormatOpt = Format.auto,
    overwrite: options.OverwriteOpt = False,
    device: options.DeviceOpt = options.Device.auto,
    dtype: options.DtypeOpt = options.Dtype.auto,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Measure throughput, latency and memory of models, with and without fused attention.

    Each model runs in a process of its own, with random weights: nothing is downloaded. Variants
    and peers take turns, so that a busy machine disturbs all of them alike.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    names = _names(models or [], all_models)
    sizes, tolerance, peers = _sizes(batch_sizes), _share(fail_over), _list(against)
    for path in (output, plot, *(export or [])):
        check_file(path, overwrite)
    from hiera_core.benchmarking import compare as comparison
    from hiera_core.benchmarking import job as jobs
    from hiera_core.benchmarking import machine, report, runner
    from hiera_core.benchmarking.peers import check

    for path in export or []:
        report.check_ending(path)
    for peer in peers:
        _check_peer(peer, check)
    old = None if compare is None else report.read(compare)
    header, length = machine.settings(device, dtype, mode.value, seconds)
    for line in header.lines() if not quiet else ():
        print(line, file=sys.stderr)
    attentions = ("fused", "eager") if attention is Attention.both else (attention.value,)
    template = jobs.Job(
        jobs.OURS, "", 0, header.device, header.dtype, mode.value, attentions, compile
    )
    rows: list[Measurement] = []
    with _progress(not quiet) as progress:
        for number, name in enumerate(names, 1):
            default = machine.batch_for(zoo.get(name).kind, header.device, mode.value)
            for group in runner.job_groups([name], sizes or [default], template, peers):
                tell = functools.partial(progress, f"{number}/{len(names)}")
                rows += runner.measure(group, length, tell)
    _write(rows, header, output, format)
    for path in export or []:
        report.export(path, header, rows)
    if plot is not None:
        report.plot(plot, header, rows)
    for note in report.notes(rows):
        print_message(note)
    slower = []
    if old is not None:
        changes = comparison.compare(old, rows, tolerance)
        slower = [change for change in changes if change.verdict == "slower"]
        for change in changes:
            print(change.line(), file=sys.stderr)
        print_message(f"{len(slower)} of {len(changes)} rows slower by more than {tolerance:.0%}")
    return _outcome(rows, bool(slower))


def _names(models: list[str], all_models: bool) -> list[str]:
    """What to measure, found in the zoo before torch is imported."""
    if all_models and models:
        raise UsageError("--all and names were given", "give one of them")
    if all_models:  # those whose speed was published
        return [name for name, row in zoo.models().items() if row.speed is not None]
    return [zoo.get(name).name for name in models or [zoo.DEFAULT_IMAGE_MODEL]]


def _sizes(text: str) -> list[int]:
    """`1,8,64` -> [1, 8, 64]; `auto` -> []."""
    counts = [auto_or_count(part.strip()) for part in text.split(",")]
    return [count for count in counts if count is not None]


def _share(text: str) -> float:
    """`5%` -> 0.05, and so is `5`."""
    if not re.fullmatch(r"\d+(\.\d+)?%?", text.strip()):
        raise typer.BadParameter(f"{text!r} is no percentage")
    return float(text.strip().removesuffix("%")) / 100


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _check_peer(peer: str, check: Callable[[str], None]) -> None:
    name, colon, dtype = peer.partition(":")
    check(name)
    if colon and dtype not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"unknown dtype {dtype!r} in {peer!r}", "use fp32, bf16 or fp16")


def _write(rows: list[Measurement], header: Header, output: Path | None, format: Format) -> None:
    from hiera_core import atomic
    from hiera_core.benchmarking import report

    format = resolve_format(format, output)
    if format is Format.table:
        text = report.table(rows)
    elif format is Format.json:
        text = report.as_json(header, rows)
    elif format is Format.csv:
        text = report.as_csv(header, rows)
    else:
        values = [row.to_json() for row in rows]
        text = write_rows(values, [], format)
    if output is None:
        sys.stdout.write(text)
        return
    with atomic.atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _outcome(rows: list[Measurement], slower: bool) -> int:
    """1 when some rows failed or one became slower; all failed is the machine's error."""
    failed = [row for row in rows if row.error is not None]
    if failed and len(failed) == len(rows):
        raise DeviceError(f"{failed[0].model}: {failed[0].error}", "use a smaller model or batch")
    return SOME_FAILED if failed or slower else OK


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[Callable[[str, str], None]]:
    """A line on stderr that changes, on a terminal; elsewhere one for each thing prepared."""
    if not show:
        yield lambda place, text: None
        return
    if not sys.stderr.isatty():

        def note(place: str, text: str) -> None:
            if "preparing" in text:
                print_message(f"{place} {text}")

        yield note
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda place, text: status.update(f"{place} {text}")
