"""Stage maps in the form that detection and segmentation code expects (timm's convention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .hiera import HieraEncoder


class FeatureBackbone(nn.Module):
    """A Hiera that returns its stages' maps, channels first.

    `feature_info` has one entry a stage: `num_chs`, `reduction` (pixels a cell, along the last
    dimension) and `module`.
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
        """[b, chans, *size] -> one [b, c, *grid] a stage, e.g. (b, 96, 56, 56) first."""
        _, ends = self.model.encode(x, collect=True)
        return [stage_map.movedim(-1, 1) for stage_map in self.model.stage_maps(ends)]
