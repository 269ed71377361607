"""Tests of the count of operations in a training step."""

from __future__ import annotations

import pytest
import torch

from hiera_core import zoo
from hiera_core.training import recipe_reader
from hiera_core.training.steps.utilisation import peak_flops, training_flops


def test_operations_are_three_times_those_of_the_zoo() -> None:
    """A forward pass of Hiera-T takes 4.97 G multiply-adds (paper, table 1)."""
    recipe = recipe_reader.read_recipe("hiera_tiny_224")
    count = training_flops(recipe, 1000)
    assert count is not None and count / 6e9 == pytest.approx(4.97, rel=0.02)


def test_a_run_goes_on_if_operations_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(torch.nn.Linear, "forward", fail)
    assert training_flops(recipe_reader.read_recipe("hiera_nano_32"), 10) is None


def test_fewer_visible_units_are_fewer_operations() -> None:
    name = "mae_hiera_nano_32"
    recipes = [recipe_reader.read_recipe(name, {"mask_ratio": ratio}) for ratio in (0.9, 0.6)]
    few, many = (training_flops(recipe, None) or 0 for recipe in recipes)
    assert 0 < few < many
    wide = recipe_reader.read_recipe(name, {"model.config.embed_dim": 64})
    assert zoo.get(name).config.get("embed_dim") != 64
    assert (training_flops(wide, None) or 0) > many


def test_only_known_devices_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == 756e12
    assert peak_flops(cuda, torch.float32) is None
    for other in ("Quadro", "NVIDIA L40", "NVIDIA RTX A1000"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, other=other: other)
        assert peak_flops(cuda, torch.float16) is None
