"""What a batch is worth: the loss of every view, and whether its class was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..device import compile_faults, is_out_of_memory
from ..errors import DeviceError
from .config import Recipe
from .data import Batch


@dataclass
class Views:
    """Of a batch of n views. `first` and `within5` are 0 for an autoencoder."""

    losses: torch.Tensor  # [n]
    first: torch.Tensor  # [n], 1 where the most probable class is right
    within5: torch.Tensor  # [n]


def views_of(model: nn.Module, batch: Batch, recipe: Recipe, precision: torch.dtype) -> Views:
    """Put a batch through a model: in training mode for gradients, in evaluation to measure.

    Raises:
        DeviceError: out of memory, or torch.compile failed.
    """
    half = precision is not torch.float32
    with _faults(batch.x.device):
        with torch.autocast(batch.x.device.type, precision if half else None, enabled=half):
            if batch.target is None:
                _, preds, labels, _ = model(batch.x, mask=batch.units)
                difference = preds.float() - labels.float()
                losses = difference.square().view(len(batch.x), -1).mean(1)
                nothing = torch.zeros_like(losses)
                return Views(losses, nothing, nothing)
            output = model(batch.x).float()
        if model.training:  # logits
            smoothing = recipe.augment.label_smoothing
            losses = F.cross_entropy(
                output, batch.target, reduction="none", label_smoothing=smoothing
            )
        else:  # probabilities
            losses = F.nll_loss(
                output.clamp_min(1e-12).log(), batch.target.argmax(1), reduction="none"
            )
        label = batch.target.argmax(1, keepdim=True)
        hits = (output.detach().topk(min(5, output.shape[1])).indices == label).float()
        return Views(losses, hits[:, 0], hits.amax(1))


@contextlib.contextmanager
def _faults(device: torch.device) -> Iterator[None]:
    try:
        with compile_faults():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{device} has no memory left for a batch",
            "--set accumulate=N passes fewer samples at a time, --set grad_checkpointing=true "
            "stores less",
        ) from error
