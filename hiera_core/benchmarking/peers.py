"""Other implementations, built from our zoo's rows and given one way to be called.

None of them is a dependency: each is imported when it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import zoo
from ..errors import UsageError, did_you_mean
from .job import Mode


class NotOffered(Exception):
    """This peer has no such model; the text says which and why."""


@dataclass(frozen=True)
class Peer:
    package: str  # on PyPI
    modules: tuple[str, ...]  # what must be importable
    build: Callable[[zoo.ModelEntry, Mode], nn.Module]
    same_model: bool = True  # as ours, with its count of operations


def check(name: str) -> None:
    """Raise UsageError unless the peer called `name` is known and installed."""
    if name not in PEERS:
        raise UsageError(
            f"unknown peer {name!r}", did_you_mean(name, PEERS) or f"use {', '.join(PEERS)}"
        )
    peer = PEERS[name]
    if any(importlib.util.find_spec(module) is None for module in peer.modules):
        raise UsageError(f"{name} is not installed", f"pip install {peer.package}")


def version(name: str) -> str:
    return importlib.metadata.version(PEERS[name].package.split()[0])


def loss_of(output: Any) -> torch.Tensor | None:
    """An autoencoder's loss: the reference returns it first, transformers as an attribute."""
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "loss", None)


def _reference(row: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import hiera
    from hiera.hiera_mae import MaskedAutoencoderHiera

    cls = MaskedAutoencoderHiera if row.autoencoder else hiera.Hiera
    model: nn.Module = cls(**row.config)
    return model


def _hiera_optim(row: zoo.ModelEntry, mode: Mode) -> nn.Module:
    """The reference, patched. It was written against a fork whose modules had other names; with
    those in place it finds the models that PyPI has."""
    import hiera.hiera
    import hiera.hiera_mae
    import hiera.hiera_utils

    stand_in = types.ModuleType("models.hiera")
    for name in ("Hiera", "HieraBlock", "MaskUnitAttention"):
        setattr(stand_in, name, getattr(hiera.hiera, name))
    for name in ("MaskedAutoencoderHiera", "apply_fusion_head"):
        setattr(stand_in, name, getattr(hiera.hiera_mae, name))
    sys.modules["models"] = types.ModuleType("models")
    sys.modules["models.hiera"] = stand_in
    sys.modules["utils"] = types.ModuleType("utils")
    sys.modules["utils.hiera_utils"] = hiera.hiera_utils
    hiera.hiera.Hiera._grad_checkpointing = False
    from hiera_optim import optimize

    model = _reference(row, mode)
    # Its form for captured graphs is the one it recommends for training.
    optimize(model, **({"graph_safe": True} if row.autoencoder else {}))
    return model


def _timm(row: zoo.ModelEntry, mode: Mode) -> nn.Module:
    from timm.models.hiera import Hiera

    if row.autoencoder:
        raise NotOffered("timm has no Hiera autoencoder")
    if row.kind == "video":
        raise NotOffered("timm's Hiera takes pictures only")
    config = dict(row.config)
    size = config.pop("input_size")
    model: nn.Module = Hiera(img_size=size, **config)
    return model


def _transformers(row: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import transformers

    if row.kind == "video":
        raise NotOffered("transformers' Hiera takes pictures only")
    given = row.config
    stages = given["stages"]
    config: dict[str, Any] = {
        "embed_dim": given["embed_dim"],
        "image_size": list(given["input_size"]),
        "depths": list(stages),
        "num_heads": [given["num_heads"] * 2**stage for stage in range(len(stages))],
        "num_labels": given["num_classes"],
        "num_query_pool": given.get("q_pool", 3),
    }
    renamed = {
        "mask_unit_size": "masked_unit_size",
        "mask_unit_attn": "masked_unit_attention",
        "patch_kernel": "patch_size",
        "patch_stride": "patch_stride",
        "patch_padding": "patch_padding",
    }
    config |= {new: list(given[old]) for old, new in renamed.items() if old in given}
    if not row.autoencoder:
        return transformers.HieraForImageClassification(transformers.HieraConfig(**config))
    config |= {
        "decoder_hidden_size": given.get("decoder_embed_dim", 512),
        "decoder_depth": given.get("decoder_depth", 8),
        "decoder_num_heads": given.get("decoder_num_heads", 16),
        "mask_ratio": 0.6,
    }
    return transformers.HieraForPreTraining(transformers.HieraConfig(**config))


# The vision transformer of about a model's size, which the paper sets out to outrun.
VIT_OF = {
    "tiny": "vit_small_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "base_plus": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


def _vit(row: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import timm

    size = row.name.removeprefix("hiera_").rpartition("_")[0]
    if row.autoencoder or row.kind == "video" or size not in VIT_OF:
        raise NotOffered(f"timm has no ViT to set against {row.name}")
    return timm.create_model(VIT_OF[size])


PEERS = {
    "reference": Peer("hiera-transformer", ("hiera", "timm"), _reference),
    "timm": Peer("timm", ("timm",), _timm),
    "transformers": Peer("transformers", ("transformers",), _transformers),
    "hiera-optim": Peer("hiera-optim", ("hiera_optim", "hiera", "timm"), _hiera_optim),
    "vit": Peer("timm", ("timm",), _vit, same_model=False),
}
