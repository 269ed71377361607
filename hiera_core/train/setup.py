"""What a run needs before its first step: its folder, its model, optimiser and transforms."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import factory, files, weights, zoo
from ..datasets import Samples, Splits
from ..errors import OutputError, UsageError
from ..mae import MaskedAutoencoderHiera, check_mask_ratio
from ..model import HieraEncoder
from ..preprocess.image import ImageTransform
from ..preprocess.video import VideoTransform
from ..version import __version__
from . import checkpoint, optim
from .augment import Augment
from .checkpoint import Training
from .config import Recipe
from .data import Masking
from .dist import Parallel, World, plain
from .plan import seed_of
from .report import CURVES_NAME, LOG_NAME

RECIPE_NAME = "recipe.yaml"
# May differ when a run goes on: they change what is said and kept, not what is computed.
FREE_KEYS = ("log_every", "val_every", "save_every", "keep")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WORKERS = 8


@dataclass(frozen=True)
class Options:
    """How a run is carried out; what it computes is the recipe's.

    Args:
        init_from: a checkpoint to begin with: zoo name, hub repository, folder or file.
        resume: `auto`, a run's folder or a checkpoint; None begins anew.
        overwrite: forget what the folder holds.
        compile: run the model through torch.compile, as one graph.
        parallel: how several processes share the model.
        workers: reading processes, or None for what the machine has.
        live: a view that stays in place, where there is a terminal.
    """

    init_from: str | None = None
    resume: str | None = None
    overwrite: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    workers: int | None = None
    tensorboard: bool = False
    live: bool = True


class RunFolder:
    """The folder of a run. Nothing is changed in it before `claim`.

    Attributes:
        resumes: the checkpoint to go on from, or None; `meta`: what was saved beside it.

    Raises:
        UsageError: it holds another run, or one that was begun with another recipe or other data;
            it cannot be written to.
    """

    def __init__(
        self, path: Path, recipe: Recipe, samples: Samples, world: World, options: Options
    ) -> None:
        self.path, self.recipe, self.world = path, recipe, world
        self.resumes = checkpoint.find(options.resume, path) if options.resume else None
        self.meta: dict[str, Any] = {}
        if self.resumes is not None:
            self.meta = checkpoint.read_meta(self.resumes)
            self._check_same(self.meta["recipe"])
            if self.meta.get("data") != samples.fingerprint:
                raise UsageError(
                    "the run was begun on other data",
                    "resume with its own, or begin another run with --init-from",
                )
        self.goes_on = self.resumes is not None and (
            self.resumes.resolve().is_relative_to(path.resolve())
        )
        may_clear = self.goes_on or options.overwrite or options.resume == "auto"
        if (path / RECIPE_NAME).exists() and not may_clear:
            raise UsageError(
                f"{path} already holds a run", "use --resume auto, --overwrite, or another -o"
            )
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UsageError(f"{path} cannot be written to", "use another -o")

    def claim(self) -> None:
        """Make it this run's: forget what it held, unless the run goes on.

        Raises:
            OutputError: it cannot be written to.
        """
        self.world.barrier()  # everybody has looked before anything is written
        if self.world.first and not self.goes_on:
            self._clear()
        self.world.barrier()

    def _clear(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoints", "pictures"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (LOG_NAME, CURVES_NAME, "model.safetensors", "config.json", "hiera.json"):
                (self.path / name).unlink(missing_ok=True)
            (self.path / RECIPE_NAME).write_text(self.recipe.to_yaml())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror})") from error

    def _check_same(self, begun_with: dict[str, Any]) -> None:
        for key, value in self.recipe.to_dict().items():
            if key not in FREE_KEYS and begun_with.get(key) != value:
                raise UsageError(
                    f"the run was begun with {key} = {begun_with.get(key)}, not {value}",
                    "resume with its own recipe, or begin another run with --init-from",
                )

    def export(self, parts: Setup, last: dict[str, Any]) -> None:
        """model.safetensors, config.json and hiera.json, in the reference's names."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(parts.training.model, options=options)
        if self.world.first:
            told = ("step", "loss", "val", "unreadable")
            result: dict[str, Any] = {k: last[k] for k in told if k in last}
            files.write_safetensors(self.path / "model.safetensors", state)
            files.write_json(self.path / "config.json", plain(parts.training.model).config)
            files.write_json(self.path / "hiera.json", {**parts.card, "training": result})


@dataclass
class Setup:
    """The parts of a run that the recipe and the data decide."""

    training: Training
    card: dict[str, Any]  # for hiera.json
    transform: ImageTransform | VideoTransform  # of held-out samples
    augment: Augment
    masking: Masking | None  # of an autoencoder
    num_classes: int | None  # of a classifier
    precision: torch.dtype
    world: World
    workers: int

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def size(self) -> tuple[int, ...]:
        """Of the model's input."""
        size: tuple[int, ...] = plain(self.training.model).config["input_size"]
        return size

    @property
    def clip(self) -> VideoTransform | None:
        return self.transform if isinstance(self.transform, VideoTransform) else None

    @property
    def unit(self) -> str:
        return "images" if self.clip is None else "clips"

    def facts(self, steps: int, splits: Splits) -> dict[str, Any]:
        """What the log begins with."""
        versions = {
            "hiera": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return {
            "steps": steps,
            "samples": len(splits.train),
            "held_out": 0 if splits.val is None else len(splits.val),
            "processes": self.world.size,
            "device": str(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.training.model.parameters()),
            "versions": versions,
        }


def set_up(
    recipe: Recipe,
    samples: Samples,
    world: World,
    options: Options,
    card: dict[str, Any] | None = None,
) -> Setup:
    """Build everything for a run.

    Args:
        card: of a run that goes on, whose weights come from its checkpoint.

    Raises:
        UsageError: the data or the recipe does not suit the model.
        CheckpointError, HubError: weights to begin with cannot be loaded.
    """
    model, new = _build_model(recipe, samples, None if card else options.init_from)
    card = card or new
    config, masking = model.config, None
    if isinstance(model, MaskedAutoencoderHiera):
        windows = model.layout.windows
        check_mask_ratio(recipe.mask_ratio, windows)
        masking = Masking(windows, int(windows * (1 - recipe.mask_ratio)))
    transform = _transform(card.get("preprocessing"), config["input_size"])
    interpolation = transform.interpolation if isinstance(transform, ImageTransform) else "bilinear"
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    workers = options.workers
    if workers is None:
        workers = min(MAX_WORKERS, (os.cpu_count() or 1) // world.size)
    return Setup(
        training=_prepare(model.to(world.device).train(), recipe, world, options, precision),
        card=card,
        transform=transform,
        augment=Augment(
            recipe.augment, transform.size, transform.mean, transform.std, interpolation
        ),
        masking=masking,
        num_classes=None if masking else config["num_classes"],
        precision=PRECISIONS[precision],
        world=world,
        workers=workers,
    )


def _build_model(
    recipe: Recipe, samples: Samples, init_from: str | None
) -> tuple[HieraEncoder, dict[str, Any]]:
    """The model, and what hiera.json will say of it."""
    row, config = zoo.get(recipe.model.name), dict(recipe.model.config)
    if not row.autoencoder:
        if samples.labels is None or not samples.num_classes:
            raise UsageError("the data has no labels", "give class folders or a list with labels")
        if config.setdefault("num_classes", samples.num_classes) != samples.num_classes:
            raise UsageError(
                f"model.config.num_classes is {config['num_classes']}, and the data has "
                f"{samples.num_classes} classes",
                "leave it out: the data decides",
            )
    torch.manual_seed(seed_of("weights", recipe.seed))
    loaded: weights.Checkpoint | None = None
    if init_from is not None:
        loaded = factory.read_weights(init_from)
    try:
        model = factory.from_zoo(row, loaded, **config)
    except TypeError as error:  # an argument that there is not
        raise UsageError(f"model.config: {error}") from error
    origin = f"trained with hiera-toolkit {__version__}"
    card = {k: v for k, v in model.card.items() if k not in ("licence", "classes", "training")}
    card["source"] = origin if loaded is None else f"{origin} from {loaded.source}"
    if samples.classes is not None and not row.autoencoder:
        card["classes"] = list(samples.classes)
    return model, card


def _prepare(
    model: HieraEncoder, recipe: Recipe, world: World, options: Options, precision: str
) -> Training:
    """Compile it, spread it over the processes, and give it an optimiser."""
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    if options.compile and options.parallel == "fsdp" and world.size > 1:
        for block in model.blocks:  # what FSDP does between blocks is in no graph
            block.compile(fullgraph=True)
    elif options.compile:
        model.compile(fullgraph=True)
    spread = world.spread(model, options.parallel)
    averages = {}
    if recipe.ema:
        averages = {n: p.detach().clone() for n, p in plain(spread).named_parameters()}
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return Training(spread, optim.build(plain(spread), recipe.optimizer), averages, scaler)


def _transform(card: Any, size: tuple[int, ...]) -> ImageTransform | VideoTransform:
    kinds: dict[int, Any] = {2: ImageTransform, 3: VideoTransform}
    if len(size) not in kinds:
        raise UsageError("this model takes signals", "training is for pictures and videos")
    transform: ImageTransform | VideoTransform = kinds[len(size)].from_card(card, size)
    return transform
