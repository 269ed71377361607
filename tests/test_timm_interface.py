"""Tests of what timm's tools and users expect of a model, against timm itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hiera_core
from hiera_core.errors import UsageError
from hiera_core.models.timm_interface import map_formats
from hiera_core.weights import key_mapping

from .conftest import SMALL, assert_close, draw_weights

SAM2: Any = {"embed_dim": 16, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}
VIDEO: Any = {
    **SMALL, "input_size": (4, 64, 64), "q_stride": (1, 2, 2), "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7), "patch_stride": (2, 4, 4), "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}  # fmt: skip


def small() -> Any:
    return draw_weights(hiera_core.Hiera(**SMALL)).eval()


def build_pair(kind: str) -> tuple[Any, Any]:
    """Return a model and timm's with the same weights."""
    import timm

    if kind == "sam2":
        model: Any = draw_weights(hiera_core.HieraDet(**SAM2)).eval()
        theirs = timm.create_model("sam2_hiera_tiny", **SAM2).eval()
    else:
        model = small()
        names = {"embed_dim": 16, "stages": (1, 1, 2, 1), "num_classes": 10, "img_size": 64}
        theirs = timm.create_model("hiera_tiny_224", **names).eval()
    naming = key_mapping.from_reference(model.state_dict(), "timm") if kind != "sam2" else None
    theirs.load_state_dict(naming or model.state_dict(), strict=kind != "sam2")
    return model, theirs


@pytest.mark.parametrize("kind", ["hiera", "sam2"])
@pytest.mark.parametrize("coarse", [True, False])
@torch.no_grad()
def test_intermediates_equal_those_of_timm(kind: str, coarse: bool) -> None:
    model, theirs = build_pair(kind)
    x = torch.randn(1, 3, 64, 64)
    for indices in (None, 2, (0, -1), [1], (3, 1)):
        for output_fmt in ("NCHW", "NHWC"):
            options: Any = {"indices": indices, "output_fmt": output_fmt, "coarse": coarse}
            found = model.forward_intermediates(x, intermediates_only=True, **options)
            expected = theirs.forward_intermediates(x, intermediates_only=True, **options)
            for ours, other in zip(found, expected, strict=True):
                assert_close(ours, other)


@torch.no_grad()
def test_the_first_output_is_the_last_map_that_was_computed() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and len(maps) == 4
    assert_close(model.forward_head(last), model(x))
    assert_close(model.forward_head(last, pre_logits=True), model.pool(model.encode(x)[0]))
    assert model.forward_intermediates(x, (1,))[0].shape == (1, 8, 8, 32)
    assert model.forward_intermediates(x, (1,), stop_early=False)[0].shape == (1, 2, 2, 128)


@torch.no_grad()
def test_blocks_after_the_last_map_do_not_run() -> None:
    model, ran = small(), []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.forward_intermediates(torch.randn(1, 3, 64, 64), (1,))
    assert ran == [0, 1]


@torch.no_grad()
def test_the_final_norm_is_for_the_last_map() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    plain = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], normed[:3], strict=True))
    assert torch.equal(normed[3], model.norm(plain[3]))
    with pytest.raises(UsageError, match="no final norm"):
        hiera_core.HieraDet(**SAM2).forward_intermediates(x, norm=True)


@torch.no_grad()
def test_maps_of_videos_have_formats_of_their_own() -> None:
    model, x = draw_weights(hiera_core.Hiera(**VIDEO)), torch.randn(1, 3, 4, 64, 64)
    for output_fmt, shape in [
        ("NCHW", (16, 2, 16, 16)), ("NCTHW", (16, 2, 16, 16)), ("NTHWC", (2, 16, 16, 16)),
    ]:  # fmt: skip
        found = model.forward_intermediates(x, (0,), output_fmt=output_fmt, intermediates_only=True)
        assert found[0].shape[1:] == shape
    for output_fmt in ("NLC", "CHW", ""):
        with pytest.raises(UsageError, match="use NCHW or NHWC or NCTHW or NTHWC"):
            map_formats.channels_first(output_fmt, 3)
    with pytest.raises(UsageError, match="there is no block 5"):
        small().forward_intermediates(torch.randn(1, 3, 64, 64), (5,), coarse=False)


def test_the_classifier_can_be_read_and_replaced() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    assert model.get_classifier() is model.head.projection
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (10, 128, 128)
    model.return_logits()
    assert_close(model(x), model.forward_logits(x))
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7 and model.get_classifier().out_features == 7
    assert_close(model.eval()(x), model.forward_logits(x))  # still logits
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model(x).shape == (1, 128)
    with pytest.raises(UsageError, match="global_pool is 'max'"):
        model.reset_classifier(3, global_pool="max")


def layers_of(model: nn.Module, coarse: bool) -> dict[str, int]:
    """Return the number of the layer of each parameter, as timm counts."""
    from timm.models._manipulate import group_parameters

    matcher = model.group_matcher(coarse=coarse)  # type: ignore[operator]
    layers: dict[str, int] = group_parameters(model, matcher, reverse=True)
    return layers


@pytest.mark.parametrize("kind", ["hiera", "sam2", "backbone"])
def test_layers_are_embeddings_blocks_and_head(kind: str) -> None:
    model = hiera_core.HieraDet(**SAM2) if kind == "sam2" else small()
    tested = hiera_core.FeatureBackbone(model) if kind == "backbone" else model
    stages = [spec.stage for spec in model.block_specs]
    fine, coarse = layers_of(tested, False), layers_of(tested, True)
    assert set(fine) == set(coarse) == {name for name, _ in tested.named_parameters()}
    for name in fine:
        short = name.removeprefix("model.")
        part, _, rest = short.partition(".")
        number = int(rest.partition(".")[0]) if part == "blocks" else None
        if number is not None:
            expected = (number + 1, stages[number] + 1)
        elif part in ("norm", "head"):
            expected = (len(stages) + (part == "head"), 4 + (part == "head"))
        else:
            expected = (0, 0)
        assert (fine[name], coarse[name]) == expected, name


def test_timm_gives_each_layer_its_learning_rate() -> None:
    from timm.optim import create_optimizer_v2

    for model in (small(), hiera_core.FeatureBackbone(small(), (1, 2))):
        optimizer = create_optimizer_v2(
            model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5
        )
        rates = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[parameter] = (group["lr_scale"], group["weight_decay"])
        layers = layers_of(model, False)
        last = max(layers.values())
        for name, parameter in model.named_parameters():
            scale, decay = rates[parameter]
            assert scale == 0.5 ** (last - layers[name])
            assert (decay == 0) == (parameter.dim() == 1 or "pos_embed" in name)


def test_timm_reads_the_preprocessing() -> None:
    import timm

    model = hiera_core.create_model("hiera_tiny_224", input_size=(256, 256))
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 256, 256) and config["crop_pct"] == 224 / 256
    assert config["interpolation"] == "bicubic" and config["mean"] == (0.485, 0.456, 0.406)
    assert model.default_cfg["fixed_input_size"] is True
    sam2 = hiera_core.create_model("sam2_hiera_tiny", features_only=True, **SAM2)
    config = timm.data.resolve_data_config({}, model=sam2)
    assert (config["crop_mode"], config["input_size"]) == ("squash", (3, 1024, 1024))
    assert sam2.default_cfg["fixed_input_size"] is False
    assert small().pretrained_cfg["num_classes"] == 10


def test_a_backbone_has_no_classes() -> None:
    backbone = hiera_core.create_model("hiera_nano_32", pretrained=True, features_only=True)
    config = backbone.pretrained_cfg
    assert config["num_classes"] == 0 and config["classifier"] is None
    assert "label_names" not in config
    assert backbone.get_submodule(str(config["first_conv"])) is backbone.model.patch_embed.proj
    whole = hiera_core.create_model("hiera_nano_32", pretrained=True).pretrained_cfg
    assert config["mean"] == whole["mean"] and len(whole["label_names"]) == 10


@pytest.mark.parametrize(
    "preprocessing",
    [
        "none",
        [1],
        {"mean": 5, "std": None},
        {"size": 224, "resize": "256"},
        {"size": ["a"], "resize": []},
        {"crop_mode": ["center"]},
        {"interpolation": 3},
    ],
    ids=str,
)
def test_preprocessing_that_is_not_usable_is_left_out(preprocessing: Any) -> None:
    model = small()
    model.card = {"model": "mine", "preprocessing": preprocessing}
    config = model.pretrained_cfg
    assert config["architecture"] == "mine" and config["input_size"] == (3, 64, 64)
    assert not {"mean", "std", "crop_pct", "crop_mode", "interpolation"} & {*config}
