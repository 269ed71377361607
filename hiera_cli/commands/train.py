"""`hiera train`: pre-training and fine-tuning by recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hiera_core.errors import UsageError
from hiera_core.training import recipe as recipes

from .. import options
from ..exit_codes import OK, print_message
from ..options import Device, auto_or_count


class Parallel(StrEnum):
    ddp = "ddp"
    fsdp = "fsdp"


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A model of the zoo (mae_ models are pre-trained, others fine-tuned), or a .yaml "
            "file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Folder of class folders (or train/ and val/ of them), list of `path label` "
            "lines, tar shards, or digits or shapes.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe.", metavar="KEY=VALUE"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run (default: runs/RECIPE)."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on: auto (from the run's last checkpoint, or anew), a run, a checkpoint.",
            metavar="auto|PATH",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Weights to begin with: zoo name, hub repository, folder or file."),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Show the whole recipe and stop.")
    ] = False,
    device: options.DeviceOpt = Device.auto,
    workers: options.WorkersOpt = "auto",
    compile: options.CompileOpt = False,
    parallel: Annotated[
        Parallel, typer.Option(help="Under torchrun: whole copies, or sharded parameters.")
    ] = Parallel.ddp,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard too.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")
    ] = False,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Pre-train (MAE) or fine-tune a model; on many processes under torchrun.

    The folder of the run gets the weights, ready for `hiera predict --checkpoint`, the log, curves
    and checkpoints.
    """
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("hiera").setLevel(level)
    chosen = recipes.read_recipe(recipe, dict(map(recipes.parse_setting, settings or [])))
    if print_recipe:
        typer.echo(chosen.to_yaml(), nl=False)
        return OK
    if data is None:
        raise UsageError("no data", "name a folder, a list, tar shards, or digits or shapes")
    threads = 0 if workers == "0" else auto_or_count(workers)
    folder = output or Path("runs") / Path(recipe).stem
    from hiera_core.data import datasets
    from hiera_core.training import build, distributed, trainer

    splits = datasets.open_splits(data, chosen.data.val, labelled=chosen.task == "classify")
    choices = build.RunOptions(
        init_from=init_from,
        resume=resume,
        overwrite=overwrite,
        compile=compile,
        parallel=parallel.value,
        workers=threads,
        tensorboard=tensorboard,
        live=not quiet,
    )
    with distributed.join_processes(device) as world:
        if not world.is_main_process:
            logging.getLogger("hiera").setLevel(logging.ERROR)
        result = trainer.train(chosen, splits, folder, world, choices)
    if world.is_main_process and not quiet:
        print_message(
            f"{_summary(result)}; {folder} holds the weights: hiera "
            + (
                f"predict --checkpoint {folder}"
                if chosen.task == "classify"
                else f"train {recipe.removeprefix('mae_')} --init-from {folder}"
            )
        )
    return OK


def _summary(result: Mapping[str, object]) -> str:
    measured = result.get("val")
    values = measured if isinstance(measured, dict) else result
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts += [f"top-1 {values['top1']:.2f}%"] if "top1" in values else []
    return ", ".join([f"{result['step']} steps", *parts])
