"""What a run needs before its first step: its folder, its model, optimiser and transforms."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from .. import zoo
from ..data.datasets import MediaDataset, Splits
from ..data.transforms import ImageTransform, VideoTransform, transform_for
from ..device import DTYPES
from ..errors import UsageError
from ..models import factory
from ..models.hiera import HieraEncoder
from ..models.mae import MaskedAutoencoderHiera
from ..models.masking import check_mask_ratio
from ..version import __version__
from ..weights import load
from . import optimizer
from .augment import Augment
from .checkpoint import TrainingState
from .dataloader import MaskSampler
from .distributed import Parallel, World, unwrap_model
from .recipe import Recipe
from .sampler import derive_seed

MAX_WORKERS = 8


@dataclass(frozen=True)
class RunOptions:
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


@dataclass
class TrainingSetup:
    """The parts of a run that the recipe and the data decide."""

    training: TrainingState
    card: dict[str, Any]  # for hiera.json
    transform: ImageTransform | VideoTransform  # of held-out samples
    augment: Augment
    masking: MaskSampler | None  # of an autoencoder
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
        size: tuple[int, ...] = unwrap_model(self.training.model).config["input_size"]
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


def build_training(
    recipe: Recipe,
    samples: MediaDataset,
    world: World,
    options: RunOptions,
    card: dict[str, Any] | None = None,
) -> TrainingSetup:
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
        masking = MaskSampler(windows, int(windows * (1 - recipe.mask_ratio)))
    model.card = card
    transform = transform_for(model)
    interpolation = transform.interpolation if isinstance(transform, ImageTransform) else "bilinear"
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    workers = options.workers
    if workers is None:
        workers = min(MAX_WORKERS, (os.cpu_count() or 1) // world.size)
    return TrainingSetup(
        training=_prepare(model.to(world.device).train(), recipe, world, options, precision),
        card=card,
        transform=transform,
        augment=Augment(
            recipe.augment, transform.size, transform.mean, transform.std, interpolation
        ),
        masking=masking,
        num_classes=None if masking else config["num_classes"],
        precision=DTYPES[precision],
        world=world,
        workers=workers,
    )


def _build_model(
    recipe: Recipe, samples: MediaDataset, init_from: str | None
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
    torch.manual_seed(derive_seed("weights", recipe.seed))
    loaded: load.Checkpoint | None = None
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
    model: HieraEncoder, recipe: Recipe, world: World, options: RunOptions, precision: str
) -> TrainingState:
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
        averages = {n: p.detach().clone() for n, p in unwrap_model(spread).named_parameters()}
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return TrainingState(
        spread, optimizer.build_optimizer(unwrap_model(spread), recipe.optimizer), averages, scaler
    )
