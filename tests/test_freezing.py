"""Tests of frozen blocks in fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader

NARROW = {"embed_dim": 8, "stages": (1, 1, 1), "drop_path_rate": 0.3}
SETTINGS = {
    "model.config": NARROW,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "batch_size": 32,
    "ema": 0.5,
    "grad_checkpointing": True,
}


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (2, ("patch_embed", "pos_embed", "blocks.0", "blocks.1")),
        ("encoder", ("patch_embed", "pos_embed", "blocks")),
    ],
)
def test_frozen_weights_stay_as_they_are(
    tmp_path: Path, freeze: int | str, frozen: tuple[str, ...]
) -> None:
    start = hiera_core.create_model("hiera_nano_32", **NARROW, num_classes=10)
    start.save_pretrained(tmp_path / "start")
    settings = {**SETTINGS, "freeze": freeze, "init_from": str(tmp_path / "start")}
    recipe = recipe_reader.read_recipe("hiera_nano_32", settings)
    samples = datasets.open_dataset("digits").subset(range(96))
    options = hiera_core.RunOptions(workers=0, live=False)
    hiera_core.train(recipe, datasets.Splits(samples), tmp_path / "run", options=options)
    trained = hiera_core.create_model(str(tmp_path / "run")).state_dict()
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, trained[name]) == name.startswith(frozen), name


@pytest.mark.parametrize(
    ("model", "freeze", "message"),
    [
        ("hiera_nano_32", "head", "freeze is 'head'; give a number of blocks, or encoder"),
        ("hiera_nano_32", 0, "freeze is 0"),
        ("mae_hiera_nano_32", 1, "freeze is for fine-tuning"),
    ],
)
def test_wrong_settings_are_refused(model: str, freeze: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_reader.read_recipe(model, {"freeze": freeze})


def test_more_blocks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="freeze is 99, and the model has"):
        hiera_core.train("hiera_nano_32", "digits", tmp_path / "run", settings={"freeze": 99})
    assert not (tmp_path / "run").exists()
