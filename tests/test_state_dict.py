"""Weights are found in the dictionaries of trainers, and under the prefixes of wrappers."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hiera_core
from hiera_core.weights import key_mapping, state_dict

from .conftest import SMALL, draw_weights

Command = Callable[..., tuple[int, str, str]]
NAMES = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "head.projection.bias")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "student.", "_forward_module.",
            "encoder.", "_fsdp_wrapped_module.", "ema_model.", "0.")  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return draw_weights(hiera_core.Hiera(**SMALL)).state_dict()


@given(st.lists(st.sampled_from(PREFIXES), max_size=5))
@settings(deadline=None)
def test_any_stack_of_prefixes_is_removed(prefixes: list[str]) -> None:
    wrapped = {"".join(prefixes) + name: name for name in NAMES}
    assert state_dict.unwrap_names(wrapped) == {name: name for name in NAMES}


@given(st.lists(st.sampled_from(PREFIXES), max_size=3), st.integers(0, 3))
@settings(deadline=None)
def test_names_of_transformers_are_unwrapped(prefixes: list[str], stage: int) -> None:
    names = (
        "hiera.embeddings.patch_embeddings.projection.weight",
        f"hiera.encoder.stages.{stage}.layers.0.layernorm_before.weight",
        "classifier.bias",
    )
    wrapped = {"".join(prefixes) + name: name for name in names}
    assert state_dict.unwrap_names(wrapped) == {name: name for name in names}
    renamed, naming = key_mapping.to_reference({n: torch.zeros(1) for n in wrapped})
    assert naming == "transformers"
    assert {"patch_embed.proj.weight", "head.projection.bias"} <= set(renamed)


def test_wrappers_inside_names_are_removed() -> None:
    names = {
        "_fsdp_wrapped_module.patch_embed._fsdp_wrapped_module.proj.weight": 1,
        "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.norm1.weight": 2,
    }
    expected = {"patch_embed.proj.weight": 1, "blocks.0.norm1.weight": 2}
    assert state_dict.unwrap_names(names) == expected


def test_the_model_is_preferred_to_its_average_and_to_other_networks() -> None:
    anchor = "patch_embed.proj.weight"
    student = {f"student.{anchor}": 1, f"teacher.{anchor}": 2, "loss.weight": 3}
    assert state_dict.unwrap_names(student) == {anchor: 1}
    averaged = {"n_averaged": 0, f"module.{anchor}": 1}  # torch.optim.swa_utils.AveragedModel
    assert state_dict.unwrap_names(averaged) == {anchor: 1}


def test_dictionaries_that_contain_themselves_are_searched_once(
    weights: dict[str, torch.Tensor],
) -> None:
    loaded: dict[str, Any] = {"model": weights}
    loaded |= {str(number): loaded for number in range(300)}
    assert state_dict.find_state_dict(loaded) == weights


FILES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda w: w,
    "reference": lambda w: {"model_state": w, "epoch": 3},
    "timm": lambda w: {
        "epoch": 3,
        "arch": "hiera",
        "state_dict": w,
        "state_dict_ema": {name: t + 1 for name, t in w.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("out"), seed=None),
    },
    "mae": lambda w: {"model": w, "scaler": {"scale": 1.0}, "args": argparse.Namespace(blr=1e-3)},
    "lightning": lambda w: {
        "state_dict": {f"model.{name}": t for name, t in w.items()}
        | {"criterion.weight": torch.ones(10)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"path": pathlib.Path("data"), "when": datetime.datetime(2026, 1, 1)},
    },
    "compiled DDP": lambda w: {"net": {f"module._orig_mod.{name}": t for name, t in w.items()}},
    "deep": lambda w: {"checkpoint": {"networks": {"encoder": w, "encoder_ema": dict(w)}}},
    "scores of NumPy": lambda w: {"state_dict": w, "best": np.float64(0.7), "all": np.arange(3)},
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_trainers_load(
    kind: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(FILES[kind](weights), path)
    with torch.device("meta"):
        expected = hiera_core.Hiera(**SMALL)
    model = hiera_core.Hiera.from_pretrained(_with_config(path, expected))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def _with_config(path: Path, model: hiera_core.Hiera) -> Path:
    """Put a checkpoint into a folder with the config.json that names its architecture."""
    from hiera_core.weights import files

    folder = path.with_suffix("")
    folder.mkdir()
    path.rename(folder / "pytorch_model.bin")
    files.write_json(folder / "config.json", model.config)
    return folder


class Gadget:
    """An object whose unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["args", "Namespace", "array"])
def test_code_beside_harmless_types_is_refused(
    place: str, weights: dict[str, torch.Tensor], tmp_path: Path, hiera: Command
) -> None:
    gadget: Any = Gadget(tmp_path / "ran")
    if place == "Namespace":
        gadget = argparse.Namespace(inner=gadget)
    if place == "array":
        gadget = np.array([gadget], dtype=object)
    path = tmp_path / "weights.pth"
    torch.save({"model": weights, "args": gadget}, path)
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
    assert code == 3 and "nothing of it was run" in err and "system" in err
    assert not (tmp_path / "ran").exists()


def test_an_encoder_without_a_head_gives_features(
    tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    model = draw_weights(hiera_core.create_model("hiera_tiny_224", num_classes=0))
    path = tmp_path / "encoder.pth"
    torch.save({f"module.{name}": t for name, t in model.state_dict().items()}, path)
    photo = pictures / "chelsea.png"
    for options in (("-m", path), ("-m", "hiera_tiny_224", "--checkpoint", path)):
        code, out, err = hiera("features", photo, *options, "-f", "jsonl", "--dtype", "fp32")
        assert code == 0, err
        assert '"shape": [768]' in out
    code, _, err = hiera("predict", photo, "-m", path)
    assert code == 3 and "has no classifier" in err
