"""Hiera as a backbone for detection and segmentation, with timm's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .hiera import HieraEncoder


class FeatureBackbone(nn.Module):
    """A Hiera that returns the maps of its stages, channels first.

    Args:
        model: The Hiera.

    Attributes:
        feature_info: A dictionary for each stage: `num_chs` (number of channels), `reduction`
            (pixels that a cell of the map covers, along the last dimension) and `module`.
    """

    def __init__(self, model: HieraEncoder) -> None:
        super().__init__()
        self.model = model
        stages = range(len(model.stage_ends))
        self.feature_info: list[dict[str, Any]] = [
            {
                "num_chs": model.block_specs[model.stage_ends[stage]].dim_out,
                "reduction": model.reduction(stage)[-1],
                "module": f"blocks.{model.stage_ends[stage]}",
            }
            for stage in stages
        ]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map of each stage, [b, c, *grid], from an input [b, chans, *size].

        For example, the first map of a Hiera-B at 224x224 is [b, 96, 56, 56].
        """
        _, ends = self.model.encode(x, collect=True)
        return [stage_map.movedim(-1, 1) for stage_map in self.model.stage_maps(ends)]
