"""Tests of the backbone for detection and segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import hiera_core
from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.models.feature_backbone import FeatureBackbone

from .conftest import SMALL, assert_close, draw_weights

MAE = {"q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 2}


NARROW_SAM2 = {"embed_dim": 16, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}


def some_model(kind: str) -> Any:
    if kind == "sam2":
        return draw_weights(hiera_core.HieraDet(**NARROW_SAM2))
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


# Chosen maps --------------------------------------------------------------------------------------

KINDS = ["classifier", "mae", "abswin", "sam2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [None, (1, 2, 3), (0,), (1,), (-2, 0), 2], ids=str)
def test_chosen_maps_and_their_parameters(kind: str, indices: Any) -> None:
    """Stages after the last map are dropped, so every parameter gets a gradient."""
    model, x = some_model(kind), torch.randn(1, 3, 64, 64)
    names = list(model.state_dict())
    everything = FeatureBackbone(model).eval()(x)
    backbone = hiera_core.FeatureBackbone(model, indices)
    stages = {None: (0, 1, 2, 3), (-2, 0): (2, 0), 2: (2, 3)}.get(indices, indices)
    for training in (True, False):
        maps = backbone.train(training)(x)
        for found, stage in zip(maps, stages, strict=True):
            assert_close(found, everything[stage])
        sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    info = backbone.feature_info
    assert info.out_indices == tuple(stages) and len(info) == 4
    assert info.channels() == [m.shape[1] for m in maps]
    assert info.reduction() == [64 // m.shape[-1] for m in maps]
    assert info.module_name() == [f"blocks.{model.stage_ends[stage]}" for stage in stages]
    assert list(model.state_dict()) == names
    kept = max(model.stage_ends[stage] for stage in stages) + 1
    assert len(backbone.model.blocks) == kept <= len(model.blocks)


def test_feature_info_has_the_interface_of_timm() -> None:
    from timm.models._features import FeatureInfo

    ours = FeatureBackbone(some_model("classifier"), (1, -1)).feature_info
    theirs = FeatureInfo([dict(entry) for entry in ours], (1, 3))
    assert isinstance(ours, list) and ours.info == theirs.info and ours[0] == theirs[0]
    for idx in (None, 2, (0, 3)):
        assert ours.channels(idx) == theirs.channels(idx)
        assert ours.reduction(idx) == theirs.reduction(idx)
        assert ours.module_name(idx) == theirs.module_name(idx)
        assert ours.get("index", idx) == theirs.get("index", idx)
        for keys in (None, ["num_chs", "reduction"]):
            assert ours.get_dicts(keys, idx) == theirs.get_dicts(keys, idx)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, "out_indices is 0; give a sequence of numbers from 0 to 3, or a number from 1 to 4"),
        (-1, "out_indices is -1; give"),
        (5, "the model has 4 stages, not 5; give"),
        (True, "out_indices is True; give"),
        (np.int64(0), r"out_indices is np.int64\(0\); give"),
        ((), r"out_indices is \(\); give"),
        (1.5, "out_indices is 1.5; give"),
        ("12", "out_indices is '12'; give"),
        ({1, 2}, r"out_indices is \{1, 2\}; give"),
        ((4,), "there is no stage 4; the model has 4 stages: use 0 to 3, or -4 to -1 from the end"),
        ((-5,), "there is no stage -5; the model has 4"),
        (("a",), "there is no stage 'a'; the model has 4"),
        ((True,), "there is no stage True; the model has 4"),
        (np.array([0.5]), "there is no stage 0.5; the model has 4"),
    ],
    ids=str,
)
def test_stages_that_do_not_exist_are_refused(indices: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FeatureBackbone(some_model("classifier"), indices)


@pytest.mark.parametrize("number", [np.int64(2), np.array([2, -1]), torch.tensor([2, 3]), [2, 3]])
def test_numbers_of_numpy_choose_stages(number: Any) -> None:
    backbone = FeatureBackbone(some_model("classifier"), number)
    assert backbone.feature_info.out_indices == (2, 3)
    assert all(type(index) is int for index in backbone.feature_info.out_indices)


def test_messages_about_intermediates_name_their_argument() -> None:
    model, x = some_model("classifier"), torch.zeros(1, 3, 64, 64)
    with pytest.raises(UsageError, match="indices is 0; give a sequence of numbers from 0 to 3"):
        model.forward_intermediates(x, indices=0)
    with pytest.raises(UsageError, match="the model has 5 blocks, not 9"):
        model.forward_intermediates(x, indices=9, coarse=False)


@torch.no_grad()
def test_a_wrapped_model_is_unwrapped() -> None:
    model, x = some_model("classifier").eval(), torch.randn(1, 3, 64, 64)
    (expected,) = FeatureBackbone(model, (1,))(x)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert_close(FeatureBackbone(wrapped, (1,))(x)[0], expected)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a model of type Linear is not a Hiera model"):
        FeatureBackbone(nn.Linear(2, 2))


def test_methods_that_a_backbone_would_not_run_are_refused() -> None:
    class WithoutPositions(hiera_core.Hiera):
        def get_pos_embed(self, grid: Any = None) -> torch.Tensor:
            return torch.zeros_like(super().get_pos_embed(grid))

    class Renamed(hiera_core.Hiera):
        def forward(self, x: Any) -> Any:
            return {"logits": super().forward(x)}

    with pytest.raises(UsageError, match="run the method get_pos_embed of WithoutPositions; use"):
        FeatureBackbone(WithoutPositions(**SMALL))
    FeatureBackbone(Renamed(**SMALL))


def test_out_indices_need_a_backbone() -> None:
    with pytest.raises(UsageError, match="add features_only=True"):
        hiera_core.create_model("hiera_nano_32", out_indices=(1,))


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_of_the_zoo_is_a_backbone(name: str) -> None:
    """At full size without storage; and with gradients, narrow and at a small size."""
    entry = zoo.get(name)
    with torch.device("meta"):
        full = hiera_core.create_model(name, features_only=True)
    size = entry.config["input_size"]
    maps = full(torch.empty(1, 3, *size, device="meta"))
    assert [m.shape[1] for m in maps] == full.feature_info.channels()
    assert [size[-1] // m.shape[-1] for m in maps] == full.feature_info.reduction()

    stages = tuple(min(depth, 2) for depth in entry.config["stages"])
    smaller: Any = {"embed_dim": 8 * entry.config["num_heads"], "stages": stages}
    smaller["input_size"] = (*[4] * (len(size) - 2), 64, 64)
    if entry.family == "hieradet":
        smaller["global_att_blocks"] = (sum(stages[:2]) + 1,)
    if entry.autoencoder:
        smaller |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}
    backbone = hiera_core.create_model(name, features_only=True, out_indices=(0, -2), **smaller)
    found = backbone.train()(torch.randn(1, 3, *smaller["input_size"]))
    assert [m.shape[1] for m in found] == backbone.feature_info.channels()
    sum(m.square().mean() for m in found).backward()
    missing = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not missing, missing


def test_frozen_stages_get_no_gradient_and_stay_in_evaluation_mode() -> None:
    backbone = FeatureBackbone(hiera_core.Hiera(**SMALL, drop_path_rate=0.5)).train()
    backbone.freeze_stages(2)
    sum(m.mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert trained == {
        n
        for n, _ in backbone.named_parameters()
        if n.startswith(("model.blocks.2", "model.blocks.3", "model.blocks.4"))
    }
    assert [block.training for block in backbone.train().model.blocks] == [False] * 2 + [True] * 3
    backbone.freeze_stages(0)
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(block.training for block in backbone.model.blocks)
    with pytest.raises(UsageError, match="cannot freeze 5 stages"):
        backbone.freeze_stages(5)


@pytest.mark.parametrize("kind", ["classifier", "sam2"])
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    x, gradients = torch.randn(1, 3, 64, 96 if kind == "sam2" else 64), []
    for enable in (False, True):
        backbone = FeatureBackbone(some_model(kind), (0, 2)).train()
        backbone.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in backbone(x)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


@pytest.mark.parametrize("kind", ["classifier", "sam2"])
@torch.no_grad()
def test_a_backbone_compiles_without_a_graph_break(kind: str) -> None:
    backbone = FeatureBackbone(some_model(kind), (1, 2)).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 64, 64)
    for ours, expected in zip(compiled(x), backbone(x), strict=True):
        assert_close(ours, expected)


def test_adapters_of_peft_are_trained() -> None:
    peft = pytest.importorskip("peft")
    backbone = FeatureBackbone(some_model("classifier"), (1, 2, 3))
    x = torch.randn(1, 3, 64, 64)
    before = [m.detach() for m in backbone(x)]
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], r=2)
    adapted = peft.get_peft_model(backbone, config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # in the first step, only one of the two factors has a gradient
        optimizer.zero_grad()
        sum(m.square().mean() for m in adapted(x)).backward()
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert all((m - b).abs().max() > 0 for m, b in zip(adapted(x)[1:], before[1:], strict=True))
