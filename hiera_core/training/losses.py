"""Loss of each view of a batch, and whether its class is predicted correctly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..compiling.compiled import translate_compile_errors
from ..device import is_out_of_memory
from ..errors import DeviceError
from ..inference.evaluate import TOP_K, topk_hits
from ..models.mae import reconstruction_error
from .dataloader import Batch
from .recipe import Recipe


@dataclass
class BatchLosses:
    """Losses and hits for a batch of n views. For an autoencoder, and in training, `top1` and
    `top5` are 0."""

    losses: torch.Tensor  # [n]
    top1: torch.Tensor  # [n], 1 if the most probable class is right
    top5: torch.Tensor  # [n], 1 if the right class is among the five most probable


def compute_losses(
    model: nn.Module,
    batch: Batch,
    recipe: Recipe,
    precision: torch.dtype,
    class_weights: torch.Tensor | None = None,
) -> BatchLosses:
    """Run a model on a batch, and return the loss of each view.

    Args:
        model: The model, in training mode for gradients or in evaluation mode for validation.
        batch: The batch. Without a target, the model is an autoencoder.
        recipe: The recipe, for its label smoothing, which applies in training mode only.
        precision: dtype of autocast; float32 turns autocast off.
        class_weights: Weights of the classes in training, float32 [classes]. Mixed targets have
            weights in proportion.

    Raises:
        DeviceError: The device is out of memory, or torch.compile failed.
    """
    autocast = precision is not torch.float32
    with _device_errors(batch.x.device):
        with torch.autocast(batch.x.device.type, precision if autocast else None, enabled=autocast):
            if batch.target is None:
                # The units were drawn by `draw_units`; checking them would synchronise a GPU.
                _, preds, labels, _ = model(batch.x, keep_ids=batch.visible_units, check_ids=False)
                errors = reconstruction_error(preds.float(), labels.float())
                losses = errors.view(len(batch.x), -1).mean(1)
                zeros = torch.zeros_like(losses)
                return BatchLosses(losses, zeros, zeros)
            output = model(batch.x).float()
        if model.training:  # the output is logits, and nobody asks for the hits
            smoothing = recipe.augment.label_smoothing
            losses = F.cross_entropy(
                output,
                batch.target,
                weight=class_weights,
                reduction="none",
                label_smoothing=smoothing,
            )
            zeros = torch.zeros_like(losses)
            return BatchLosses(losses, zeros, zeros)
        losses = F.nll_loss(  # of probabilities
            output.clamp_min(1e-12).log(), batch.target.argmax(1), reduction="none"
        )
        ranked = output.detach().topk(min(TOP_K, output.shape[1])).indices
        top1, top5 = topk_hits(ranked, batch.target.argmax(1))
        return BatchLosses(losses, top1.float(), top5.float())


@contextlib.contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Convert failures of torch.compile and out-of-memory errors to a `DeviceError` with a hint."""
    try:
        with translate_compile_errors():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{device} has no memory left for a batch",
            "use --set accumulate=N to split the batch, or --set grad_checkpointing=true to keep "
            "fewer activations",
        ) from error
