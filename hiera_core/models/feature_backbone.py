"""Hiera as a backbone for detection and segmentation, with timm's interface."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..data.transforms import MediaInputs
from .config import HieraConfig
from .encoder import Encoder
from .hiera import HieraEncoder


class FeatureBackbone(nn.Module):
    """A Hiera that returns the maps of its stages, channels first.

    It holds the parameters that these maps depend on, and no others: no head, final norm or
    decoder. So each of them gets a gradient, as DDP expects.

    Args:
        model: The Hiera, or SAM 2's encoder. It shares its parameters with the backbone, and is not
            changed.

    Attributes:
        feature_info: A dictionary for each stage: `num_chs` (number of channels), `reduction`
            (pixels that a cell of the map covers, along the last dimension) and `module`.
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = encoder_of(model)
        stages = range(len(model.stage_ends))
        self.feature_info: list[dict[str, Any]] = [
            {
                "num_chs": model.block_specs[model.stage_ends[stage]].dim_out,
                "reduction": model.reduction(stage)[-1],
                "module": f"blocks.{model.stage_ends[stage]}",
            }
            for stage in stages
        ]

    def transform(self, source: MediaInputs) -> torch.Tensor:
        """Return the tensor that the model takes, see `Hiera.transform`."""
        return self.model.transform(source)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map of each stage, [b, c, *grid], from an input [b, chans, *size].

        For example, the first map of a Hiera-B at 224x224 is [b, 96, 56, 56].
        """
        _, ends = self.model.encode(x, collect=True)
        return [stage_map.movedim(-1, 1) for stage_map in self.model.stage_maps(ends)]


def encoder_of(model: Encoder) -> Encoder:
    """Return the encoder of a classifier or autoencoder. It shares modules and parameters with the
    model, and has its card."""
    if not isinstance(model, HieraEncoder):
        return model  # SAM 2's encoder has nothing else
    names = [field.name for field in dataclasses.fields(HieraConfig)]
    arguments = {name: getattr(model._config, name) for name in names}
    with torch.device("meta"):
        encoder = HieraEncoder(**arguments)
    for name, _ in [*encoder.named_children()]:
        setattr(encoder, name, getattr(model, name))
    for name, _ in [*encoder.named_parameters(recurse=False)]:
        setattr(encoder, name, getattr(model, name))
    encoder.grad_checkpointing = model.grad_checkpointing
    if hasattr(model, "card"):
        encoder.card = model.card
    encoder.training = model.training
    return encoder
