"""Tests of the image encoder of SAM 2: equal to timm and transformers, at any input size."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import hiera_core
from hiera_core import zoo
from hiera_core.data.transforms import ImageTransform
from hiera_core.errors import CheckpointError, ConfigError, UsageError
from hiera_core.models import factory
from hiera_core.models.sam2 import window_order
from hiera_core.models.sam2.hieradet import HieraDet
from hiera_core.models.sizes import size_cache
from hiera_core.weights import key_mapping
from hiera_core.weights.load import read_checkpoint

from .conftest import assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]

NAMES = [name for name, entry in zoo.models().items() if entry.family == "hieradet"]
NARROW: Any = {"embed_dim": 16, "num_heads": 1}
LARGE: Any = {
    **NARROW, "stages": (1, 1, 3, 2), "window_spec": (8, 4, 16, 8), "global_att_blocks": (3, 4),
}  # fmt: skip
# Sizes that timm and transformers take: multiples of 32. The windows of the last two stages divide
# the first of them alone.
SIZES = [(224, 224), (256, 256), (512, 768), (64, 96)]
# Sizes that they do not take: odd grids, whose last row or column a pool loses.
ODD_SIZES = [(1000, 600), (250, 254), (100, 36), (228, 356), (29, 29), (33, 61)]
SAMPLE = zoo.ASSETS / "samples" / "cat.jpg"


def build(**arguments: Any) -> HieraDet:
    model = HieraDet(**{**NARROW, **arguments}).eval()
    draw_weights(model)
    return model


def build_timm(model: HieraDet) -> torch.nn.Module:
    """Return timm's model with the same weights, which it loads by their names."""
    import timm

    names = ("embed_dim", "num_heads", "stages", "window_spec", "global_att_blocks")
    names += ("global_pos_size", "in_chans")
    arguments = {name: model.config[name] for name in names}  # type: ignore[literal-required]
    theirs = timm.create_model("sam2_hiera_tiny", num_classes=0, **arguments).eval()
    state = key_mapping.from_reference(model.state_dict(), "timm")
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["head.norm.weight", "head.norm.bias"] and not unexpected
    return theirs


def transformers_config(model: HieraDet) -> Any:
    from transformers import Sam2HieraDetConfig

    config = model.config
    stages = range(len(config["stages"]))
    return Sam2HieraDetConfig(
        hidden_size=config["embed_dim"],
        num_attention_heads=config["num_heads"],
        num_channels=config["in_chans"],
        blocks_per_stage=list(config["stages"]),
        embed_dim_per_stage=[config["embed_dim"] * 2**stage for stage in stages],
        num_attention_heads_per_stage=[config["num_heads"] * 2**stage for stage in stages],
        window_size_per_stage=list(config["window_spec"]),
        global_attention_blocks=list(config["global_att_blocks"]),
        window_positional_embedding_background_size=list(config["global_pos_size"]),
    )


def build_transformers(model: HieraDet) -> torch.nn.Module:
    from transformers import Sam2HieraDetModel

    theirs = Sam2HieraDetModel(transformers_config(model)).eval()
    state = key_mapping.from_reference(model.state_dict(), "transformers")
    theirs.load_state_dict(state, strict=True)
    return theirs


def maps_of_timm(theirs: Any, x: torch.Tensor) -> list[torch.Tensor]:
    maps: list[torch.Tensor] = theirs.forward_intermediates(
        x, output_fmt="NHWC", intermediates_only=True
    )
    return maps


def assert_equal_maps(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Compare stage maps within 1e-5 of the largest value."""
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() <= 1e-5


def plain_maps(model: HieraDet, x: torch.Tensor) -> list[torch.Tensor]:
    """Compute the stage maps on grids, with windows cut out and padded at every block."""
    maps, sides = [], model.config["window_spec"]
    grid = model._config.grid_of((x.shape[2], x.shape[3]))
    x = (model.patch_embed(x) + model.get_pos_embed(grid)).unflatten(1, grid)
    for number, (spec, block) in enumerate(zip(model.block_specs, model.blocks, strict=True)):
        pools = spec.q_stride > 1
        x_norm = block.norm1(x)
        shortcut = pool_grid(block.proj(x_norm)) if pools else x
        side = sides[spec.stage - pools] if spec.use_mask_unit_attn else max(x.shape[1:3])
        bottom, right = (-size % side for size in x.shape[1:3])
        if not spec.use_mask_unit_attn:
            out = attend(block.attn, x_norm, pools)
        else:
            padded = F.pad(x_norm, (0, 0, 0, right, 0, bottom))
            rows = [
                torch.cat([attend(block.attn, w, pools) for w in row.split(side, 2)], 2)
                for row in padded.split(side, 1)
            ]
            out = torch.cat(rows, 1)[:, : shortcut.shape[1], : shortcut.shape[2]]
        x = shortcut + out
        x = x + block.mlp(block.norm2(x))
        if number in model.stage_ends:
            maps.append(x)
    return maps


def attend(attn: Any, x: torch.Tensor, pools: bool) -> torch.Tensor:
    """Attention over a whole map. [b, y, x, c] -> the same, or half as high and wide"""
    q, k, v = attn.qkv(x).chunk(3, -1)
    q = pool_grid(q) if pools else q
    grid = q.shape[1:3]
    q, k, v = (t.flatten(1, 2).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attn.proj(out).unflatten(1, grid)  # type: ignore[no-any-return]


def pool_grid(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


# Equal to other implementations -------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [NARROW, LARGE], ids=["tiny", "large"])
@torch.no_grad()
def test_stage_maps_equal_those_of_timm_and_transformers(arguments: dict[str, Any]) -> None:
    model = build(**arguments)
    timm_model, transformers_model = build_timm(model), build_transformers(model)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        maps = model(x)
        assert_equal_maps(maps, maps_of_timm(timm_model, x))
        assert_equal_maps(maps, list(transformers_model(x).intermediate_hidden_states))
        assert_equal_maps(maps, plain_maps(model, x))  # which other tests rely on


@pytest.mark.parametrize("arguments", [NARROW, LARGE], ids=["tiny", "large"])
@torch.no_grad()
def test_stage_maps_at_sizes_that_others_do_not_take(arguments: dict[str, Any]) -> None:
    model = build(**arguments)
    for size in ODD_SIZES:
        x = torch.randn(2, 3, *size)
        assert_equal_maps(model(x), plain_maps(model, x))


@pytest.mark.parametrize("size", [(224, 224), (256, 320), (250, 254)], ids=str)
def test_gradients_equal_those_of_plain_windows(size: tuple[int, int]) -> None:
    model = build()
    x = torch.randn(2, 3, *size)
    gradients = []
    for maps in (model(x), plain_maps(model, x)):
        loss = sum(m.square().mean() for m in maps)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected)


def test_gradients_equal_those_of_timm() -> None:
    model = build()
    theirs = build_timm(model)
    x = torch.randn(1, 3, 256, 256)
    sum(m.square().mean() for m in model(x)).backward()
    sum(m.square().mean() for m in maps_of_timm(theirs, x)).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])


@torch.no_grad()
def test_batches_and_checkpoints_give_the_same_maps() -> None:
    model, x = build(), torch.randn(3, 3, 256, 224)
    maps = model(x)
    for one, picture in enumerate(x):
        assert_equal_maps([m[one : one + 1] for m in maps], model(picture[None]))
    model.set_attention("eager")
    assert_equal_maps(model(x), maps)
    model.set_grad_checkpointing()
    with torch.enable_grad():
        assert_equal_maps([m.detach() for m in model(x)], maps)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU computes no bf16"
)
@torch.no_grad()
def test_maps_in_bf16_have_its_precision() -> None:
    model, x = build(), torch.randn(1, 3, 256, 224)
    maps = model(x)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert all(m.dtype is torch.bfloat16 for m in half)
    assert ((half[-1].float() - maps[-1]).abs().max() / maps[-1].abs().max()).item() < 0.05


@torch.no_grad()
def test_layer_scale_is_that_of_timm() -> None:
    import timm

    arguments: Any = {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}
    theirs = draw_weights(timm.create_model("hieradet_small", num_classes=0, **arguments)).eval()
    ours = HieraDet(**arguments, window_spec=(8, 4, 16, 8), init_values=1e-5).eval()
    state, naming = key_mapping.to_reference(theirs.state_dict())
    assert naming == "timm"
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 128, 128)
    assert_equal_maps(ours(x), maps_of_timm(theirs, x))


# Order and caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(64, 64), (63, 57), (8, 8), (9, 31)], ids=str)
@pytest.mark.parametrize("sides", [(8, 4, 14, 7), (8, 4, 16, 8), (4, 6), (5,)], ids=str)
def test_orders_hold_every_token_once(grid: tuple[int, int], sides: tuple[int, ...]) -> None:
    for stage, order in enumerate(window_order.stage_orders(grid, sides)):
        expected = tuple(size // 2**stage for size in grid)
        assert order.grid == expected and order.side == sides[stage]
        assert order.cells.sort().values.tolist() == list(range(expected[0] * expected[1]))
        assert sum(g.count * g.tokens for g in order.groups) == len(order.cells)
        nested = window_order.is_nested(sides, stage)
        assert (order.reorder is None) == (nested or stage == 0)
        tokens = order.cells.view(1, -1, 1)
        assert order.to_grid(tokens).flatten().tolist() == list(range(len(order.cells)))
        start = 0
        for group in order.groups:  # tokens of a window are in the same window of the grid
            cells = order.cells[start : start + group.count * group.tokens].view(group.count, -1)
            window = cells // expected[1] // sides[stage], cells % expected[1] // sides[stage]
            assert all(bool((index == index[:, :1]).all()) for index in window)
            start += cells.numel()


@torch.no_grad()
def test_position_embeddings_and_orders_are_kept_for_a_size() -> None:
    model, x = build(), torch.randn(1, 3, 64, 96)
    first = model(x)
    assert len(model._cache.positions) == len(model._cache.orders) == 1
    model(torch.randn(1, 3, 64, 64))
    assert len(model._cache.positions) == len(model._cache.orders) == 2
    assert_equal_maps(model(x), first)
    model.pos_embed.add_(1.0)  # new values are seen
    assert (model(x)[0] - first[0]).abs().max() > 0.1
    for side in range(32, 32 + 4 * 12, 4):
        model(torch.randn(1, 3, side, 32))
    assert len(model._cache.positions) == len(model._cache.orders) == size_cache.MAX_CACHED
    model.train()
    assert not model._cache.positions


def run_with_fake_tensors(model: HieraDet, x: torch.Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def run_functionalized(model: HieraDet, x: torch.Tensor) -> None:
    torch.func.functionalize(lambda inputs: model(inputs)[-1])(x)


@pytest.mark.parametrize("run", [run_with_fake_tensors, run_functionalized])
@torch.no_grad()
def test_no_order_of_another_kind_of_tensors_is_kept(run: Any) -> None:
    model, x = build(), torch.randn(1, 3, 64, 96)
    expected = copy.deepcopy(model)(x)
    run(model, x)
    assert not model._cache.orders
    assert_equal_maps(model(x), expected)
    run(model, x)  # a real order is kept now
    assert_equal_maps(model(x), expected)


def test_orders_are_not_kept_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, computed = size_cache.SizeCache(), iter(range(9))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert [cache.order("size", lambda: next(computed)) for _ in range(2)] == [0, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [cache.order("size", lambda: next(computed)) for _ in range(2)] == [2, 2]


def test_what_is_kept_in_inference_mode_serves_training() -> None:
    model, x = build(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)[-1].clone()
    maps = model(x)
    maps[-1].sum().backward()
    assert torch.allclose(maps[-1], expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(x)[-1], expected, atol=1e-5)


def test_tokens_are_permuted_only_where_windows_change() -> None:
    model = build()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
        with torch.profiler.profile() as profile:
            model.encode(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::index_select"] == 2  # after the patch embedding, and before stage 3
    assert "aten::pad" not in counts and "aten::constant_pad_nd" not in counts


# Sizes and arguments ------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = build()
    assert [m.shape[1:3] for m in model(torch.randn(1, 3, 29, 32))][-1] == (1, 1)
    for shape in [(1, 3, 28, 64), (1, 3, 64, 28), (1, 1, 64, 64), (3, 64, 64), (1, 3, 1, 1)]:
        with pytest.raises(UsageError, match="at least 29x29 pixels"):
            model(torch.randn(*shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"embed_dim": 10**9}, "embed_dim is"),
        ({"num_heads": 3}, "heads do not divide"),
        ({"stages": (1, 2)}, "window_spec .* does not fit 2 stages"),
        ({"stages": (1, 0, 1, 1)}, "stages is"),
        ({"stages": [10**6] * 4}, "stages is"),
        ({"window_spec": (7, 4, 14, 7)}, "windows of 7 cannot be pooled"),
        ({"window_spec": (8, 4, 14, "7")}, "window_spec is"),
        ({"global_att_blocks": (1,)}, "block 1 pools within windows"),
        ({"global_att_blocks": (99,)}, "block 99"),
        ({"global_att_blocks": 5}, "global_att_blocks is 5"),
        ({"global_pos_size": (7,)}, "global_pos_size is"),
        ({"patch_stride": (0, 4)}, "patch_stride is"),
        ({"input_size": 1024}, "input_size is 1024"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is"),
        ({"mlp_ratio": 0.01}, "no hidden channels"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is"),
        ({"init_values": "1"}, "init_values is"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HieraDet(**{**NARROW, **arguments})
    with pytest.raises(TypeError, match="window_size"):
        HieraDet(window_size=8)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", NAMES)
def test_full_size_models_have_the_parameters_of_timm_and_transformers(name: str) -> None:
    import timm
    from transformers import Sam2HieraDetModel

    with torch.device("meta"):
        model = hiera_core.create_model(name)
        theirs = timm.create_model(name)
        assert isinstance(model, HieraDet)
        other = Sam2HieraDetModel(transformers_config(model))
    ours = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for state in (theirs.state_dict(), other.state_dict()):
        renamed, _ = key_mapping.to_reference(state)
        assert {key: tensor.shape for key, tensor in renamed.items()} == ours
    assert sum(p.numel() for p in model.parameters()) == zoo.get(name).params
    assert zoo.get(name).commercial_use and theirs.window_spec == model.config["window_spec"]
    assert tuple(theirs.global_att_blocks) == model.config["global_att_blocks"]


# A backbone ---------------------------------------------------------------------------------------


def test_features_only_returns_maps_with_channels_first() -> None:
    backbone = hiera_core.FeatureBackbone(build())
    maps = backbone(torch.randn(2, 3, 96, 64))
    assert [m.shape[1:] for m in maps] == [(16, 24, 16), (32, 12, 8), (64, 6, 4), (128, 3, 2)]
    info = [(stage["num_chs"], stage["reduction"]) for stage in backbone.feature_info]
    assert info == [(16, 4), (32, 8), (64, 16), (128, 32)]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@torch.no_grad()
def test_the_model_compiles_without_graph_breaks() -> None:
    model = build(stages=(1, 1), window_spec=(8, 6), global_att_blocks=())
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = torch.randn(1, 3, 100, 92)
    assert_equal_maps(compiled(x), model(x))


# Weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[HieraDet, dict[str, Path]]:
    """Return a narrow model, and its weights in the files of other libraries."""
    from transformers import Sam2Config, Sam2Model, Sam2VisionConfig, Sam2VisionModel

    folder, model = (
        tmp_path_factory.mktemp("sam2"),
        build(stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    )
    found = {name: folder / name for name in ("ours", "det", "vision", "sam2", "meta.pt")}
    model.save_pretrained(found["ours"])
    build_transformers(model).save_pretrained(found["det"])
    backbone = {f"backbone.{k}": v for k, v in build_transformers(model).state_dict().items()}
    config = Sam2VisionConfig(
        backbone_config=transformers_config(model),
        backbone_channel_list=[128, 64, 32, 16],
        fpn_hidden_size=16,
    )
    vision = Sam2VisionModel(config)
    vision.load_state_dict(backbone, strict=False)
    vision.save_pretrained(found["vision"])
    whole = Sam2Model(Sam2Config(vision_config=config))
    whole.vision_encoder.load_state_dict(backbone, strict=False)
    whole.save_pretrained(found["sam2"])
    state = key_mapping.from_reference(model.state_dict(), "sam2")
    state["sam_mask_decoder.iou_token.weight"] = torch.ones(1, 16)
    torch.save({"model": state}, found["meta.pt"])
    return model, found


@pytest.mark.parametrize("kind", ["ours", "det", "vision", "sam2"])
def test_folders_of_all_libraries_load(kind: str, saved: tuple[HieraDet, dict[str, Path]]) -> None:
    model, folders = saved
    loaded = hiera_core.create_model(str(folders[kind]))
    assert isinstance(loaded, HieraDet) and loaded.config == model.config
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    by_class = HieraDet.from_pretrained(folders[kind])
    assert torch.equal(by_class.pos_embed, model.pos_embed)


def test_metas_files_have_the_released_names(
    saved: tuple[HieraDet, dict[str, Path]],
) -> None:
    """They hold no configuration, and the narrow model is not in the zoo."""
    model, files = saved
    checkpoint = read_checkpoint(files["meta.pt"])
    assert (checkpoint.naming, checkpoint.family) == ("sam2", "hieradet")
    assert all(torch.equal(checkpoint.state[n], t) for n, t in model.state_dict().items())
    content = torch.load(files["meta.pt"], weights_only=True)["model"]
    assert "image_encoder.trunk.blocks.0.mlp.layers.1.weight" in content
    assert "image_encoder.trunk.pos_embed_window" in content
    with pytest.raises(CheckpointError, match=r"no config.json and the shapes of no released"):
        hiera_core.create_model(str(files["meta.pt"]))


@pytest.mark.parametrize("naming", ["reference", "timm", "transformers", "sam2"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_full_size_weights_are_recognised_without_a_config(
    naming: key_mapping.Naming, prefix: str, tmp_path: Path
) -> None:
    name = "sam2_hiera_tiny"
    with torch.device("meta"):
        shapes = hiera_core.create_model(name).state_dict()
    state = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in shapes.items()}
    renamed = key_mapping.from_reference(state, naming)
    save_file({prefix + n: t for n, t in renamed.items()}, tmp_path / "m.safetensors")
    model = factory.create_encoder(None, tmp_path / "m.safetensors")
    assert model.card["model"] == name and type(model) is HieraDet
    assert model.card["preprocessing"]["crop_mode"] == "squash"
    named = hiera_core.create_model(name, checkpoint=tmp_path / "m.safetensors")
    assert named.config == model.config


def test_windows_of_other_models_are_not_guessed(tmp_path: Path) -> None:
    """timm's hieradet_small has the sizes of SAM 2's, but other windows."""
    import timm

    with torch.device("meta"):
        shapes = timm.create_model("hieradet_small").state_dict()
    state = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in shapes.items()}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="shapes of no released model"):
        hiera_core.create_model(str(tmp_path / "m.safetensors"))


def test_configurations_that_differ_are_refused(
    saved: tuple[HieraDet, dict[str, Path]], tmp_path: Path
) -> None:
    for name, value in [
        ("hidden_act", "relu"), ("query_stride", [1, 2]), ("embed_dim_per_stage", [16, 16, 16, 16]),
        ("num_query_pool_stages", 2),
    ]:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((saved[1]["det"] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        (folder / "model.safetensors").symlink_to(saved[1]["det"] / "model.safetensors")
        with pytest.raises(CheckpointError, match=name):
            hiera_core.create_model(str(folder))


def test_weights_of_the_other_family_are_refused_by_name(
    saved: tuple[HieraDet, dict[str, Path]], small_folder: Path
) -> None:
    with pytest.raises(CheckpointError, match="weights of the image encoder of SAM 2"):
        hiera_core.create_model("hiera_tiny_224", checkpoint=saved[1]["det"])
    with pytest.raises(CheckpointError, match="weights of a Hiera"):
        hiera_core.create_model("sam2_hiera_tiny", checkpoint=small_folder)
    with pytest.raises(CheckpointError, match="weights of the image encoder of SAM 2"):
        hiera_core.Hiera.from_pretrained(saved[1]["ours"])


# Commands -----------------------------------------------------------------------------------------


def test_features_of_a_picture(
    saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = str(saved[1]["det"])
    code, _, err = hiera("features", SAMPLE, "-m", folder, "-o", tmp_path / "f.safetensors")
    assert code == 0, err
    (embedding,) = load_file(tmp_path / "f.safetensors").values()
    assert embedding.shape[-1] == 128
    code, out, err = hiera(
        "features", SAMPLE, "-m", folder, "--return-intermediates", "-o", tmp_path / "maps",
        "--visualize", tmp_path / "pca", "-f", "json",
    )  # fmt: skip
    assert code == 0, err
    shapes = [stage["shape"] for stage in json.loads(out)[0]["features"].values()]
    assert shapes == [[256, 256, 16], [128, 128, 32], [64, 64, 64], [32, 32, 128]]
    assert len(list((tmp_path / "pca").iterdir())) == 1


@pytest.mark.parametrize("command", ["predict", "mae", "eval"])
def test_other_commands_say_what_it_is(
    command: str, saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    for arguments in (
        ["-m", saved[1]["det"]], ["--checkpoint", saved[1]["det"]], ["-m", "sam2_hiera_tiny"],
        ["-m", saved[1]["meta.pt"]], ["--checkpoint", saved[1]["meta.pt"]],
        ["-m", "sam2_hiera_tiny", "--random-init"],
    ):  # fmt: skip
        if command == "eval" and "--random-init" in arguments:
            continue
        data = "digits" if command == "eval" else SAMPLE
        output = ["-o", tmp_path / "out"] if command == "mae" else []
        code, _, err = hiera(command, data, *arguments, *output)
        assert code == 2, err
        assert "the image encoder of SAM 2" in err and "hiera features" in err


def test_training_does_not_take_it(
    saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    output = ["-o", tmp_path / "run"]
    for arguments in (
        ["sam2_hiera_tiny", "digits"],
        ["hiera_nano_32", "digits", "--init-from", saved[1]["det"]],
        ["hiera_nano_32", "digits", "--init-from", saved[1]["meta.pt"]],
    ):
        code, _, err = hiera("train", *arguments, *output)
        assert code in (2, 3) and "the image encoder of SAM 2" in err, err
        assert "hiera features" in err or "sam2" in err, err
    assert not (tmp_path / "run").exists()


def test_models_lists_licences_and_filters_by_them(hiera: Command) -> None:
    code, out, _ = hiera("models", "-f", "json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["sam2_hiera_tiny"]["licence"] == "Apache-2.0"
    assert rows["sam2_hiera_tiny"]["checkpoints"] == ["sam2.1", "sam2"]
    assert rows["sam2_hiera_tiny"]["commercial_use"] is True
    assert rows["hiera_base_224"]["commercial_use"] is False
    _, out, _ = hiera("models", "--free", "-f", "json")
    free = [row["name"] for row in json.loads(out)]
    assert free == [name for name, row in rows.items() if row["commercial_use"]]
    assert {*NAMES, "hiera_small_abswin_256", "hiera_nano_32"} <= set(free)
    _, out, _ = hiera("models", "sam2", "--free", "-f", "csv")
    assert out.count("sam2_hiera") >= 4 and "Apache-2.0,yes" in out


# Conversion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hub", "timm", "transformers"])
@torch.no_grad()
def test_conversions_come_back_bit_for_bit(
    to: str, saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    """Every library loads the converted folder, and returns our maps."""
    import timm
    from transformers import Sam2HieraDetModel

    model, folders = saved
    dest = tmp_path / to
    code, out, err = hiera(
        "convert", folders["sam2"], dest, "--to", to, "--size", "128", "--verify", "forward"
    )
    assert code == 0, err
    proof, x = json.loads(out)["proof"], torch.randn(1, 3, 128, 96)
    assert proof["max_difference"] < 1e-4 and proof["what"] == "embeddings"
    if to == "timm":
        theirs = timm.create_model(f"local-dir:{dest}", pretrained=True).eval()
        assert_equal_maps(model(x), maps_of_timm(theirs, x))
    if to == "transformers":
        other = Sam2HieraDetModel.from_pretrained(dest).eval()
        assert_equal_maps(model(x), list(other(x).intermediate_hidden_states))
    back = hiera_core.create_model(str(dest))
    assert back.config == {**model.config, "input_size": (128, 128)}
    transform = hiera_core.transform_for(back)
    assert isinstance(transform, ImageTransform)
    assert (transform.size, transform.crop_mode) == ((128, 128), "squash")
    assert all(torch.equal(back.state_dict()[n], t) for n, t in model.state_dict().items())


def test_pth_has_no_place_for_it(
    saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    code, _, err = hiera("convert", saved[1]["ours"], tmp_path / "m.pth", "--to", "pth")
    assert code == 2 and "SAM 2's image encoder" in err and "hub, sam2, timm" in err
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_file_of_meta_comes_back_bit_for_bit(
    saved: tuple[HieraDet, dict[str, Path]], hiera: Command, tmp_path: Path
) -> None:
    """The encoder goes to Meta's names and back, and on to timm and transformers."""
    import timm
    from timm.models import hieradet_sam2
    from transformers import Sam2HieraDetModel

    model, folders = saved
    meta = tmp_path / "sam2_hiera.pt"
    code, out, err = hiera("convert", folders["ours"], meta, "--to", "sam2")
    assert code == 0, err
    assert json.loads(out)["proof"]["tensors"] == len(model.state_dict())
    state = torch.load(meta, weights_only=True)["model"]
    names = {name.removeprefix("image_encoder.trunk.") for name in state}
    renamed = {n.replace("mlp.layers.0.", "mlp.fc1.").replace("mlp.layers.1.", "mlp.fc2.")
               for n in names}  # fmt: skip
    assert all(name.startswith("image_encoder.trunk.") for name in state)
    assert renamed == {*model.state_dict()} and len(names - renamed) == 4 * len(model.blocks)
    filtered = hieradet_sam2.checkpoint_filter_fn(
        torch.load(meta, weights_only=True), theirs := build_timm(model), "image_encoder.trunk."
    )
    missing, unexpected = theirs.load_state_dict(filtered, strict=False)  # as timm reads the file
    assert not unexpected and all(name.startswith("head.") for name in missing)
    code, _, err = hiera("convert", meta, tmp_path / "back", "--to", "hub")
    assert code == 0, err
    back = hiera_core.HieraDet.from_pretrained(tmp_path / "back")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[n], t) for n, t in model.state_dict().items())
    x = torch.randn(1, 3, 128, 96)
    for to in ("timm", "transformers"):
        code, _, err = hiera("convert", meta, tmp_path / to, "--to", to)
        assert code == 0, err
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_equal_maps(model(x), maps_of_timm(theirs, x))
    other = Sam2HieraDetModel.from_pretrained(tmp_path / "transformers").eval()
    assert_equal_maps(model(x), list(other(x).intermediate_hidden_states))


def test_other_models_are_not_written_as_sam2(hiera: Command, tmp_path: Path) -> None:
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "m.pt", "--to", "sam2")
    assert code == 2 and "sam2 is for SAM 2's image encoder" in err


def test_whole_images_are_squashed_to_the_input_size() -> None:
    from PIL import Image

    transform = hiera_core.transform_for(hiera_core.create_model("sam2_hiera_tiny", **NARROW))
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 150, 100))
    pixels = transform.crop(image)
    assert pixels.shape == (1024, 1024, 3)
    assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[-1, -1].tolist() == [255, 0, 0]
