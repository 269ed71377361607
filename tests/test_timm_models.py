"""Tests of our models in timm's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hiera_core
from hiera_core import zoo
from hiera_core.errors import UsageError

from .conftest import assert_close

timm = pytest.importorskip("timm")
timm_models = pytest.importorskip("hiera_core.timm_models")

NANO = "hiera_core_hiera_nano_32"
SMALLER: Any = {"embed_dim": 16, "stages": (1, 1, 2, 1)}


def test_timm_lists_them_and_keeps_its_own() -> None:
    names = timm_models.registered_names()
    assert names == [f"hiera_core_{name}" for name in zoo.names()]
    assert set(timm.list_models("hiera_core_*")) == set(names)
    pretrained = timm.list_models("hiera_core_*", pretrained=True)
    assert "hiera_core_hiera_base_224.mae_in1k_ft_in1k" in pretrained
    assert not any("base_abswin" in name for name in pretrained)
    assert type(timm.create_model("hiera_tiny_224", **SMALLER)).__module__ == "timm.models.hiera"


def test_nothing_of_timm_is_needed_without_it() -> None:
    code = "import hiera_core, sys; hiera_core.create_model('hiera_nano_32', features_only=True)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'timm' not in sys.modules"], check=True)


@torch.no_grad()
def test_a_classifier_returns_logits() -> None:
    model = timm.create_model(NANO, pretrained=True).eval()
    ours = hiera_core.create_model("hiera_nano_32", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), ours.forward_logits(x))
    assert_close(hiera_core.create_model("hiera_nano_32", pretrained=True).eval()(x), ours(x))
    for arguments in ({"num_classes": 3}, {"num_classes": 0}, {"img_size": 48}):
        other = timm.create_model(NANO, pretrained=True, **arguments).eval()
        side = arguments.get("img_size", 32)
        assert other(torch.randn(1, 3, side, side)).shape[1] == arguments.get(
            "num_classes", 10
        ) or (other(x).shape[1] == ours.num_features)


@torch.no_grad()
def test_weights_come_from_where_timm_says(tmp_path: Path) -> None:
    state = hiera_core.create_model("hiera_nano_32").state_dict()
    save_file(state, tmp_path / "own.safetensors")
    path = str(tmp_path / "own.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": path}, "pretrained": True}
    for options in (overlay, {"checkpoint": path}, {"checkpoint_path": path}):
        found = timm.create_model(NANO, **options).state_dict()
        assert all(torch.equal(found[name], values) for name, values in state.items())
    released = hiera_core.create_model("hiera_nano_32", pretrained=True).state_dict()
    for name, options in [
        (f"{NANO}.mae_digits_ft_digits", {}),
        (NANO, {"pretrained_cfg": "mae_digits_ft_digits"}),
        (NANO, {"pretrained_cfg": timm.get_pretrained_cfg(NANO)}),
    ]:
        found = timm.create_model(name, pretrained=True, **options).state_dict()
        assert all(torch.equal(found[name], values) for name, values in released.items())
    with pytest.raises(UsageError, match="nothing"):
        timm.create_model(f"{NANO}.nothing", pretrained=True)


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_is_a_backbone_through_timm(name: str) -> None:
    entry = zoo.get(name)
    depths = tuple(min(depth, 2) for depth in entry.config["stages"])
    size = (*[4] * (len(entry.config["input_size"]) - 2), 64, 64)
    smaller: Any = {"embed_dim": 8 * entry.config["num_heads"], "stages": depths}
    if entry.family == "hieradet":
        smaller["global_att_blocks"] = (sum(depths[:2]) + 1,)
    if entry.autoencoder:
        smaller |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}
    backbone = timm.create_model(
        f"hiera_core_{name}", features_only=True, out_indices=(-2, -1), in_chans=1,
        num_classes=0, img_size=size, **smaller,
    )  # fmt: skip
    maps = backbone.train()(torch.randn(1, 1, *size))
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_arguments_that_are_not_supported_are_refused() -> None:
    with pytest.raises(UsageError, match="set the environment variable"):
        timm.create_model(NANO, cache_dir="somewhere")
    with pytest.raises(UsageError, match="global_pool is not 'avg'"):
        timm.create_model(NANO, global_pool="max")
    with pytest.raises(UsageError, match="num_classes is 10"):
        timm.create_model("hiera_core_sam2_hiera_tiny", num_classes=10, embed_dim=16)
