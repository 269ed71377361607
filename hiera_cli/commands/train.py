"""`hiera train`: pre-train or fine-tune a model according to a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader as recipes

from .. import completion, options
from ..exit_codes import OK, print_message
from ..options import Device, auto_or_workers


class Parallel(StrEnum):
    """Values of --parallel."""

    ddp = "ddp"
    fsdp = "fsdp"


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a model, to use its built-in recipe, or a .yaml file. Models whose names "
            "begin with mae_ are pre-trained; all others are fine-tuned.",
            metavar="RECIPE",
            autocompletion=completion.classifiers_and_autoencoders,
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Training data: a folder with a subfolder for each class (or with train/ and val/ "
            "of that form), a list of `path label` lines, tar shards, or the built-in data set "
            "digits or shapes. Pre-training takes any folder of images and videos.",
            metavar="DATA",
            autocompletion=completion.data_sets,
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value of the recipe, such as optimizer.lr=1e-3. May be given several "
            "times.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.parse_path,
            metavar="DIR",
            help="Folder of the run.",
            show_default="runs/RECIPE",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume a run. auto: from the last checkpoint in the folder of the run, or start "
            "a new run if there is none. PATH: from the folder of a run, or from a checkpoint.",
            metavar="auto|PATH",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Weights to begin with: a name from `hiera models`, hub repository, folder "
            "(./NAME if it is named like a model), URL or file.",
            show_default="random weights",
            autocompletion=completion.models,
        ),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole recipe and exit.")
    ] = False,
    device: options.DeviceOpt = Device.auto,
    workers: Annotated[
        str,
        typer.Option(
            "--workers",
            "-j",
            metavar="auto|N",
            help="Number of worker processes that load data, for each training process. 0: load in "
            "the training process itself. auto: the number of cores divided by the number of "
            "training processes on the machine, at most 8.",
        ),
    ] = "auto",
    compile: options.CompileOpt = False,
    parallel: Annotated[
        Parallel,
        typer.Option(
            help="How processes share the model under torchrun. ddp: each has all parameters. "
            "fsdp: parameters are sharded (FSDP2)."
        ),
    ] = Parallel.ddp,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write events for TensorBoard.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Delete the run that the folder holds; other files in it stay."
        ),
    ] = False,
    quiet: options.QuietOpt = False,
    verbose: options.VerboseOpt = False,
    config: options.ConfigOpt = None,
) -> int:
    """Pre-train a masked autoencoder, or fine-tune a classifier, in one process or many.

    The folder of the run gets the weights (ready for `hiera predict --checkpoint`), the log, curves
    and checkpoints. Start several processes with torchrun -m hiera_cli train.
    """
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("hiera").setLevel(level)
    chosen = recipes.read_recipe(recipe, dict(map(recipes.parse_setting, settings or [])))
    if print_recipe:
        typer.echo(chosen.to_yaml(), nl=False)
        return OK
    if data is None:
        raise UsageError("no data", "name a folder, a list, tar shards, or digits or shapes")
    processes = 0 if workers == "0" else auto_or_workers(workers)
    folder = output or Path("runs") / Path(recipe).stem
    from hiera_core.training import build, distributed, trainer

    splits = trainer.open_data(chosen, data, folder)
    run_options = build.RunOptions(
        init_from=init_from,
        resume=resume,
        overwrite=overwrite,
        compile=compile,
        parallel=parallel.value,
        workers=processes,
        tensorboard=tensorboard,
        live=not quiet,
    )
    with distributed.join_processes(device) as world:
        if not world.is_main_process:
            logging.getLogger("hiera").setLevel(logging.ERROR)
        result = trainer.train(chosen, splits, folder, world, run_options)
    if world.is_main_process and not quiet:
        if chosen.task == "classify":
            next_command = f"hiera predict --checkpoint {folder}"
        else:
            classifier = chosen.model.name.removeprefix("mae_")
            next_command = f"hiera train {classifier} --init-from {folder}"
        print_message(f"{_summary(result)}; {folder} holds the weights: {next_command}")
    return OK


def _summary(result: Mapping[str, object]) -> str:
    """Return the last measurements of a run as text, those on held-out data if there are any."""
    held_out = result.get("val")
    values = held_out if isinstance(held_out, dict) else result
    parts = [f"{result['step']} steps"]
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "top1" in values:
        parts.append(f"top-1 {values['top1']:.2f}%")
    return ", ".join(parts)
