"""`hiera eval`: the accuracy of a classifier on labelled data."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import load_model, options
from ..exit_codes import OK, SOME_FAILED, print_message
from ..options import auto_or_count
from ..output_formats import Format, write_rows
from ..results import check_file, resolve_format

if TYPE_CHECKING:
    from hiera_core.inference.evaluate import Evaluation

WORST = 20  # classes in the table


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders (its val/ where it has one), list of `path label` lines, "
            "tar shards, or digits or shapes (what training holds out of them).",
            show_default=False,
        ),
    ],
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips along a video (default: 5).")
    ] = None,
    crops: Annotated[
        int | None, typer.Option(min=1, help="Crops of each clip (default: 3).")
    ] = None,
    output: options.OutputOpt = None,
    format: options.FormatOpt = Format.auto,
    overwrite: options.OverwriteOpt = False,
    device: options.DeviceOpt = options.Device.auto,
    dtype: options.DtypeOpt = options.Dtype.auto,
    batch_size: options.BatchSizeOpt = "auto",
    workers: options.WorkersOpt = "auto",
    compile: options.CompileOpt = False,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Count how often a classifier is right: top-1, top-5, by class, and what it confuses.

    Under torchrun every process takes its share, no sample twice. json holds everything; csv and
    jsonl a row for each class.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    batch, threads = auto_or_count(batch_size), auto_or_count(workers)
    if format is Format.auto and output is None and not sys.stdout.isatty():
        format = Format.json
    check_file(output, overwrite)
    load_model.check_model_name(model)
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.data.datasets import open_eval_data
    from hiera_core.inference.evaluate import evaluate_dataset
    from hiera_core.inference.predict import Predictor
    from hiera_core.training.distributed import join_processes

    dataset = open_eval_data(data)
    with join_processes(device) as world:
        predictor = Predictor(
            load_model.load_model("classifier", model, checkpoint, random_init),
            sampling=Sampling(clips, crops),
            workers=threads,
            device=str(world.device),
            dtype=dtype,
            batch_size=batch,
            compile=compile,
        )
        share = len(range(world.rank, len(dataset), world.size))
        with _progress(share, world.is_main_process and not quiet) as advance:
            found = evaluate_dataset(
                dataset, predictor, rank=world.rank, world_size=world.size, on_sample=advance
            )
        shares = world.gather(found)
    if not world.is_main_process:
        return OK
    for other in shares[1:]:
        shares[0].add(other)
    total: Evaluation = shares[0]
    for name, message in total.failed:
        print_message(f"{name}: {message}")
    text = render(total, resolve_format(format, output))
    if output is None:
        sys.stdout.write(text)
    else:
        from hiera_core import atomic

        with atomic.atomic_file(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if total.failed:
        print_message(f"{total.samples} ok, {len(total.failed)} failed; they count neither way")
    return SOME_FAILED if total.failed else OK


def render(found: Evaluation, format: Format) -> str:
    """An evaluation as text."""
    if format is Format.json:
        import json

        return json.dumps(found.to_json(), indent=2) + "\n"
    rows: list[dict[str, Any]] = [{**row} for row in found.classes()]
    columns = ["id", "label", "samples", "top1"] + ["top5"] * (found.top5 is not None)
    if format is not Format.table:
        return write_rows(rows, columns, format)
    lines = [f"top-1  {found.top1:.2f}%" + _published_part(found)]
    if found.top5 is not None:
        lines.append(f"top-5  {found.top5:.2f}%")
    lines += [f"{found.samples} samples, {len(found.failed)} unreadable", ""]
    worst = sorted(rows, key=lambda row: float(row["top1"]))[:WORST]
    if len(rows) > WORST:
        lines.append(f"the {WORST} worst of {len(rows)} classes:")
    shown = [{**r, **{k: f"{r[k]:.1f}%" for k in columns if k.startswith("top")}} for r in worst]
    text = "\n".join(lines) + "\n" + write_rows(shown, columns, format)
    pairs: list[dict[str, Any]] = [{**pair} for pair in found.confusions()]
    if pairs:
        text += "\nmost confused:\n" + write_rows(pairs, ["label", "predicted", "count"], format)
    return text


def _published_part(found: Evaluation) -> str:
    return "" if found.published is None else f"  (published: {found.published:.1f}%)"


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("samples", total=total)
        yield lambda: bar.advance(task)
