"""`hiera train`: pre-train or fine-tune a model according to a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hiera_core.errors import UsageError
from hiera_core.plain_data import counted
from hiera_core.training import recipe_reader as recipes
from hiera_core.training.recipe import urls_among

from .. import completion, options
from ..exit_codes import OK, print_message
from ..help_text import Command
from ..options import Device, auto_or_workers

# Options of other trainers that are options or arguments here, too, under another name.
RENAMED = {
    "checkpoint": "--init-from PATH",
    "weights": "--init-from PATH",
    "pretrained": "--init-from NAME",
    "finetune": "--init-from PATH",
    "start-from": "--init-from PATH",
    "resume-from": "--resume PATH",
    "model": "the model as the first argument: hiera train MODEL DATA",
    "m": "the model as the first argument: hiera train MODEL DATA",
    "arch": "the model as the first argument: hiera train MODEL DATA",
    "recipe": "the recipe as the first argument: hiera train RECIPE DATA",
    "data": "the data as the second argument: hiera train MODEL DATA",
    "d": "the data as the second argument: hiera train MODEL DATA",
    "data-path": "the data as the second argument: hiera train MODEL DATA",
    "data-dir": "the data as the second argument: hiera train MODEL DATA",
    "dataset": "the data as the second argument: hiera train MODEL DATA",
    "output-dir": "--output FOLDER",
    "out": "--output FOLDER",
    "save-dir": "--output FOLDER",
    "num-workers": "--workers N",
    "fp16": "--set precision=fp16",
    "bf16": "--set precision=bf16",
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "gpu": "--device cuda",
    "gpus": "several processes: torchrun --nproc-per-node N -m hiera_cli train ...",
    "distributed": "several processes: torchrun --nproc-per-node N -m hiera_cli train ...",
    "fsdp": "--parallel fsdp",
    "wandb": "--track wandb",
    "log-wandb": "--track wandb",
    "report-to": "--track NAME",
}


class TrainCommand(Command):
    """The command, with hints for options that other trainers have, and for --set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            _check_settings(error, given)
            option = getattr(error, "option_name", None)
            if not isinstance(option, str) or not hasattr(error, "possibilities"):
                raise
            hint = _hint_for(option, given)
            if hint is None and getattr(
                error, "possibilities", None
            ):  # it names options that are similar
                raise
            hint = hint or "--help lists the options, and --print-recipe the keys for --set"
            raise UsageError(f"no such option: {option}", hint) from error


def _check_settings(error: Any, arguments: list[str]) -> None:
    """Raise an error that suits if the extra argument is a value of the recipe, as in
    `--set batch_size=8 seed=1`.

    Raises:
        UsageError: It is one.
    """
    message = error.format_message() if hasattr(error, "format_message") else ""
    if "--set" not in arguments or "unexpected extra argument" not in message:
        return
    for text in arguments:
        if "=" in text and not text.startswith("-") and text in message:
            raise UsageError(
                f"{text} has no --set before it", f"repeat the option for each value: --set {text}"
            ) from error


def _hint_for(option: str, arguments: list[str]) -> str | None:
    """Return what to write in place of an option that does not exist, or None."""
    renamed = RENAMED.get(option.strip("-").replace("_", "-").lower())
    if renamed is not None:
        return f"use {renamed}"
    key = recipes.key_of_option(option)
    if key is None:
        return None
    value = next((a.partition("=")[2] for a in arguments if a.startswith(f"{option}=")), "")
    if not value and option in arguments[:-1]:
        following = arguments[arguments.index(option) + 1]
        value = "" if following.startswith("--") else following
    if key == "model.config.num_classes":
        return "leave it out: the data decides the number of classes"
    return f"it is a value of the recipe: --set {key}={value or 'VALUE'}"


class TrackerName(StrEnum):
    """Values of --track."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"
    trackio = "trackio"


class Parallel(StrEnum):
    """Values of --parallel."""

    ddp = "ddp"
    fsdp = "fsdp"


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a model, to use its built-in recipe, or a .yaml file. Models whose names "
            "begin with mae_ are pre-trained; all others are fine-tuned. With --resume, the recipe "
            "of the run is the default.",
            metavar="RECIPE",
            autocompletion=completion.classifiers_and_autoencoders,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Training data: a folder with a subfolder for each class (or with train/ and val/ "
            "of that form), a list of `path label` lines, tar shards or Parquet files here or at a "
            "URL such as s3://, hf://datasets/USER/NAME, or the built-in data set digits or "
            "shapes. Pre-training takes any folder of images and videos. By default, the "
            "data that the recipe names (data.path).",
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
    private_urls: Annotated[
        bool,
        typer.Option(
            "--private-urls",
            help="Also use URLs that lead into private networks, if a recipe file names them, or "
            "the run that is resumed.",
        ),
    ] = False,
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
    track: Annotated[
        list[TrackerName] | None,
        typer.Option(
            help="Also send the measurements to a tracker. May be given several times.",
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="The same as --track tensorboard.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Carry out a few steps, say how long the run will take and how much memory it "
            "needs, and exit. Nothing is written.",
        ),
    ] = False,
    profile: Annotated[
        int,
        typer.Option(
            "--profile",
            min=0,
            metavar="N",
            help="Write a trace of N steps to profile/ in the folder of the run.",
            show_default=False,
        ),
    ] = 0,
    blocking_saves: Annotated[
        bool,
        typer.Option(
            "--blocking-saves",
            help="Wait until each checkpoint is written. A thread writes it otherwise, from a "
            "copy of the state.",
        ),
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
    and checkpoints. After Ctrl-C, a checkpoint is saved, and a line says how to continue. Start
    several processes with torchrun -m hiera_cli train.
    """
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("hiera").setLevel(level)
    changes = dict(map(recipes.parse_setting, settings or []))
    if resume is not None and overwrite:
        raise UsageError(
            "--resume continues a run, and --overwrite deletes it", "leave out one of them"
        )
    if print_recipe and resume is None:
        if recipe is None:
            raise UsageError("no recipe", "name a model or a .yaml file")
        given = {"data.path": data, "init_from": init_from}
        changes |= {key: value for key, value in given.items() if value is not None}
        chosen = recipes.read_recipe(recipe, changes, shorten_warmup=True)
        typer.echo(chosen.to_yaml(), nl=False)
        return OK
    processes = 0 if workers == "0" else auto_or_workers(workers)
    from hiera_core.training import build, distributed, trainer
    from hiera_core.training.checkpoints import run_recipe

    folder = output or run_recipe.default_folder(recipe, resume)
    run_options = build.RunOptions(
        init_from=init_from,
        resume=resume,
        overwrite=overwrite,
        compile=compile,
        parallel=parallel.value,
        workers=processes,
        tensorboard=tensorboard,
        track=tuple(each.value for each in track or ()),
        live=not quiet,
        blocking_saves=blocking_saves,
        profile=profile,
        private_urls=private_urls,
        named_urls=urls_among(data, changes, init_from),
    )
    chosen = run_recipe.complete_recipe(recipe, data, folder, run_options, changes)
    if print_recipe:
        typer.echo(chosen.to_yaml(), nl=False)
        return OK
    splits = trainer.open_data(chosen, chosen.data.path, folder, run_options.public_urls)
    with distributed.join_processes(device) as world:
        if not world.is_main_process:
            logging.getLogger("hiera").setLevel(logging.ERROR)
        if dry_run:
            _show_dry_run(chosen, splits, world, run_options)
            return OK
        result = trainer.train(chosen, splits, folder, world, run_options)
    if world.is_main_process and not quiet:
        if chosen.task == "classify":
            next_command = f"hiera predict --checkpoint {folder}"
        else:
            classifier = chosen.model.name.removeprefix("mae_")
            next_command = f"hiera train {classifier} DATA --init-from {folder}"
        print_message(f"{_summary(result)}; {folder} holds the weights: {next_command}")
    return OK


def _show_dry_run(recipe: Any, splits: Any, world: Any, run_options: Any) -> None:
    """Measure the first steps of a run, and print what the whole run will take."""
    from hiera_core.training.steps.dry_run import dry_run

    found = dry_run(recipe, splits, world, run_options)
    if not world.is_main_process:
        return
    minutes, seconds = divmod(round(found.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    some = "" if found.trained == found.parameters else f" ({found.trained / 1e6:.3g}M trained)"
    for name, text in (
        ("model", f"{recipe.model.name}, {found.parameters / 1e6:.3g}M parameters{some}"),
        ("steps", f"{found.steps}, {found.steps_per_pass} in a pass over the data"),
        ("step", f"{found.step_time:.3g} s, {100 * found.wait:.0f}% of it waiting for data"),
        ("rate", f"{found.rate:.4g} views/s on {world.size} x {world.device}"),
        ("duration", f"{hours}:{minutes:02}:{seconds:02}, without validation and pictures"),
        ("memory", f"{found.memory / 2**20:.0f} MiB for each process, at most"),
        ("checkpoint", f"{found.checkpoint / 2**20:.4g} MiB"),
    ):
        typer.echo(f"{name:<11}{text}")


def _summary(result: Mapping[str, object]) -> str:
    """Return the last measurements of a run as text, those on held-out data if there are any."""
    held_out = result.get("val")
    values = held_out if isinstance(held_out, dict) else result
    parts = [f"{counted(int(str(result['step'])), 'step')}"]
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "top1" in values:
        parts.append(f"top-1 {values['top1']:.2f}%")
    return ", ".join(parts)
