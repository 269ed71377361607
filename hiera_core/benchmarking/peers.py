"""Peers: other implementations of the models in our zoo.

No peer is a dependency of this package. Each is imported when it is built.
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
from ..device import DTYPES
from ..errors import UsageError, did_you_mean
from ..weights.foreign_config import SAM2_ARGUMENTS
from .job import Mode
from .not_offered import NotOffered as NotOffered
from .runtime_peers import build_onnxruntime, build_openvino


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Args:
        package: Name of its package on PyPI.
        modules: Modules that must be installed.
        build: Function that builds the model of a zoo entry.
        same_model: Whether the model has the same layers as ours, and so the same GMACs.
        compiles: Whether it always runs a compiled program, which is compared with our compiled
            model if that is measured.
    """

    package: str
    modules: tuple[str, ...]
    build: Callable[[zoo.ModelEntry, Mode], nn.Module]
    same_model: bool = True
    compiles: bool = False


def check(peer_name: str) -> None:
    """Check that a peer is known and installed.

    Args:
        peer_name: The name of a peer, which may carry a dtype of its own, such as `reference:fp32`.

    Raises:
        UsageError: The peer is unknown or not installed, or the dtype is unknown.
    """
    name, colon, dtype = peer_name.partition(":")
    if colon and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} in {peer_name!r}", "use fp32, bf16 or fp16")
    if name not in PEERS:
        raise UsageError(
            f"unknown peer {name!r}", did_you_mean(name, PEERS) or f"use {', '.join(PEERS)}"
        )
    peer = PEERS[name]
    if any(importlib.util.find_spec(module) is None for module in peer.modules):
        raise UsageError(f"{name} is not installed", f"pip install {peer.package}")


# What a peer's model is built from. The others take all constructor arguments, and refuse what they
# do not know.
READ_BY_TRANSFORMERS = (
    "input_size embed_dim stages num_heads num_classes q_pool mask_unit_size mask_unit_attn "
    "patch_kernel patch_stride patch_padding decoder_embed_dim decoder_depth decoder_num_heads "
    "in_chans"
).split()


def check_arguments(name: str, entry: zoo.ModelEntry) -> None:
    """Check that a peer builds the model that constructor arguments outside the zoo describe.

    Args:
        name: The peer.
        entry: The model.

    Raises:
        NotOffered: It would build another one.
    """
    known = zoo.get(entry.name).config
    if entry.family == "hieradet" and name == "timm":
        differing = [k for k, v in entry.config.items() if k != "input_size" and known.get(k) != v]
    elif entry.family == "hiera" and name == "transformers":
        differing = [k for k in entry.config if k not in READ_BY_TRANSFORMERS]
    else:
        differing = []
    if name == "vit" and zoo.block_dims(entry.config) != zoo.block_dims(known):
        raise NotOffered("timm has no ViT to compare with a model of this size")
    if differing:
        raise NotOffered(f"{name} has no Hiera with other {', '.join(differing)}")


def version(name: str) -> str:
    """Return the version of a peer's package."""
    return importlib.metadata.version(PEERS[name].package.split()[0])


def loss_of(output: Any) -> torch.Tensor | None:
    """Return the loss in the output of an autoencoder, or None for the output of a classifier.

    The reference returns a tuple that starts with the loss. transformers returns an object with the
    attribute `loss`.
    """
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "loss", None)


def _build_reference(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import hiera
    from hiera.hiera_mae import MaskedAutoencoderHiera

    _check_plain(entry, "hiera-transformer")
    cls = MaskedAutoencoderHiera if entry.autoencoder else hiera.Hiera
    model: nn.Module = cls(**entry.config)
    return model


def _build_hiera_optim(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    """Build the reference's model and optimise it.

    hiera-optim imports the modules `models.hiera` and `utils.hiera_utils` of a fork of the
    reference. Stand-ins under these names let it use the released reference.
    """
    _check_plain(entry, "hiera-optim")
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

    model = _build_reference(entry, mode)
    # hiera-optim recommends its graph-safe form for training.
    optimize(model, **({"graph_safe": True} if entry.autoencoder else {}))
    return model


def _build_timm(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    if entry.family == "hieradet":
        return TimmSam2(entry)
    from timm.models.hiera import Hiera

    if entry.autoencoder:
        raise NotOffered("timm has no Hiera autoencoder")
    if entry.kind == "video":
        raise NotOffered("timm has no Hiera for video")
    config = dict(entry.config)
    size = config.pop("input_size")
    if "head_dropout" in config:
        config["drop_rate"] = config.pop("head_dropout")
    model: nn.Module = Hiera(img_size=size, **config)
    return model


def _build_transformers(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import transformers

    if entry.family == "hieradet":
        return TransformersSam2(entry)
    _check_plain(entry, "transformers")
    if entry.kind == "video":
        raise NotOffered("transformers has no Hiera for video")
    ours = entry.config
    stages = ours["stages"]
    config: dict[str, Any] = {
        "embed_dim": ours["embed_dim"],
        "image_size": list(ours["input_size"]),
        "depths": list(stages),
        "num_heads": [ours["num_heads"] * 2**stage for stage in range(len(stages))],
        "num_labels": ours["num_classes"],
        "num_channels": ours.get("in_chans", 3),
        "num_query_pool": ours.get("q_pool", 3),
    }
    renamed = {
        "mask_unit_size": "masked_unit_size",
        "mask_unit_attn": "masked_unit_attention",
        "patch_kernel": "patch_size",
        "patch_stride": "patch_stride",
        "patch_padding": "patch_padding",
    }
    config |= {new: list(ours[old]) for old, new in renamed.items() if old in ours}
    if not entry.autoencoder:
        return transformers.HieraForImageClassification(transformers.HieraConfig(**config))
    config |= {
        "decoder_hidden_size": ours.get("decoder_embed_dim", 512),
        "decoder_depth": ours.get("decoder_depth", 8),
        "decoder_num_heads": ours.get("decoder_num_heads", 16),
        "mask_ratio": 0.6,
    }
    return transformers.HieraForPreTraining(transformers.HieraConfig(**config))


class TimmSam2(nn.Module):
    """timm's image encoder of SAM 2, which returns the maps of all stages."""

    def __init__(self, entry: zoo.ModelEntry) -> None:
        import timm

        super().__init__()
        self.model: Any = timm.create_model(entry.name, num_classes=0)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[b, 3, y, x] -> four of [b, y, x, c]"""
        maps: list[torch.Tensor] = self.model.forward_intermediates(
            x, output_fmt="NHWC", intermediates_only=True
        )
        return maps


class TransformersSam2(nn.Module):
    """transformers' image encoder of SAM 2, which returns the maps of all stages."""

    def __init__(self, entry: zoo.ModelEntry) -> None:
        import transformers

        super().__init__()
        ours, stages = entry.config, range(len(entry.config["stages"]))
        config: dict[str, Any] = {
            theirs: list(ours[name]) if isinstance(ours[name], tuple) else ours[name]
            for name, theirs in SAM2_ARGUMENTS.items()
            if name in ours
        }
        config["embed_dim_per_stage"] = [ours["embed_dim"] * 2**stage for stage in stages]
        heads = [ours["num_heads"] * 2**stage for stage in stages]
        config["num_attention_heads_per_stage"] = heads
        self.model = transformers.Sam2HieraDetModel(transformers.Sam2HieraDetConfig(**config))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[b, 3, y, x] -> four of [b, y, x, c]"""
        maps: list[torch.Tensor] = list(self.model(x).intermediate_hidden_states)
        return maps


def _check_plain(entry: zoo.ModelEntry, peer: str) -> None:
    """Check that a model is one from the paper, without the parts that only timm has.

    Raises:
        NotOffered: It is not.
    """
    if entry.family == "hieradet":
        raise NotOffered(f"{peer} has no image encoder of SAM 2")
    if entry.config.get("abs_win_pos_embed"):
        raise NotOffered(f"{peer} has no {entry.name}")


# Maps the size of a Hiera to the ViT of about the same size that the paper compares it with.
VIT_OF = {
    "tiny": "vit_small_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "base_plus": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


def _build_vit(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    import timm

    size = entry.name.removeprefix("hiera_").rpartition("_")[0]
    if entry.autoencoder or entry.kind == "video" or size not in VIT_OF:
        raise NotOffered(f"timm has no ViT to compare with {entry.name}")
    pixels = entry.config["input_size"]
    return timm.create_model(VIT_OF[size], **({} if pixels == (224, 224) else {"img_size": pixels}))


PEERS = {
    "reference": Peer("hiera-transformer", ("hiera", "timm"), _build_reference),
    "timm": Peer("timm", ("timm",), _build_timm),
    "transformers": Peer("transformers", ("transformers",), _build_transformers),
    "hiera-optim": Peer("hiera-optim", ("hiera_optim", "hiera", "timm"), _build_hiera_optim),
    "openvino": Peer(
        "openvino onnx onnxscript",
        ("openvino", "onnx", "onnxscript"),
        build_openvino,
        compiles=True,
    ),
    "onnxruntime": Peer(
        "onnxruntime onnx onnxscript",
        ("onnxruntime", "onnx", "onnxscript"),
        build_onnxruntime,
        compiles=True,
    ),
    "vit": Peer("timm", ("timm",), _build_vit, same_model=False),
}
