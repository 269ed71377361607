"""Tests of low-rank adapters in fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader
from tests.conftest import assert_close, draw_weights

NARROW = {"embed_dim": 8, "stages": (1, 1, 1)}
SETTINGS = {
    "model.config": NARROW,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 0,
    "batch_size": 64,
    "optimizer.lr": 0.05,
    "save_every": 1,
}


def finetune(folder: Path, start: Path, resume: str | None = None, **settings: Any) -> None:
    options = hiera_core.RunOptions(workers=0, live=False, resume=resume)
    chosen = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    recipe = recipe_reader.read_recipe("hiera_nano_32", {**chosen, "init_from": str(start)})
    samples = datasets.open_dataset("digits").subset(range(192))
    hiera_core.train(recipe, datasets.Splits(samples), folder, options=options)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model to start from."""
    folder = tmp_path_factory.mktemp("start")
    model = hiera_core.create_model("hiera_nano_32", **NARROW, num_classes=10)
    draw_weights(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """Return the folder of a run with adapters of all layers, and averaged weights."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    finetune(folder, start, lora__rank=4, lora__alpha=8, lora__layers="all", ema=0.5)
    return folder


def test_an_adapter_loads_in_peft(adapted: Path, start: Path) -> None:
    """The base with the adapter computes what the merged weights of the run compute."""
    merged = hiera_core.create_model(str(adapted)).eval()
    base = hiera_core.create_model(str(start))
    x = torch.randn(3, 3, 32, 32)
    before = base.eval()(x)
    wrapped = peft.PeftModel.from_pretrained(base, adapted / "adapter").eval()
    assert_close(wrapped(x), merged(x), 1e-5)
    assert not torch.allclose(before, merged(x), atol=1e-3)
    names = load_file(adapted / "adapter/adapter_model.safetensors")
    assert sum("lora_A" in name for name in names) == 4 * len(merged.blocks)
    config = json.loads((adapted / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(start)
    # It can be merged again, and the model of the run stays what it was.
    assert_close(wrapped.merge_and_unload()(x), merged(x), 1e-5)


def test_only_adapters_norm_and_head_are_trained(adapted: Path, start: Path) -> None:
    facts = json.loads((adapted / "log.jsonl").read_text().splitlines()[0])
    assert 0 < facts["trained"] < 0.5 * facts["parameters"]
    state = load_file(adapted / "checkpoints/step_00000006/state.safetensors")
    moments = {n.removeprefix("optimizer.exp_avg.") for n in state if ".exp_avg." in n}
    assert moments == {n.removeprefix("ema.") for n in state if n.startswith("ema.")}
    assert all("lora_" in name or name.startswith(("norm.", "head.")) for name in moments)
    first = load_file(start / "model.safetensors")
    assert torch.equal(
        state["model.blocks.0.attn.qkv.base_layer.weight"], first["blocks.0.attn.qkv.weight"]
    )
    assert torch.equal(state["model.pos_embed"], first["pos_embed"])


def test_a_run_with_adapters_resumes_bit_exactly(
    adapted: Path, start: Path, tmp_path: Path
) -> None:
    half = str(adapted / "checkpoints/step_00000003")
    finetune(
        tmp_path / "cut", start, half, lora__rank=4, lora__alpha=8, lora__layers="all", ema=0.5
    )
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (adapted / name).read_bytes()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("hiera_nano_32", {"lora.rank": 0}, "lora.rank is 0"),
        ("hiera_nano_32", {"lora.layers": "mlp"}, "expected one of attention, all"),
        ("hiera_nano_32", {"lora.rank": 4, "freeze": 1}, "freeze and lora are both given"),
        ("mae_hiera_nano_32", {"lora.rank": 4}, "lora is for fine-tuning"),
    ],
)
def test_wrong_settings_are_refused(model: str, settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_reader.read_recipe(model, settings)
