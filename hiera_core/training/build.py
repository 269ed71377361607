"""Setup of a run before its first step: model, optimiser, preprocessing and augmentation."""

from __future__ import annotations

import platform
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from .. import zoo
from ..compiling.compiled import compile_blocks, compile_in_place
from ..data.classes.class_balance import balanced_weights
from ..data.datasets import MediaDataset, Splits
from ..data.remote.web_ranges import check_public
from ..data.transforms import ImageTransform, VideoTransform, check_channels, transform_for
from ..data.video_files.animation_reader import kind_for_model
from ..device import DTYPES, dtype_name, is_out_of_memory, training_dtype
from ..errors import DeviceError, HieraError, InputError, UsageError
from ..models import factory
from ..models.hiera import Hiera, HieraEncoder
from ..models.mae import MaskedAutoencoderHiera
from ..models.masking import check_mask_ratio
from ..process.cores import cores_per_process
from ..records import Kind
from ..version import __version__
from ..weights import load
from . import optimizer
from .augment import Augment
from .checkpoints.checkpoint import TrainingState
from .distributed import World, unwrap_model
from .loading.finish_views import FinishViews
from .recipe import Recipe
from .recipe import RunOptions as RunOptions
from .sampler import MaskSampler, derive_seed
from .tuning import freezing, lora

DEFAULT_WORKERS = 8  # largest number without the option


@dataclass
class TrainingSetup:
    """Everything that the recipe, the data and the options determine before the first step."""

    training: TrainingState  # model, optimiser, EMA and loss scaler
    card: dict[str, Any]  # contents of hiera.json
    transform: ImageTransform | VideoTransform  # preprocessing of held-out samples
    augment: Augment
    masking: MaskSampler | None  # None for a classifier
    num_classes: int | None  # None for an autoencoder
    precision: torch.dtype  # dtype of autocast
    world: World
    workers: int  # dataloader workers of this process
    class_weights: torch.Tensor | None  # of the loss, float32 [classes]
    weights: str  # what the weights were at the start: "random", or where they come from
    public_urls: Container[str]  # URLs that must not lead into private networks

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.world.device

    @property
    def size(self) -> tuple[int, ...]:
        """Size of the model's input: (frames,) height, width."""
        size: tuple[int, ...] = unwrap_model(self.training.model).config["input_size"]
        return size

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of a view in training: channels, (frames,) height, width."""
        return (1 if self.transform.grey else 3, *self.size)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a view in evaluation, before it is normalised: (frames,) height, width, 3."""
        return (*self.size, 3)

    @property
    def finish(self) -> FinishViews:
        """What remains to be done to a training batch on the device."""
        return FinishViews(self.transform.mean, self.transform.std)

    @property
    def clip(self) -> VideoTransform | None:
        """The preprocessing of a video model; None for an image model."""
        return self.transform if isinstance(self.transform, VideoTransform) else None

    @property
    def unit(self) -> str:
        """Unit of the views: "images" or "clips"."""
        return "images" if self.clip is None else "clips"

    def facts(self, steps: int, splits: Splits) -> dict[str, Any]:
        """Return the facts about a run for the first event of its log.

        Args:
            steps: Number of steps in the run.
            splits: The data.
        """
        versions = {
            "hiera": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        parameters = list(self.training.model.parameters())
        return {
            "steps": steps,
            "weights": self.weights,
            "classes": self.num_classes,
            "samples": len(splits.train),
            "held_out": 0 if splits.val is None else len(splits.val),
            "processes": self.world.size,
            "device": str(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "versions": versions,
        }


def build_training(
    recipe: Recipe,
    samples: MediaDataset,
    world: World,
    options: RunOptions,
    card: dict[str, Any] | None = None,
) -> TrainingSetup:
    """Build everything that a run needs before its first step.

    Args:
        recipe: The recipe.
        samples: The training data.
        world: The processes of the run.
        options: How the run is carried out.
        card: Card of a run that resumes. Its weights come from the checkpoint, so `init_from` is
            not read.

    Raises:
        UsageError: The data or the recipe does not suit the model.
        CheckpointError, HubError: The weights to start from cannot be loaded.
    """
    init_from = options.init_from if options.init_from is not None else recipe.init_from
    init_from = None if card else init_from
    public_only = init_from is not None and init_from in options.public_urls
    if public_only:
        _check_public(str(init_from))
    model, new_card = _build_model(recipe, samples, init_from, public_only)
    resumes, card = card is not None, card or new_card
    config, masking = model.config, None
    if recipe.freeze is not None:
        freezing.freeze_blocks(model, recipe.freeze)
    if recipe.lora is not None:
        lora.add_adapters(model, recipe.lora)
    if isinstance(model, MaskedAutoencoderHiera):
        windows = model.layout.windows
        check_mask_ratio(recipe.mask_ratio, windows)
        masking = MaskSampler(windows, recipe.mask_ratio)
    model.card = card
    check_channels(model)
    transform = transform_for(model)
    interpolation = transform.interpolation if isinstance(transform, ImageTransform) else "bilinear"
    precision: str = recipe.precision
    if precision == "auto":
        precision = dtype_name(training_dtype(world.device))
    return TrainingSetup(
        training=_build_state(model.to(world.device).train(), recipe, world, options, precision),
        card=card,
        transform=transform,
        augment=Augment(
            recipe.augment,
            transform.size,
            transform.mean,
            interpolation,
            transform.grey,
        ),
        masking=masking,
        num_classes=None if masking else config["num_classes"],
        precision=DTYPES[precision],
        world=world,
        workers=default_workers() if options.workers is None else options.workers,
        class_weights=_class_weights(recipe, samples, world),
        weights="from the checkpoint" if resumes else _origin(init_from),
        public_urls=options.public_urls,
    )


def check_kind(setup: TrainingSetup, samples: MediaDataset, name: str) -> None:
    """Check that the data is not of the other kind altogether. Three samples are read at most, and
    as a rule one: a few files of the other kind count as unreadable samples later.

    Args:
        setup: What is trained.
        samples: The data.
        name: Of the model, for the message.

    Raises:
        UsageError: The first, the middle and the last sample are of the other kind.
    """
    if not len(samples):
        return
    expected: Kind = "image" if isinstance(setup.transform, ImageTransform) else "video"
    for number in sorted({0, len(samples) // 2, len(samples) - 1}):
        source = samples.sources[number]
        try:
            kind = kind_for_model(source.content(), source.name, takes_videos=expected == "video")
        except (HieraError, OSError):  # it is reported when it is trained on
            return
        if kind == expected:
            return
    raise UsageError(
        f"{name} takes {expected}s, and the data holds {kind}s, such as {source.name}",
        f"use other data, or a model for {kind}s; `hiera models` lists them",
    )


def _check_public(url: str) -> None:
    """Check the URL of weights that somebody else may have named.

    Raises:
        UsageError: It may lead into a private network.
    """
    try:
        check_public(url)
    except InputError as error:
        raise UsageError(f"{url}: {error.message}", error.hint) from error


def _class_weights(recipe: Recipe, samples: MediaDataset, world: World) -> torch.Tensor | None:
    if recipe.class_weights is None or samples.labels is None or samples.num_classes is None:
        return None
    weights = balanced_weights(np.asarray(samples.labels), samples.num_classes)
    return torch.from_numpy(weights).to(world.device)


def _origin(init_from: str | None) -> str:
    return "random" if init_from is None else f"from {init_from}"


def default_workers() -> int:
    """Return how many dataloader workers suit this process: its share of the cores that it may
    use, at most 8."""
    return min(DEFAULT_WORKERS, cores_per_process())


def _build_model(
    recipe: Recipe, samples: MediaDataset, init_from: str | None, public_only: bool
) -> tuple[HieraEncoder, dict[str, Any]]:
    """Return the model and its card.

    Args:
        recipe: The recipe.
        samples: The training data, for the classes of a classifier.
        init_from: Weights to start from; None: random weights.
        public_only: Whether their URL must not lead into a private network.
    """
    entry, config = zoo.get(recipe.model.name), dict(recipe.model.config)
    if not entry.autoencoder:
        if samples.labels is None or not samples.num_classes:
            raise UsageError("the data has no labels", "give class folders or a list with labels")
        if config.setdefault("num_classes", samples.num_classes) != samples.num_classes:
            raise UsageError(
                f"model.config.num_classes is {config['num_classes']}, but the data has "
                f"{samples.num_classes} classes",
                "leave it out: the data decides the number of classes",
            )
    zoo.check_is_hiera(entry.family, entry.name)
    torch.manual_seed(derive_seed("weights", recipe.seed))
    loaded: load.Checkpoint | None = None
    if init_from is not None:
        loaded = load.read_weights(init_from, public_only=public_only)
    try:
        if loaded is not None and loaded.is_headless and isinstance(config.get("num_classes"), int):
            model = factory.from_zoo(entry, loaded, **{**config, "num_classes": 0})
            cast(Hiera, model).reset_classifier(config["num_classes"])
        else:
            model = factory.from_zoo(entry, loaded, **config)
    except TypeError as error:  # model.config has an unknown argument
        raise UsageError(f"model.config: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError("there is no memory for the model", "use a smaller model") from error
    assert isinstance(model, HieraEncoder)
    origin = f"trained with hiera-toolkit {__version__}"
    card = {k: v for k, v in model.card.items() if k not in ("licence", "classes", "training")}
    card["source"] = origin if loaded is None else f"{origin} from {loaded.source}"
    if samples.classes is not None and not entry.autoencoder:
        card["classes"] = list(samples.classes)
    return model, card


def _build_state(
    model: HieraEncoder, recipe: Recipe, world: World, options: RunOptions, precision: str
) -> TrainingState:
    """Compile a model, make it parallel, and return it with its optimiser, EMA and loss scaler."""
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    if options.compile and options.parallel == "fsdp" and world.size > 1:
        compile_blocks(model)
    elif options.compile:
        compile_in_place(model)
    parallel_model = world.parallelize(model, options.parallel, DTYPES[precision])
    inner = unwrap_model(parallel_model)
    assert isinstance(inner, HieraEncoder)
    averages = {}
    if recipe.ema:
        averages = {
            name: p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad
        }
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return TrainingState(
        parallel_model, optimizer.build_optimizer(inner, recipe.optimizer), averages, scaler
    )
