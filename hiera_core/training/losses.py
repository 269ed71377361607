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
from ..inference.evaluate import TOP_K, topk_hits
from .dataloader import Batch
from .recipe import Recipe


@dataclass
class BatchLosses:
    """Losses and hits of a batch of n views. `top1` and `top5` are 0 for an autoencoder."""

    losses: torch.Tensor  # [n]
    top1: torch.Tensor  # [n], 1 if the most probable class is right
    top5: torch.Tensor  # [n], 1 if the right class is among the five most probable


def compute_losses(
    model: nn.Module, batch: Batch, recipe: Recipe, precision: torch.dtype
) -> BatchLosses:
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
                zeros = torch.zeros_like(losses)
                return BatchLosses(losses, zeros, zeros)
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
        ranked = output.detach().topk(min(TOP_K, output.shape[1])).indices
        top1, top5 = topk_hits(ranked, batch.target.argmax(1))
        return BatchLosses(losses, top1.float(), top5.float())


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
