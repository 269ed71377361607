"""Loss and accuracy on held-out data in the course of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..data.datasets import MediaDataset
from ..errors import TrainingError
from ..inference.evaluate import has_top5, percent
from .build import TrainingSetup
from .checkpoint import TrainingState
from .dataloader import Collator, EvalDataset, make_loader
from .distributed import World, reshard, unwrap_model
from .losses import compute_losses
from .recipe import Recipe
from .sampler import eval_batches

BATCH = 64  # views a process, at most


@torch.no_grad()
def validate(
    parts: TrainingSetup, samples: MediaDataset, recipe: Recipe, world: World
) -> dict[str, Any]:
    """Mean loss and, of a classifier, accuracy in percent. One centre view each (an autoencoder
    always gets the same masks), every sample once whatever the number of processes.

    Returns:
        loss, top1, top5 (above five classes), samples, bad: how many were unreadable.

    Raises:
        TrainingError: too many are.
    """
    model = unwrap_model(parts.training.model)
    batch = max(1, min(BATCH, recipe.batch_size // world.size))
    keys = eval_batches(len(samples), batch, world.rank, world.size)
    dataset = EvalDataset(samples, parts.transform, parts.masking)
    collate = Collator((3, *parts.size), parts.num_classes)
    # loss, top-1, top-5, samples, unreadable
    sums = torch.zeros(5, dtype=torch.float64, device=parts.device)
    model.eval()
    with ema_weights(parts.training):
        for item in make_loader(dataset, keys, collate, parts.workers, parts.device):
            here = item.to(parts.device)
            views = compute_losses(model, here, recipe, parts.precision)
            for place, values in enumerate((views.losses, views.top1, views.top5)):
                sums[place] += (values * here.weight).double().sum()
            sums[3] += here.weight.sum()
            sums[4] += len(item.bad)
    model.train()
    loss, top1, top5, count, bad = world.sum(sums).tolist()
    found: dict[str, Any] = {"loss": loss / max(1, count)}
    if parts.num_classes:
        found["top1"] = percent(top1, count)
        if has_top5(parts.num_classes):
            found["top5"] = percent(top5, count)
    if bad > recipe.data.max_bad * len(samples):
        raise TrainingError(
            f"{int(bad)} of {len(samples)} held-out samples are unreadable, more than data.max_bad "
            f"= {recipe.data.max_bad:g} allows",
            "hiera eval names them: mend or remove them",
        )
    return {**found, "samples": int(count), "bad": int(bad)}


@contextlib.contextmanager
def ema_weights(training: TrainingState) -> Iterator[None]:
    """The averaged weights in place of the present ones, where a recipe keeps them."""
    if not training.averages:
        yield
        return
    reshard(training.model)
    own = dict(unwrap_model(training.model).named_parameters())
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
