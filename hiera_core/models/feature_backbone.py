"""Hiera as a backbone for detection and segmentation, with timm's interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from ..data.transforms import MediaInputs
from ..errors import UsageError, is_whole
from .config import HieraConfig
from .encoder import Encoder, unwrap_model
from .hiera import HieraEncoder
from .kernels.recomputing import Checkpointing
from .sam2.hieradet import HieraDet
from .timm_interface import parameter_groups
from .timm_interface.feature_info import FeatureInfo, absolute_indices

# Methods that compute maps. A backbone has those of this package.
MAP_METHODS = (
    "encode", "get_pos_embed", "layout_of", "maps_after", "run_blocks", "stage_orders",
    "_as_map", "_position", "_run",
)  # fmt: skip


class FeatureBackbone(nn.Module):
    """A Hiera that returns the maps of its stages, channels first.

    It holds the parameters that these maps depend on, and no others: no head, final norm or
    decoder, and no stage after the last map. So each of them gets a gradient, as DDP expects.

    Args:
        model: The Hiera, or SAM 2's encoder; it may be compiled, or wrapped by DDP or PEFT. It
            shares its parameters with the backbone, and is not changed.
        out_indices: Which maps, in this order: numbers of stages from 0, or from the end if
            negative; a number n for the last n; None for all.

    Attributes:
        feature_info: A list with a dictionary for each stage of the model, with timm's methods
            `channels()`, `reduction()`, `module_name()` and `get_dicts()` for the maps that the
            backbone returns.

    Raises:
        UsageError: There is no such stage, the model is not a Hiera, or its class has methods that
            compute maps in another way.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        model = unwrap_model(model)
        stages, ends = absolute_indices(out_indices, len(model.stage_ends)), model.stage_ends
        self.model = encoder_of(model, blocks=ends[max(stages)] + 1)
        self.feature_info = FeatureInfo(model.feature_info, stages)
        self.frozen_stages = 0
        self._stages = stages

    def transform(self, source: MediaInputs) -> torch.Tensor:
        """Return the tensor that the model takes, see `Hiera.transform`."""
        return self.model.transform(source)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the chosen maps, [b, c, *grid] each, from an input [b, chans, *size].

        For example, the first map of a Hiera-B at 224x224 is [b, 96, 56, 56].

        Raises:
            UsageError: The input does not fit the model.
        """
        ends, wanted = self.model.stage_ends, sorted(set(self._stages))
        maps = self.model.maps_after(x, [ends[stage] for stage in wanted])
        return [maps[wanted.index(stage)].movedim(-1, 1) for stage in self._stages]

    def freeze_stages(self, count: int) -> None:
        """Train only what comes after the first `count` stages.

        The embeddings and the blocks of these stages get no gradients, and stay in evaluation mode.
        With 0, all parameters are trained.

        Raises:
            UsageError: The backbone does not have so many stages.
        """
        ends = self.model.stage_ends
        if not is_whole(count) or not 0 <= count <= len(ends):
            raise UsageError(
                f"cannot freeze {count!r:.60} stages", f"give a number from 0 to {len(ends)}"
            )
        last = ends[count - 1] if count else -1
        for name, parameter in self.model.named_parameters():
            part, _, rest = name.partition(".")
            number = int(rest.partition(".")[0]) if part == "blocks" else 0
            parameter.requires_grad_(number > last)
        self.frozen_stages = count
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. Frozen stages stay in evaluation mode."""
        super().train(mode)
        if self.frozen_stages:
            for block in self.model.blocks[: self.model.stage_ends[self.frozen_stages - 1] + 1]:
                block.eval()
        return self

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations; see
        `Encoder.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> list[str]:
        """Return the names of parameters that get no weight decay. One-dimensional parameters never
        get any and are not listed."""
        return [f"model.{name}" for name in self.model.no_weight_decay()]

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[parameter_groups.Group]]:
        """Return which layer each parameter belongs to, see `Hiera.group_matcher`."""
        stages = [spec.stage for spec in self.model.block_specs]
        return parameter_groups.group_matcher(stages, coarse, prefix="model.")

    @property
    def pretrained_cfg(self) -> dict[str, object]:
        """Preprocessing and licence, under the names that timm's tools read."""
        found = self.model.pretrained_cfg
        found |= {"num_classes": 0, "classifier": None, "first_conv": "model.patch_embed.proj"}
        found.pop("label_names", None)
        return found

    @property
    def default_cfg(self) -> dict[str, object]:
        """The older name of `pretrained_cfg`."""
        return self.pretrained_cfg


def encoder_of(model: Encoder, blocks: int | None = None) -> Encoder:
    """Return the encoder of a classifier or autoencoder. It shares modules and parameters with the
    model, and has its card.

    Args:
        model: The model, which is not changed.
        blocks: Number of blocks that the encoder keeps; None for all.

    Raises:
        UsageError: The class of the model has methods that compute maps in another way. The encoder
            would not have them.
    """
    _check_methods(model)
    with torch.device("meta"):
        encoder = _without_head(model)
    for name, _ in [*encoder.named_children()]:
        setattr(encoder, name, getattr(model, name))
    for name, _ in [*encoder.named_parameters(recurse=False)]:
        setattr(encoder, name, getattr(model, name))
    encoder.grad_checkpointing = model.grad_checkpointing
    if hasattr(model, "card"):
        encoder.card = model.card
    encoder.training = model.training
    if blocks is not None:
        encoder.keep_blocks(blocks)
    return encoder


def _check_methods(model: Encoder) -> None:
    base = HieraDet if isinstance(model, HieraDet) else HieraEncoder
    for name in MAP_METHODS:
        if getattr(type(model), name, None) is not getattr(base, name, None):
            raise UsageError(
                f"a backbone does not run the method {name} of {type(model).__name__}",
                "use forward_intermediates of the model",
            )


def _without_head(model: Encoder) -> Encoder:
    """Return a new encoder with the arguments of a model."""
    if isinstance(model, HieraDet):
        return HieraDet(**vars(model._config))
    names = [field.name for field in dataclasses.fields(HieraConfig)]
    return HieraEncoder(**{name: getattr(model._config, name) for name in names})
