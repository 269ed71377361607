"""Tests of inputs whose size is known only at the call: `dynamic_size`, and absolute windows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

import hiera_core
from hiera_core import zoo
from hiera_core.errors import ConfigError, UsageError
from hiera_core.models import pos_embed
from hiera_core.models.sizes import legal_sizes, size_cache

from .conftest import SMALL, assert_close, draw_weights

VIDEO: Any = {
    **zoo.get("hiera_base_16x224").config,
    "embed_dim": 16,
    "stages": (1, 1, 2, 1),
    "num_classes": 10,
    "input_size": (4, 64, 64),
}
ABSWIN: Any = {**SMALL, "abs_win_pos_embed": True, "global_pos_size": (5, 5)}
AUTOENCODER: Any = {
    "q_pool": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip
CASES: dict[str, Any] = {
    "image": ({**SMALL, "dynamic_size": True}, (96, 160)),
    "smaller": ({**SMALL, "dynamic_size": True}, (32, 64)),
    "abswin": (ABSWIN, (96, 160)),
    "video": ({**VIDEO, "dynamic_size": True}, (8, 32, 96)),
}


def build_pair(case: str, path: Path) -> tuple[Any, Any, tuple[int, ...]]:
    """Return a model for any size, and one that is built for a size from the same weights."""
    arguments, size = CASES[case]
    model = draw_weights(hiera_core.Hiera(**arguments)).eval()
    model.save_pretrained(path)
    fixed = hiera_core.create_model(str(path), input_size=size, dynamic_size=False).eval()
    return model, fixed, size


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_a_model_built_for_the_size(case: str, tmp_path: Path) -> None:
    model, fixed, size = build_pair(case, tmp_path)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for _ in range(2):  # the second call takes what was kept
            assert_close(model(x), fixed(x), 1e-6)
            found = model.forward_features(x, return_intermediates=True)[1]
            expected = fixed.forward_features(x, return_intermediates=True)[1]
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs, 1e-6)
        own = torch.randn(1, 3, *CASES[case][0]["input_size"])
        assert model(own).shape == (1, 10)
    assert model.config["input_size"] == CASES[case][0]["input_size"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_a_model_built_for_the_size(case: str, tmp_path: Path) -> None:
    """The gradient of a resized embedding goes through the resizing."""
    model, fixed, size = build_pair(case, tmp_path)
    x = torch.randn(2, 3, *size)
    model.forward_logits(x).square().sum().backward()
    fixed.forward_logits(x).square().sum().backward()
    grid, own = model._config.tokens_of(size), model.layout.grid
    windows = {
        "pos_embed": (own, grid, (8, 8)),
        "pos_embed_spatial": (own[1:], grid[1:], (8, 8)),
        "pos_embed_temporal": (own[:1], grid[:1], None),
    }
    for name, parameter in model.named_parameters():
        expected = fixed.get_parameter(name).grad
        if name in windows and case != "abswin":
            source = parameter.detach().clone().requires_grad_()
            pos_embed.resize(source, *windows[name]).backward(expected)
            expected = source.grad
        scale = max(1.0, float(expected.abs().max()))
        assert (parameter.grad - expected).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize("video", [False, True])
@torch.no_grad()
def test_autoencoders_take_any_size(video: bool, tmp_path: Path) -> None:
    arguments = {**(VIDEO if video else SMALL), **AUTOENCODER}
    del arguments["num_classes"]
    size = (8, 64, 96) if video else (96, 64)
    model = draw_weights(hiera_core.MaskedAutoencoderHiera(**arguments, dynamic_size=True))
    model.save_pretrained(tmp_path)
    fixed = hiera_core.create_model(str(tmp_path), input_size=size, dynamic_size=False)
    x = torch.randn(2, 3, *size)
    mask = fixed.get_random_mask(x, 0.5)
    assert model.get_random_mask(x, 0.5).shape == mask.shape
    for ours, theirs in zip(model(x, mask=mask), fixed(x, mask=mask), strict=True):
        assert_close(ours.float(), theirs.float(), 1e-6)
    keep_ids = torch.stack([row.nonzero().flatten() for row in mask])
    everything = model.decode_all(x, keep_ids=keep_ids)
    assert_close(everything, fixed.decode_all(x, keep_ids=keep_ids), 1e-6)
    pixels = model.pixels_of(everything, size=size)
    assert torch.equal(pixels, fixed.pixels_of(everything))


@torch.no_grad()
def test_masks_and_attention_follow_the_size(tmp_path: Path) -> None:
    model, fixed, size = build_pair("image", tmp_path)
    x = torch.randn(2, 3, *size)
    mask = model.get_random_mask(x, 0.5)
    assert mask.shape == (2, 3 * 5)
    assert_close(model(x, mask=mask), fixed(x, mask=mask), 1e-6)
    maps = hiera_core.attention_maps(model, x, block=-1)
    assert maps.query_grid == (3, 5)
    assert_close(maps.weights, hiera_core.attention_maps(fixed, x, block=-1).weights, 1e-6)


@pytest.mark.parametrize("case", ["image", "abswin", "video"])
def test_illegal_sizes_are_refused_with_the_nearest(case: str) -> None:
    model = hiera_core.Hiera(**CASES[case][0])
    frames = (8,) if case == "video" else ()
    near = "8x64x96 or 8x96x96" if frames else "64x96 or 96x96"
    with pytest.raises(UsageError, match=f"70 is not a multiple of 32 .*; the nearest .* {near}"):
        model(torch.zeros(1, 3, *frames, 70, 96))
    for shape in [(1, 4, *frames, 64, 64), (1, 3, 64)]:
        expected = "frames, y, x" if frames else "y, x"
        with pytest.raises(UsageError, match=rf"expected \[batch, 3, {expected}\]$"):
            model(torch.zeros(shape))
    with pytest.raises(UsageError, match="too large"):
        model(torch.zeros(1, 3, *frames, 1, 1, device="meta").expand(1, 3, *frames, 2**14, 2**14))


def test_without_it_the_error_names_it() -> None:
    with pytest.raises(UsageError, match=r"expected \[batch, 3, 64, 64\].*dynamic_size=True"):
        hiera_core.Hiera(**SMALL)(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ConfigError, match="dynamic_size is 'yes'; give True or False"):
        hiera_core.Hiera(**SMALL, dynamic_size="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "steps", "expected"),
    [((100, 64), (32, 32), "96x64 or 128x64"), ((16, 40), (32, 32), "32x32 or 32x64"),
     ((3, 70, 70), (2, 32, 32), "2x64x64 or 4x96x96"), ((16,), (32,), "32")],
)  # fmt: skip
def test_nearest_sizes(size: tuple[int, ...], steps: tuple[int, ...], expected: str) -> None:
    assert legal_sizes.nearest_whole(size, steps) == expected


def test_config_json_has_it_only_if_it_is_used(tmp_path: Path) -> None:
    import hiera as reference

    draw_weights(hiera_core.Hiera(**SMALL)).save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "dynamic_size" not in config
    reference.Hiera.from_pretrained(tmp_path / "plain")
    hiera_core.create_model(str(tmp_path / "plain"), dynamic_size=True).save_pretrained(
        tmp_path / "any"
    )
    assert hiera_core.create_model(str(tmp_path / "any")).config["dynamic_size"] is True


def test_conversion_leaves_it_out(tmp_path: Path) -> None:
    hiera_core.Hiera(**SMALL, dynamic_size=True).save_pretrained(tmp_path / "any")
    hiera_core.convert(tmp_path / "any", tmp_path / "hub", to="hub")
    assert "dynamic_size" not in json.loads((tmp_path / "hub" / "config.json").read_text())


@torch.no_grad()
def test_embeddings_of_weights_in_half_precision_are_resampled_in_fp32(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 48, 64)
    for name in ("hiera_nano_32", "mae_hiera_nano_32"):  # their files are in fp16
        models = [
            hiera_core.create_model(name, pretrained=True, **arguments)
            for arguments in ({"dynamic_size": True}, {"input_size": (48, 64)})
        ]
        ids = torch.tensor([[0, 5, 9]]).expand(2, -1)
        ours, theirs = (model.forward_features(x, keep_ids=ids) for model in models)
        assert_close(ours, theirs, 1e-6)
        ours, theirs = (model.get_pos_embed((24, 32)) for model in models)
        assert torch.equal(ours, theirs)
    hiera_core.convert("hiera_nano_32", tmp_path / "half", to="hub", size=(48, 64))
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


@torch.no_grad()
def test_pretrained_weights_and_backbones_take_it() -> None:
    model = hiera_core.create_model("hiera_nano_32", pretrained=True, dynamic_size=True).eval()
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 10)
    for name in ("hiera_nano_32", "mae_hiera_nano_32"):
        backbone = hiera_core.create_model(
            name, pretrained=True, dynamic_size=True, features_only=True
        )
        maps = backbone(torch.randn(1, 3, 48, 32))
        last = (6, 4) if name == "hiera_nano_32" else (12, 8)  # autoencoders pool once less
        assert [m.shape[2:] for m in maps] == [(24, 16), (12, 8), last]
    sam2 = hiera_core.create_model("sam2_hiera_tiny", dynamic_size=True, embed_dim=16)
    assert "dynamic_size" not in sam2.config


# What is kept -------------------------------------------------------------------------------------


def dynamic_model() -> Any:
    return draw_weights(hiera_core.Hiera(**SMALL, dynamic_size=True)).eval()


@torch.no_grad()
def test_a_bounded_number_of_sizes_is_kept() -> None:
    model = dynamic_model()
    model(torch.randn(1, 3, 64, 64))
    assert not model._cache.positions and not model._cache.orders  # its own size needs nothing
    for side in range(1, size_cache.MAX_CACHED + 4):
        model(torch.randn(1, 3, 32, 32 * side))
    assert len(model._cache.positions) == len(model._cache.orders) == size_cache.MAX_CACHED
    assert (32, 32) not in model._cache.orders


def replace(model: Any) -> None:
    model.pos_embed = nn.Parameter(model.pos_embed + 1)


def write(model: Any) -> None:
    model.pos_embed.add_(1)


def write_data(model: Any) -> None:
    model.pos_embed.data.add_(1)


def load(model: Any) -> None:
    model.load_state_dict({"pos_embed": model.pos_embed + 1}, strict=False)


@pytest.mark.parametrize("change", [replace, write, write_data, load])
@torch.no_grad()
def test_new_values_are_seen(change: Any) -> None:
    model, x = dynamic_model(), torch.randn(1, 3, 96, 96)
    before = model.get_pos_embed((24, 24))
    model(x)
    change(model)
    expected = copy.deepcopy(model)
    assert not expected._cache.positions
    assert (model.get_pos_embed((24, 24)) - before).abs().max() > 0.5
    assert torch.equal(model(x), expected(x))


@torch.no_grad()
def test_another_dtype_or_device_is_seen() -> None:
    model, x = dynamic_model(), torch.randn(1, 3, 96, 96)
    exact = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert_close(half.float(), exact, 0.1)
    assert_close(model.float()(x), exact, 0.1)
    assert model.to("meta")(x.to("meta")).shape == (1, 10)


def test_nothing_is_kept_for_gradients_tracers_or_transforms() -> None:
    model, x = dynamic_model(), torch.randn(1, 3, 96, 96)
    model.set_attention("eager")  # the fused kernel warns under vmap
    model(x)
    with torch.no_grad():
        torch.func.vmap(model)(x[None])
        torch.func.functional_call(copy.deepcopy(model), dict(model.named_parameters()), x)
        torch.compile(model, fullgraph=True, backend="eager")(x)
        make_fx(model)(x)
        assert not model._cache.positions
        model(x)
        assert len(model._cache.positions) == 1
    model.train()
    assert not model._cache.positions


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def double_by_parametrization(model: Any) -> Any:
    nn.utils.parametrize.register_parametrization(model, "pos_embed", Doubled())
    return model


def prune_all(model: Any) -> Any:
    prune.custom_from_mask(model, "pos_embed", torch.zeros_like(model.pos_embed))
    return model


def call_with_doubled(model: Any) -> Any:
    parameters = {**dict(model.named_parameters()), "pos_embed": 2 * model.pos_embed}
    return lambda x: torch.func.functional_call(model, parameters, x)


def call_as_a_stack(model: Any) -> Any:
    model.set_attention("eager")  # the fused kernel warns under vmap
    doubled = copy.deepcopy(model)
    doubled.pos_embed.mul_(2)
    parameters, buffers = torch.func.stack_module_state([model, doubled])

    def call(x: torch.Tensor) -> torch.Tensor:
        functional = torch.func.functional_call
        outputs = torch.func.vmap(lambda p, b: functional(model, (p, b), x))(parameters, buffers)
        return outputs[1]

    return call


@pytest.mark.parametrize("case", ["image", "abswin"])
@pytest.mark.parametrize(
    ("wrap", "factor"),
    [
        (double_by_parametrization, 2),
        (prune_all, 0),
        (call_with_doubled, 2),
        (call_as_a_stack, 2),
    ],
    ids=["parametrized", "pruned", "functional", "stacked"],
)
@torch.no_grad()
def test_embeddings_that_are_no_parameters(case: str, wrap: Any, factor: float) -> None:
    arguments, size = CASES[case]
    model = draw_weights(hiera_core.Hiera(**arguments)).eval()
    expected, x = copy.deepcopy(model), torch.randn(2, 3, *size)
    expected.pos_embed.mul_(factor)
    model(x)  # what is kept is not taken for other values
    assert_close(wrap(model)(x), expected(x))


@torch.no_grad()
def test_users_choose_what_gets_no_weight_decay() -> None:
    class Decayed(hiera_core.Hiera):
        def no_weight_decay(self) -> list[str]:
            return []

    torch.manual_seed(0)
    model = Decayed(**SMALL, dynamic_size=True).eval()
    assert model.pos_embed.std() > 0.01  # it is initialised
    x = torch.randn(1, 3, 96, 96)
    before = model(x)
    model.pos_embed.add_(torch.randn_like(model.pos_embed))
    assert (model(x) - before).abs().max() > 1e-6


def test_what_is_kept_in_inference_mode_serves_training() -> None:
    model, x = dynamic_model(), torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    model.forward_logits(x).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


@torch.no_grad()
def test_each_size_compiles_without_a_graph_break() -> None:
    model = dynamic_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((64, 64), (96, 32)):
        x = torch.randn(1, 3, *size)
        assert_close(compiled(x), model(x))
