"""Checkpoints with odd shapes and names are refused in one line, whatever is looked at first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hiera_core
from hiera_core.errors import CheckpointError
from hiera_core.models import factory
from hiera_core.weights import shapes

MODEL = "hiera_nano_32"
BLOCK = "blocks.0."
ODD = {
    "head.projection.weight": [(), (3,)],
    "head.projection.bias": [(), (1, 3)],
    "patch_embed.proj.weight": [(), (3,), (24, 3), (24, 0, 3, 3)],
    "pos_embed": [(), (5,), (1, 64), (1, 0, 24), (1, 64, 0)],
    "pos_embed_win": [(), (1, 24, 8, 8)],
    "pos_embed_spatial": [(), (1, 64, 24)],
    "decoder_pos_embed": [(), (1, 4, 8)],
    BLOCK + "attn.proj.bias": [(), (24, 1)],
    BLOCK + "attn.proj.weight": [(), (24,)],
    BLOCK + "ls1.gamma": [(), (24, 1)],
    "ls2.gamma": [()],
    f"blocks.{'1' * 5000}.attn.proj.bias": [(3,)],
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return hiera_core.create_model(MODEL).state_dict()


@pytest.mark.parametrize("name", [name[:40] for name in ODD])
def test_odd_shapes_are_refused(name: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (full,) = (known for known in ODD if known[:40] == name)
    path = tmp_path / "odd.safetensors"
    for shape in ODD[full]:
        save_file({**state, full: torch.ones(shape)}, path)
        for model in (None, MODEL):
            with pytest.raises(CheckpointError):
                factory.create_encoder(model, path)


def test_absolute_windows_need_a_map(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    without = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    save_file({**without, "pos_embed_win": torch.ones(1, 24, 8, 8)}, path)
    with pytest.raises(CheckpointError, match="pos_embed_win is there without pos_embed"):
        factory.create_encoder(MODEL, path)


def test_odd_names_of_transformers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    for name in ("encoder.stages.0.layers.{}.attn.qkv.weight", "decoder.decoder_block.layers.{}"):
        for number in ("9" * 5000, "x", "0"):
            theirs = {
                "hiera.embeddings.patch_embeddings.projection.weight": torch.ones(24, 3, 3, 3),
                "hiera.encoder.stages.7.layers.0.attn.qkv.weight": torch.ones(3),
                "hiera." + name.format(number): torch.ones(3),
            }
            save_file(theirs, path)
            with pytest.raises(CheckpointError):
                factory.create_encoder(None, path)


def test_the_zoos_models_have_these_shapes() -> None:
    windows = {"abs_win_pos_embed": True, "input_size": (256, 256)}
    for name in hiera_core.list_models():
        for config in ({}, windows) if name == "hiera_tiny_224" else ({},):
            with torch.device("meta"):
                model = hiera_core.create_model(name, **config)
            shapes.check_shapes(model.state_dict(), name)
