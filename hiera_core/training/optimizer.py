"""AdamW's parameter groups: weight decay, and learning rates that shrink with depth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..models.hiera import HieraEncoder
from .recipe import OptimizerSettings

BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass
class Group:
    """Parameters that share settings; `scale` is of the learning rate."""

    scale: float
    decay: bool
    names: list[str]


def parameter_groups(model: HieraEncoder, layer_decay: float = 1.0) -> list[Group]:
    """The groups of a model's parameters.

    One-dimensional parameters and position embeddings are not decayed. With `layer_decay` d, layer
    i of n blocks has d ** (n + 1 - i): the embedding is layer 0, block b layer b + 1, and what
    comes after the blocks layer n + 1, at the full rate (BEiT's rule, as MAE and SlowFast have it).
    """
    last, found = len(model.blocks) + 1, dict[tuple[float, bool], Group]()
    undecayed = {*model.no_weight_decay(), "decoder_pos_embed"}
    for name, parameter in model.named_parameters():
        decay = parameter.dim() > 1 and name not in undecayed
        scale = layer_decay ** (last - layer_index(name, last))
        found.setdefault((scale, decay), Group(scale, decay, [])).names.append(name)
    return list(found.values())


def layer_index(name: str, last: int) -> int:
    """A parameter's layer, for layer decay."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    block = BLOCK.match(name)
    return int(block[1]) + 1 if block else last


def build_optimizer(model: HieraEncoder, part: OptimizerSettings) -> torch.optim.AdamW:
    """The optimiser of a model, which may be sharded."""
    parameters = dict(model.named_parameters())
    rows: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": part.weight_decay if group.decay else 0.0,
            "lr": 0.0,
            "scale": group.scale,
        }
        for group in parameter_groups(model, part.layer_decay)
    ]
    return torch.optim.AdamW(rows, betas=part.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The step's learning rate, times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
