"""The module that is exported: what a program takes, and what it returns.

Letters in shape comments: b batch, n tokens, k visible mask units, p pixels of a patch, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..models.attention import MAX_FUSED_BATCH
from ..models.encoder import Encoder
from ..models.hiera import Hiera, HieraEncoder
from ..models.layers import Head
from ..models.mae import MaskedAutoencoderHiera, patch_statistics
from ..models.masking import MASK_RATIOS, visible_count
from ..models.sam2.hieradet import HieraDet
from .plan import ConversionPlan

KEEP = "keep"  # name of an autoencoder's second input
RECONSTRUCTION = ("reconstruction", "predictions", "mask")  # tensors of the output of that name


class Program(nn.Module):
    """Module to export. It takes and returns float32, for weights of any precision.

    Args:
        model: The model. Its weights are converted to `dtype`.
        outputs: Names of the outputs, see `formats.OUTPUTS`.
        dtype: Precision of the computation.
    """

    def __init__(self, model: Encoder, outputs: Sequence[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.outputs, self.dtype = model.to(dtype), tuple(outputs), dtype
        if isinstance(model, MaskedAutoencoderHiera):
            self.unit_of_cell = _unit_of_cell(model)

    def forward(
        self, input: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the output, or a dictionary of several by name; see `tensor_names`.

        Args:
            input: [b, chans, *size], normalised.
            keep: Numbers of the mask units that an autoencoder sees, [b, k] int64, in row-major
                order of the grid of units.
        """
        found = self._encode(input) if keep is None else self._reconstruct(input, keep)
        return found if len(found) > 1 else next(iter(found.values()))

    def _encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        model: Any = self.model
        _, ends = model.encode(x.to(self.dtype), collect=True)
        found: dict[str, torch.Tensor] = {}
        for output in self.outputs:
            if output == "maps":
                maps = model.stage_maps(ends)
                found |= {f"stage{number}": one.float() for number, one in enumerate(maps, 1)}
                continue
            values = model.embedding(ends)
            if output != "embedding":
                head: Head = model.head
                values = head.forward_logits(values)
            values = values.float()
            found[output] = values.softmax(-1) if output == "probabilities" else values
        return found

    def _reconstruct(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self.model
        assert isinstance(model, MaskedAutoencoderHiera)
        latent, visible = model.forward_encoder(x.to(self.dtype), keep_ids=keep, check_ids=False)
        predictions = model.forward_decoder(latent, visible).float()
        patches = model.pixel_labels(x)
        mean, deviation = patch_statistics(patches)
        seen = visible.mask.index_select(1, self.unit_of_cell)
        painted = torch.where(seen[..., None], patches, predictions * deviation + mean)
        mask = visible.mask.unflatten(1, model.layout.unit_grid)
        return dict(zip(RECONSTRUCTION, (model.pixels_of(painted), predictions, mask), strict=True))


def check_outputs(plan: ConversionPlan, outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs of a program: those that are asked for, or else what the model is for.

    Args:
        plan: The model.
        outputs: Names, see `formats.OUTPUTS`; or none for `logits` of a classifier, `embedding` of
            a model without a head, `reconstruction` of an autoencoder, and `maps` of SAM 2.

    Raises:
        UsageError: The model does not have an output.
    """
    offered = _outputs_of(plan)
    for output in outputs:
        if output not in offered:
            raise UsageError(
                f"{plan.name} has no {output}", f"use {', '.join(offered)}, or another model"
            )
    if "reconstruction" in outputs and len(outputs) > 1:
        raise UsageError(
            "reconstruction uses a masked input, and the other outputs use the whole input",
            "convert them to two programs",
        )
    return tuple(dict.fromkeys(outputs)) or offered[:1]


def tensor_names(plan: ConversionPlan) -> list[str]:
    """Return the names of a program's output tensors, in order."""
    stages = [f"stage{number}" for number in range(1, len(plan.config["stages"]) + 1)]
    tensors = {"maps": stages, "reconstruction": [*RECONSTRUCTION]}
    return [name for output in plan.outputs for name in tensors.get(output, [output])]


def input_names(plan: ConversionPlan) -> list[str]:
    """Return the names of a program's inputs: `image` or `video`, and `keep`."""
    kind = "video" if len(plan.size) == 3 else "image"
    return [kind, KEEP] if takes_units(plan) else [kind]


def takes_units(plan: ConversionPlan) -> bool:
    """Return whether a program takes the numbers of the visible mask units."""
    return "reconstruction" in plan.outputs


def largest_batch(model: Encoder) -> int:
    """Return the largest batch that runs as one call of the attention kernel."""
    if isinstance(model, HieraDet):
        height, width = model._config.input_size
        orders = model.stage_orders(model._config.grid_of((height, width)))
        windows = max(group.count for order in orders for group in order.groups)
    else:
        assert isinstance(model, HieraEncoder)
        windows = model.layout.windows
    return max(1, MAX_FUSED_BATCH // windows)


def draw_keep(plan: ConversionPlan, batch: int, least: int = 1) -> torch.Tensor:
    """Return the numbers of visible mask units to verify a program with, the same at every call.

    Each input of the batch has other units, and at least `least` of them. -> [b, k] int64
    """
    assert isinstance(plan.model, HieraEncoder)
    units = plan.model.layout.windows
    kept = max(least, visible_count(units, MASK_RATIOS[plan.model.input_kind()]))
    rows = [
        torch.randperm(units, generator=torch.Generator().manual_seed(row))[:kept]
        for row in range(batch)
    ]
    return torch.stack(rows)


def _outputs_of(plan: ConversionPlan) -> tuple[str, ...]:
    """Return the outputs that a model has, the default first."""
    if plan.is_autoencoder:
        return ("reconstruction", "embedding", "maps")
    if plan.is_sam2:
        return ("maps", "embedding")
    assert isinstance(plan.model, Hiera)
    if plan.num_classes:
        return ("logits", "probabilities", "embedding", "maps")
    return ("embedding", "maps")


def _unit_of_cell(model: MaskedAutoencoderHiera) -> torch.Tensor:
    """Return the mask unit of each cell of the decoder's grid, both row-major. -> n"""
    layout = model.layout
    units = torch.arange(math.prod(layout.unit_grid)).view(layout.unit_grid)
    for dim, cells in enumerate(layout.unit_after(model.q_pool)):
        units = units.repeat_interleave(cells, dim)
    return units.flatten()
