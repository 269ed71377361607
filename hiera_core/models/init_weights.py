"""Initialisation of new weights, as the reference does it: the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def init_classifier(model: nn.Module, embeddings: Iterable[str], head_scale: float) -> None:
    """Initialise an encoder with its head.

    Args:
        model: The model.
        embeddings: Names of the position embeddings.
        head_scale: Factor for the new weights of the head.
    """
    for name in embeddings:
        nn.init.trunc_normal_(model.get_parameter(name), std=0.02)
    model.apply(_init_layer)
    scale_head(model.get_submodule("head"), head_scale)


def init_head(head: nn.Module, head_scale: float) -> None:
    """Initialise a head alone."""
    head.apply(_init_layer)
    scale_head(head, head_scale)


@torch.no_grad()
def scale_head(head: nn.Module, factor: float) -> None:
    """Scale the weights of a head, so that a new classifier starts with nearly equal logits."""
    for parameter in head.parameters():
        parameter.mul_(factor)


def init_autoencoder(model: nn.Module, embeddings: Iterable[str]) -> None:
    """Initialise an autoencoder, as MAE does.

    Weights of Linear layers and of the flattened patch embedding are Xavier uniform, biases are 0,
    and weights of norms are 1.

    Args:
        model: The model.
        embeddings: Names of the position embeddings and of the mask token.
    """
    for name in embeddings:
        nn.init.trunc_normal_(model.get_parameter(name), std=0.02)
    model.apply(_init_autoencoder_layer)
    nn.init.xavier_uniform_(model.get_parameter("patch_embed.proj.weight").data.flatten(1))


def _init_layer(module: nn.Module) -> None:
    """Draw weights from a truncated normal (std 0.02). As in the reference, biases of Linear and
    norm layers become 0.02."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, 0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0.02)
        nn.init.constant_(module.weight, 1.0)


def _init_autoencoder_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0)
        nn.init.constant_(module.weight, 1.0)
