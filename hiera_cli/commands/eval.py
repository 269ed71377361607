"""`hiera eval`: measure the accuracy of a classifier on labelled data."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiera_core.errors import CheckpointError, NoClassifierError, UsageError
from hiera_core.plain_data import counted, to_json
from hiera_core.zoo import check_is_hiera

from .. import completion, load_model, media_run, options
from ..exit_codes import OK, SOME_FAILED, print_message
from ..output_files.claims import check_file, check_folder, claim_file, write_text
from ..output_formats import Format, resolve_format, write_rows
from ..text_tables import stdout_width

if TYPE_CHECKING:
    from hiera_core.inference.evaluate import ClassAccuracy, Evaluation, ProbeFacts
    from hiera_core.inference.pipeline import PipelineOptions
    from hiera_core.training.distributed import World

WORST = 20  # number of classes in the table
PROBE_HINT = "add --probe knn or --probe linear, which judge its features"
Named = tuple[str | None, str | None, bool]  # --model, --checkpoint, --random-init


class ProbeMethod(StrEnum):
    """Values of --probe."""

    knn = "knn"
    linear = "linear"


def evaluate(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="Labelled data: a folder with a subfolder for each class (or its val/, if there "
            "is one), a list of `path label` lines, tar shards or Parquet files here or at a URL "
            "such as s3://, hf://datasets/USER/NAME, or the held-out part of the built-in data "
            "set digits or shapes.",
            metavar="DATA",
            autocompletion=completion.data_sets,
            show_default=False,
        ),
    ],
    model: options.ModelOpt = None,
    checkpoint: options.CheckpointOpt = None,
    random_init: options.RandomInitOpt = False,
    clips: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_CLIPS,
            help="Number of clips, evenly spread over a video.",
            show_default="5",
        ),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_CROPS,
            help="Number of crops of each clip, evenly spread over its longer side.",
            show_default="3",
        ),
    ] = None,
    decoder: options.DecoderOpt = options.Decoder.pillow,
    probe: Annotated[
        ProbeMethod | None,
        typer.Option(
            help="Judge the features of any model, also of an autoencoder: knn (nearest "
            "neighbours) or linear (logistic regression) learns the classes from the features of "
            "the training part of DATA, and is evaluated on the held-out part.",
            metavar="METHOD",
            show_default=False,
        ),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(
            help="With --probe: what to evaluate, as a share of DATA (0.1) or other data.",
            show_default="val/ in DATA",
        ),
    ] = None,
    neighbours: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --probe knn: number of training samples that vote.", show_default="20"
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="With --probe: folder that keeps the features, so that the next probe is quick.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    output: options.OutputOpt = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="Format of the results: table, json, jsonl or csv. json holds everything; csv and "
            "jsonl hold one row per class. auto: the extension of --output decides; without "
            "--output, table on a terminal, else json.",
        ),
    ] = Format.auto,
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
    """Measure the top-1, top-5 and per-class accuracy of a classifier, and list its most frequent
    mistakes. With --probe, measure what simple classifiers can read from the features of a model.

    Under torchrun, each process evaluates its share of the data, and every sample counts once.
    """
    if not quiet:
        logging.getLogger("hiera").setLevel(logging.DEBUG if verbose else logging.INFO)
    media_run.check_counts(context)
    if format is Format.auto and output is None and not sys.stdout.isatty():
        format = Format.json
    if output is not None and os.environ.get("RANK", "0") == "0":  # the process that writes
        output = context.with_resource(claim_file(output, overwrite))
    elif output is not None:
        check_file(output, overwrite)
    format = resolve_format(format, output)
    entry = load_model.check_model_name(model)
    if probe is None and (val, cache, neighbours) != (None, None, None):
        raise UsageError(
            "--val, --cache and --neighbours belong to --probe", "add --probe knn or --probe linear"
        )
    if probe is None and entry is not None and entry.autoencoder:
        raise UsageError(
            f"{entry.name} is an autoencoder: it reconstructs, it does not classify",
            f"{PROBE_HINT}, or use {entry.name.removeprefix('mae_')}",
        )
    if probe is None and entry is not None:
        check_is_hiera(entry.family, entry.name)
    if probe is ProbeMethod.linear and neighbours is not None:
        raise UsageError("--neighbours belongs to --probe knn", "leave it out")
    from hiera_core.data.toy_datasets import BUNDLED
    from hiera_core.training.distributed import PATIENT, join_processes

    if model is None and checkpoint is None:
        model = BUNDLED.get(data)
    if cache:
        check_folder(Path(cache))

    # The processes meet only at the end, and some shares take much longer than others.
    with join_processes(device, PATIENT) as world:
        settings = media_run.pipeline_options(context, str(world.device))
        show = world.is_main_process and not quiet
        named = (model, checkpoint, random_init)
        if probe is None:
            total = _classify(data, named, settings, world, show)
        else:
            total = _probe(data, val, named, settings, world, show, probe, neighbours, cache)
    if not world.is_main_process:
        return OK
    for name, message in total.failed:
        print_message(f"{name}: {message}")
    write_text(render(total, format, stdout_width() if output is None else None), output)
    if total.failed:
        print_message(
            f"{total.samples} ok, {len(total.failed)} failed; failed samples do not count"
        )
    return SOME_FAILED if total.failed else OK


def _classify(
    data: str, named: Named, settings: PipelineOptions, world: World, show: bool
) -> Evaluation:
    """Evaluate a classifier in all processes, and return the sum."""
    from hiera_core.data.datasets import open_eval_data
    from hiera_core.inference.evaluate import TOP_K, evaluate_dataset
    from hiera_core.inference.predict import Predictor

    dataset = open_eval_data(data)
    try:
        predictor = Predictor(load_model.load_model("classifier", *named), topk=TOP_K, **settings)
    except NoClassifierError as error:
        raise CheckpointError(error.message, f"{PROBE_HINT}; or {error.hint}") from error
    share = len(range(world.rank, len(dataset), world.size))
    with _progress_bar(share, show) as advance:
        evaluation = evaluate_dataset(
            dataset, predictor, rank=world.rank, world_size=world.size, on_sample=advance
        )
    total, *others = world.gather(evaluation)
    for other in others:
        total.add(other)
    return total


def _probe(
    data: str,
    val: str | None,
    named: Named,
    settings: PipelineOptions,
    world: World,
    show: bool,
    method: ProbeMethod,
    neighbours: int | None,
    cache: str | None,
) -> Evaluation:
    """Compute features in all processes, and judge them."""
    from hiera_core.inference.features import FeatureExtractor
    from hiera_core.probing.frozen_features import FrozenFeatures, cache_folders, frozen_features
    from hiera_core.probing.nearest_neighbours import NEIGHBOURS
    from hiera_core.probing.probe import judge, open_probe_data

    splits = open_probe_data(data, val)
    folders = {} if cache is None else cache_folders(cache, data, *([] if val is None else [val]))
    extractor = FeatureExtractor(load_model.load_model("encoder", *named), **settings)
    parts = {"train": splits.train, "val": splits.val}
    found = []
    for name, part in parts.items():
        share = len(range(world.rank, len(part), world.size))
        rank = f"{world.rank}-of-{world.size}" if world.size > 1 else ""
        with _progress_bar(share, show) as advance:
            features = frozen_features(
                part,
                extractor,
                rank=world.rank,
                world_size=world.size,
                cache=folders[name] / rank if folders else None,
                on_sample=advance,
            )
        found.append(FrozenFeatures.concatenate(world.gather(features)))
    return judge(splits, *found, method=method.value, neighbours=neighbours or NEIGHBOURS)


def render(evaluation: Evaluation, format: Format, width: int | None = None) -> str:
    """Return an evaluation as text in a format. Tables are at most `width` characters wide."""
    if format is Format.json:
        return to_json(evaluation.to_json(), indent=2) + "\n"
    classes = evaluation.classes()
    columns = ["id", "label", "samples", "top1"] + ["top5"] * (evaluation.top5 is not None)
    if format is not Format.table:
        return write_rows(classes, columns, format)
    lines = [] if evaluation.probe is None else [_describe_probe(evaluation.probe)]
    lines.append(f"top-1  {evaluation.top1:.2f}%")
    if evaluation.published is not None:
        lines[-1] += f"  (published: {evaluation.published:.1f}%)"
    if evaluation.top5 is not None:
        lines.append(f"top-5  {evaluation.top5:.2f}%")
    lines += [f"{counted(evaluation.samples, 'sample')}, {len(evaluation.failed)} unreadable", ""]
    if len(classes) > WORST:
        lines.append(f"the {WORST} worst of {len(classes)} classes:")
    worst = evaluation.worst_classes(WORST)
    text = "\n".join(lines) + "\n"
    rows = [_with_percent_signs(accuracy) for accuracy in worst]
    text += write_rows(rows, columns, format, width=width)
    confusions = evaluation.confusions()
    if confusions:
        columns = ["label", "predicted", "count"]
        text += "\nmost confused:\n" + write_rows(confusions, columns, format, width=width)
    return text


def _describe_probe(facts: ProbeFacts) -> str:
    """Return a line such as `linear probe, 1438 training samples, weight decay 0.001`."""
    samples = f"{facts['train_samples']} training samples"
    if "neighbours" in facts:
        return f"k-NN with {facts['neighbours']} neighbours, {samples}"
    return f"linear probe, {samples}, weight decay {facts['weight_decay']:g}"


def _with_percent_signs(accuracy: ClassAccuracy) -> dict[str, object]:
    top1, top5 = accuracy["top1"], accuracy["top5"]
    shown = {"top1": f"{top1:.1f}%", "top5": None if top5 is None else f"{top5:.1f}%"}
    return {**accuracy, **shown}


@contextlib.contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr, if it is a terminal.

    Yields:
        A function to call after each sample.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("samples", total=total)
        yield lambda: progress.advance(task)
