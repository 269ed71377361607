"""Loss and accuracy on held-out data in the course of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..datasets import Samples
from ..errors import TrainingError
from .checkpoint import Training
from .config import Recipe
from .data import Collate, EvalSet, reader
from .dist import World, plain, reshard
from .plan import eval_batches
from .setup import Setup
from .task import views_of

BATCH = 64  # views a process, at most


@torch.no_grad()
def validate(parts: Setup, samples: Samples, recipe: Recipe, world: World) -> dict[str, Any]:
    """Mean loss and, of a classifier, accuracy in percent. One centre view each (an autoencoder
    always gets the same masks), every sample once whatever the number of processes.

    Returns:
        loss, top1, top5 (above five classes), samples, bad: how many were unreadable.

    Raises:
        TrainingError: too many are.
    """
    model = plain(parts.training.model)
    batch = max(1, min(BATCH, recipe.batch_size // world.size))
    keys = eval_batches(len(samples), batch, world.rank, world.size)
    dataset = EvalSet(samples, parts.transform, parts.masking)
    collate = Collate((3, *parts.size), parts.num_classes)
    # loss, first, within 5, samples, unreadable
    sums = torch.zeros(5, dtype=torch.float64, device=parts.device)
    model.eval()
    with averaged(parts.training):
        for item in reader(dataset, keys, collate, parts.workers, parts.device):
            here = item.to(parts.device)
            views = views_of(model, here, recipe, parts.precision)
            for place, values in enumerate((views.losses, views.first, views.within5)):
                sums[place] += (values * here.weight).double().sum()
            sums[3] += here.weight.sum()
            sums[4] += len(item.bad)
    model.train()
    loss, first, within5, count, bad = world.sum(sums).tolist()
    found: dict[str, Any] = {"loss": loss / max(1, count)}
    if parts.num_classes:
        found["top1"] = 100 * first / max(1, count)
        if parts.num_classes > 5:
            found["top5"] = 100 * within5 / max(1, count)
    if bad > recipe.data.max_bad * len(samples):
        raise TrainingError(
            f"{int(bad)} of {len(samples)} held-out samples are unreadable, more than data.max_bad "
            f"= {recipe.data.max_bad:g} allows",
            "hiera eval names them: mend or remove them",
        )
    return {**found, "samples": int(count), "bad": int(bad)}


@contextlib.contextmanager
def averaged(training: Training) -> Iterator[None]:
    """The averaged weights in place of the present ones, where a recipe keeps them."""
    if not training.averages:
        yield
        return
    reshard(training.model)
    own = dict(plain(training.model).named_parameters())
    present = {name: own[name].detach().clone() for name in training.averages}
    _copy(training.averages, own)
    try:
        yield
    finally:
        reshard(training.model)  # else FSDP would go on with the averages that it has gathered
        _copy(present, own)


def _copy(values: dict[str, torch.Tensor], into: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)
