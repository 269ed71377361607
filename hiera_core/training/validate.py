"""Loss and accuracy on held-out data during a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.datasets import MediaDataset
from ..errors import TrainingError
from ..inference.evaluate import has_top5, percent
from .build import TrainingSetup
from .checkpoints.checkpoint import TrainingState
from .dataloader import Batch, Collator, EvalDataset, make_loader
from .distributed import World, reshard, unwrap_model
from .losses import compute_losses
from .recipe import Recipe
from .sampler import SampleKey

MAX_BATCH = 64  # largest batch of a process


@torch.no_grad()
def validate(
    setup: TrainingSetup,
    samples: MediaDataset,
    recipe: Recipe,
    world: World,
    stops: Callable[[], bool] = lambda: False,
    loader: DataLoader[Batch] | None = None,
) -> dict[str, Any] | None:
    """Measure the mean loss on held-out data and, for a classifier, the accuracy.

    The model sees one centre view of each sample; an autoencoder always gets the same masks. Each
    sample counts once, with any number of processes.

    Args:
        setup, recipe, world: Of the run.
        samples: The held-out data.
        stops: Called after each batch: whether to end early.
        loader: `validation_loader`, which keeps its workers for the next validation. None: a new
            one.

    Returns:
        `loss`; `top1` and, for more than five classes, `top5`, in percent; `samples`, the number of
        samples measured; `bad`, the number of unreadable samples. None if it has ended early.

    Raises:
        TrainingError: Too many samples are unreadable.
        DeviceError: See `compute_losses`.
    """
    model = unwrap_model(setup.training.model)
    # Sums over each batch: loss, top-1 hits, top-5 hits, samples.
    sums: list[torch.Tensor] = []
    unreadable = 0
    model.eval()
    with ema_weights(setup.training):
        for loaded in loader or validation_loader(setup, samples, recipe, world):
            batch = loaded.to(setup.device)
            batch.x = setup.transform.normalise(batch.x)
            losses = compute_losses(model, batch, recipe, setup.precision)
            values = torch.stack((losses.losses, losses.top1, losses.top5))
            sums.append(torch.cat((values * batch.weight, batch.weight[None])).sum(1))
            unreadable += len(batch.bad)
            if stops():
                model.train()
                return None
    model.train()
    loss, top1, top5, count = world.total(torch.stack(sums)).sum(0).tolist()
    bad = int(world.total(torch.tensor(unreadable)))
    if bad > recipe.data.max_bad * len(samples) or not count:
        raise TrainingError(
            f"{bad} of {len(samples)} held-out samples are unreadable, more than data.max_bad "
            f"= {recipe.data.max_bad:g} allows",
            "repair or remove them; for a classifier, hiera eval lists them",
        )
    result: dict[str, Any] = {"loss": loss / count}
    if setup.num_classes:
        result["top1"] = percent(top1, count)
        if has_top5(setup.num_classes):
            result["top5"] = percent(top5, count)
    return {**result, "samples": int(count), "bad": bad}


def validation_loader(
    setup: TrainingSetup, samples: MediaDataset, recipe: Recipe, world: World
) -> DataLoader[Batch]:
    """Return the batches of held-out samples of this process. The arguments are those of
    `validate`."""
    batch_size = max(1, min(MAX_BATCH, recipe.batch_size // world.size))
    keys = list(eval_batches(len(samples), batch_size, world.rank, world.size))
    dataset = EvalDataset(samples, setup.transform, setup.masking)
    collate = Collator(setup.pixel_shape, setup.num_classes)
    return make_loader(dataset, keys, collate, setup.workers, setup.device)


def eval_batches(
    samples: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[SampleKey]]:
    """Yield one process's batches for evaluation. All processes together see each sample once.

    Every process gets the same number of batches of the same size, filled up with padding.

    Args:
        samples: Number of samples in the data set.
        batch: Number of samples in a batch.
        rank: Rank of this process, from 0.
        world: Number of processes.
    """
    share = list(range(rank, samples, world))
    for first in range(0, math.ceil(samples / world), batch):
        numbers: list[int | None] = list(share[first : first + batch])
        numbers += [None] * (batch - len(numbers))
        yield [SampleKey(0, number) for number in numbers]


@contextlib.contextmanager
def ema_weights(training: TrainingState) -> Iterator[None]:
    """Give the model its EMA weights within the `with` block, if the recipe keeps an EMA."""
    if not training.averages:
        yield
        return
    reshard(training.model)
    parameters = dict(unwrap_model(training.model).named_parameters())
    weights = {name: parameters[name].detach().clone() for name in training.averages}
    _copy(training.averages, parameters)
    try:
        yield
    finally:
        reshard(training.model)  # otherwise FSDP would keep using the EMA weights it has gathered
        _copy(weights, parameters)


def _copy(values: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
