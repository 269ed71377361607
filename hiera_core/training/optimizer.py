"""Parameter groups of AdamW: weight decay and layer-wise learning rates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..models.hiera import HieraEncoder
from .settings.recipe_parts import OptimizerSettings

BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass
class Group:
    """Parameters with the same settings."""

    scale: float  # factor of the learning rate
    decay: bool  # whether weight decay applies
    names: list[str]


def parameter_groups(model: HieraEncoder, layer_decay: float = 1.0) -> list[Group]:
    """Return the parameter groups of a model, of the parameters that are trained.

    One-dimensional parameters and position embeddings get no weight decay.

    Args:
        model: The model.
        layer_decay: Factor d of the layer-wise decay. With n blocks, the learning rate of layer i
            is scaled by d ** (n + 1 - i). Layer 0 is the patch and position embedding, layer b + 1
            is block b, and layer n + 1 is everything after the blocks. This is BEiT's rule, which
            MAE and SlowFast use too.
    """
    last, groups = len(model.blocks) + 1, dict[tuple[float, bool], Group]()
    undecayed = {*model.no_weight_decay(), "decoder_pos_embed"}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.dim() > 1 and name not in undecayed
        scale = layer_decay ** (last - layer_index(name, last))
        groups.setdefault((scale, decay), Group(scale, decay, [])).names.append(name)
    return list(groups.values())


def layer_index(name: str, last: int) -> int:
    """Return the layer of a parameter for layer-wise decay, from 0 to `last`."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    block = BLOCK.match(name)
    return int(block[1]) + 1 if block else last


def build_optimizer(model: HieraEncoder, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW for a model, which may be sharded."""
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": settings.weight_decay if group.decay else 0.0,
            "lr": 0.0,
            "scale": group.scale,
        }
        for group in parameter_groups(model, settings.layer_decay)
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state for parameters that have none yet, as their first step would.

    So a checkpoint can be loaded by copying into the state, before the first step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to `rate` times the scale of the group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
