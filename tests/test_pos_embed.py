"""Tests of other input sizes: resampled position embeddings, absolute windows, legal sizes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import hiera_core
from hiera_core import zoo
from hiera_core.conversion import plan
from hiera_core.errors import CheckpointError, ConfigError, UsageError
from hiera_core.models import pos_embed
from hiera_core.weights import load

from .conftest import SMALL, assert_close, draw_weights

VIDEO = {
    **zoo.get("hiera_base_16x224").config,
    "embed_dim": 16,
    "stages": (1, 1, 2, 1),
    "num_classes": 10,
    "input_size": (8, 64, 64),
}
AUTOENCODER = {"q_pool": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


def save_model(cls: Any, path: Path, **config: Any) -> Any:
    """Save a model with drawn weights, and return it."""
    model = draw_weights(cls(**config)).eval()
    model.save_pretrained(path)
    return model


def test_the_same_size_changes_nothing(small_folder: Path) -> None:
    state = load.read_checkpoint(small_folder).state
    same = hiera_core.create_model(str(small_folder), input_size=(64, 64))
    assert torch.equal(same.pos_embed, state["pos_embed"])
    grid = (16, 16)
    assert pos_embed.resize(state["pos_embed"], grid, grid, (8, 8)) is state["pos_embed"]


def test_the_absolute_window_rule_follows_its_definition() -> None:
    """Tile the mean over windows, and resize the rest: bicubic, antialias (arXiv 2311.05613)."""
    torch.manual_seed(0)
    embed = torch.randn(1, 56 * 56, 5)
    grid = embed.transpose(1, 2).reshape(1, 5, 56, 56)
    window = torch.stack(
        [grid[..., y : y + 8, x : x + 8] for y in range(0, 56, 8) for x in range(0, 56, 8)]
    ).mean(0)
    rest = grid - window.repeat(1, 1, 7, 7)
    for size in ((96, 96), (40, 40), (56, 112)):
        expected = F.interpolate(rest, size, mode="bicubic", antialias=True)
        expected = expected + window.repeat(1, 1, size[0] // 8, size[1] // 8)
        found = pos_embed.resize(embed, (56, 56), size, (8, 8))
        assert_close(found, expected.flatten(2).transpose(1, 2))
        plain = pos_embed.resize(embed, (56, 56), size)
        expected = F.interpolate(grid, size, mode="bicubic", antialias=True)
        assert_close(plain, expected.flatten(2).transpose(1, 2))


def test_a_pattern_that_repeats_in_every_window_is_kept() -> None:
    """This is the purpose of the rule. Plain interpolation stretches the pattern over windows."""
    window = torch.randn(1, 3, 8, 8)
    embed = window.tile(1, 1, 7, 7).flatten(2).transpose(1, 2)
    expected = window.tile(1, 1, 12, 12).flatten(2).transpose(1, 2)
    assert_close(pos_embed.resize(embed, (56, 56), (96, 96), (8, 8)), expected)
    plain = pos_embed.resize(embed, (56, 56), (96, 96))
    assert (plain - expected).abs().max() > 0.5


@pytest.mark.parametrize("size", [192, 256, 320, 384, 448, (224, 448)])
def test_image_models_run_at_other_sizes(size: Any, tmp_path: Path) -> None:
    """The model has the geometry of the zoo's models, with narrow blocks."""
    size = size if isinstance(size, tuple) else (size, size)
    saved = save_model(hiera_core.Hiera, tmp_path, **{**SMALL, "input_size": (224, 224)})
    model = hiera_core.Hiera.from_pretrained(tmp_path, input_size=size).eval()
    assert model.config["input_size"] == size
    assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    assert torch.equal(model.head.projection.weight, saved.head.projection.weight)
    plain = hiera_core.Hiera.from_pretrained(tmp_path, input_size=size, resample="bicubic")
    assert not torch.equal(plain.pos_embed, model.pos_embed)


@pytest.mark.parametrize("size", [(16, 96, 96), (4, 64, 64), (8, 64, 96)])
def test_video_models_run_at_other_sizes(size: tuple[int, ...], tmp_path: Path) -> None:
    saved = save_model(hiera_core.Hiera, tmp_path, **VIDEO)
    model = hiera_core.Hiera.from_pretrained(tmp_path, input_size=size).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    before = saved.pos_embed_temporal.transpose(1, 2)
    linear = F.interpolate(before, size[0] // 2, mode="linear").transpose(1, 2)
    assert_close(model.pos_embed_temporal, linear if size[0] != 8 else saved.pos_embed_temporal)


@pytest.mark.parametrize("video", [False, True])
def test_the_decoder_embedding_is_interpolated_without_windows(tmp_path: Path, video: bool) -> None:
    config = {**(VIDEO if video else SMALL), **AUTOENCODER}
    saved = save_model(hiera_core.MaskedAutoencoderHiera, tmp_path, **config)
    size = (16, 96, 96) if video else (96, 96)
    model = hiera_core.MaskedAutoencoderHiera.from_pretrained(tmp_path, input_size=size).eval()
    old, new = saved.layout.grid_after(2), model.layout.grid_after(2)
    grid = saved.decoder_pos_embed.transpose(1, 2).unflatten(2, old)
    mode = {"mode": "trilinear"} if video else {"mode": "bicubic", "antialias": True}
    expected = F.interpolate(grid, new, **mode).flatten(2).transpose(1, 2)
    assert_close(model.decoder_pos_embed, expected)
    assert model(torch.randn(1, 3, *size))[0].isfinite()


def test_weights_without_a_config_show_their_input_size(tmp_path: Path, caplog: Any) -> None:
    """The shapes of the weights give a size of 256. With a model name, they are resized to 224."""
    config = zoo.get("hiera_tiny_224").config
    state = draw_weights(hiera_core.Hiera(**{**config, "input_size": (256, 256)})).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    assert hiera_core.create_model(path).config["input_size"] == (256, 256)
    with caplog.at_level(logging.INFO, "hiera"):
        named = hiera_core.create_model("hiera_tiny_224", checkpoint=path)
    assert named.config["input_size"] == (224, 224)
    assert "resampled from 256x256 to 224x224" in caplog.text
    checkpoint = load.read_checkpoint(path)
    checkpoint.state["pos_embed"] = checkpoint.state["pos_embed"][:, :4000]  # not a square
    with pytest.raises(CheckpointError, match="another input size"):
        hiera_core.models.factory.from_zoo(zoo.get("hiera_tiny_224"), checkpoint)


def test_illegal_sizes_are_refused_with_the_nearest(small_folder: Path) -> None:
    checkpoint = load.read_checkpoint(small_folder)
    for size, near in [((100, 100), "96 or 128"), ((64, 40), "32 or 64"), ((16,), "32")]:
        with pytest.raises(ConfigError, match=f"nearest legal size is {near}"):
            plan.make_plan(checkpoint, size=size)
    with pytest.raises(UsageError, match="does not fit a model of 2 dimensions"):
        plan.make_plan(checkpoint, size=(8, 64, 64))
    with pytest.raises(UsageError, match="use absolute-window or bicubic"):
        hiera_core.Hiera.from_pretrained(small_folder, input_size=(96, 96), resample="nearest")  # type: ignore[arg-type]


# Native absolute-window models -------------------------------------------------------------------

NATIVE = {**SMALL, "abs_win_pos_embed": True, "global_pos_size": (5, 5)}


def test_native_models_save_and_load_at_any_size(tmp_path: Path) -> None:
    saved = save_model(hiera_core.Hiera, tmp_path, **NATIVE)
    assert saved.pos_embed.shape == (1, 16, 5, 5) and saved.pos_embed_win.shape == (1, 16, 8, 8)
    assert saved.no_weight_decay() == ["pos_embed", "pos_embed_win"]
    for size in ((64, 64), (96, 160)):
        model = hiera_core.Hiera.from_pretrained(tmp_path, input_size=size)
        assert torch.equal(model.pos_embed, saved.pos_embed)
        assert model.eval()(torch.randn(1, 3, *size)).isfinite().all()
    saved.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert saved.pos_embed.grad.abs().sum() > 0 and saved.pos_embed_win.grad.abs().sum() > 0


def test_native_absolute_window_models_are_for_images() -> None:
    with pytest.raises(ConfigError, match="for images"):
        hiera_core.Hiera(**{**VIDEO, "abs_win_pos_embed": True})
