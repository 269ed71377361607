"""Tests of the backbone for detection and segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hiera_core
from hiera_core.models.feature_backbone import FeatureBackbone

from .conftest import SMALL, assert_close, draw_weights

MAE = {"q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 2}


def some_model(kind: str) -> Any:
    if kind == "mae":
        return draw_weights(hiera_core.MaskedAutoencoderHiera(**SMALL, **MAE))
    extra = {"abs_win_pos_embed": True} if kind == "abswin" else {}
    return draw_weights(hiera_core.Hiera(**SMALL, **extra))


@pytest.mark.parametrize("kind", ["classifier", "mae", "abswin"])
def test_every_parameter_gets_a_gradient_under_ddp(kind: str, tmp_path: Path) -> None:
    """DDP without `find_unused_parameters` stops at the second step if one does not."""
    backbone = FeatureBackbone(some_model(kind)).train()
    store = (tmp_path / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(backbone, find_unused_parameters=False)
        for _ in range(2):
            sum(m.square().mean() for m in parallel(torch.randn(2, 3, 64, 64))).backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("kind", ["classifier", "mae", "abswin"])
@torch.no_grad()
def test_a_backbone_shares_the_model_and_does_not_change_it(kind: str) -> None:
    model, x = some_model(kind).eval(), torch.randn(2, 3, 64, 64)
    names = list(model.state_dict())
    backbone = FeatureBackbone(model)
    assert list(model.state_dict()) == names
    assert backbone.model.patch_embed.proj.weight is model.patch_embed.proj.weight
    assert not model.training and not backbone.model.training
    _, expected = model.forward_features(x, return_intermediates=True)
    for found, stage in zip(backbone(x), expected, strict=True):
        assert_close(found, stage.movedim(-1, 1))


@torch.no_grad()
def test_checkpoints_load_into_a_backbone() -> None:
    model = hiera_core.create_model("hiera_nano_32", pretrained=True).eval()
    backbone = hiera_core.create_model("hiera_nano_32", pretrained=True, features_only=True)
    assert [i["module"] for i in backbone.feature_info] == [
        f"blocks.{end}" for end in model.stage_ends
    ]
    state = backbone.model.state_dict()
    assert set(model.state_dict()) - set(state) == {
        "norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias",
    }  # fmt: skip
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in state.items())
