"""Attention weights in grid order compute what the layer computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hiera_core
from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.models.sam2 import window_order

from .conftest import SMALL, assert_close, draw_weights


@pytest.mark.parametrize("name", ["hiera_nano_32", "hiera_nano_8x32", "small"])
def test_weights_times_values_are_the_output_of_every_block(name: str) -> None:
    if name == "small":
        model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    else:
        model = hiera_core.create_model(name, pretrained=True).eval()
    x = torch.randn(2, 3, *model.config["input_size"], generator=torch.Generator().manual_seed(0))
    kinds = set()
    for number, block in enumerate(model.blocks, start=1):
        maps = hiera_core.attention_maps(model, x, number)
        seen: list[torch.Tensor] = []
        hook = block.attn.register_forward_hook(
            lambda module, args, out, seen=seen: seen.extend((args[0], out))
        )
        with torch.no_grad():
            model(x)
        hook.remove()
        tokens, output = seen
        attention, spec = block.attn, model.block_specs[number - 1]
        pools = min(spec.stage, model.q_pool)
        key_pools = pools - (attention.q_stride > 1)
        values = attention.qkv(tokens).unflatten(-1, (3, attention.heads, -1))[:, :, 2]
        values = model.layout.to_grid(values.flatten(2), key_pools).flatten(1, -2)
        values = values.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # b h k d
        expected = attention.proj((maps.weights @ values).transpose(1, 2).flatten(2))
        assert_close(model.layout.to_grid(output, pools).flatten(1, -2), expected)
        assert_close(maps.weights.sum(-1), torch.ones(maps.weights.shape[:-1]))
        kinds.add((attention.use_mask_unit_attn, attention.q_stride > 1))
        if attention.use_mask_unit_attn:
            assert (maps.weights == 0).any()
    assert len(kinds) >= 3  # windowed and global blocks, with and without pooling


def test_blocks_are_counted_from_1_and_from_the_end() -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    x = torch.zeros(1, 3, 64, 64)
    last = hiera_core.attention_maps(model, x)
    assert torch.equal(last.weights, hiera_core.attention_maps(model, x, 5).weights)
    for block in (0, 6, -6):
        with pytest.raises(UsageError, match="choose among 1 to 5"):
            hiera_core.attention_maps(model, x, block)


def test_maps_of_a_model_in_training_are_those_of_its_evaluation() -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL, drop_path_rate=0.9)).eval()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = hiera_core.attention_maps(model, x).weights
    model.train()
    model.blocks[0].eval()  # parts may have modes of their own
    modes = [module.training for module in model.modules()]
    assert torch.equal(hiera_core.attention_maps(model, x).weights, expected)
    assert [module.training for module in model.modules()] == modes


# SAM 2's encoder ----------------------------------------------------------------------------------


def build_sam2() -> hiera_core.HieraDet:
    model = hiera_core.HieraDet(
        embed_dim=16, num_heads=2, stages=(1, 2, 3, 2), global_att_blocks=(4,), input_size=(64, 96)
    )
    return draw_weights(model).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(224, 224), (100, 132), (64, 256)], ids=str)
@torch.no_grad()
def test_weights_times_values_are_the_output_of_every_block_of_sam2(
    size: tuple[int, int],
) -> None:
    """The values of padded tokens are the bias. Together with them, all weights add up to 1."""
    model = build_sam2()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    is_padded = {}
    for number, block in enumerate(model.blocks, start=1):
        maps = hiera_core.attention_maps(model, x, number)
        assert maps.padding is not None
        seen: list[torch.Tensor] = []
        hooks = [
            block.norm1.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out)),
            block.ls1.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out)),
        ]
        model(x)
        for hook in hooks:
            hook.remove()
        tokens, output = seen
        attention, spec = block.attn, model.block_specs[number - 1]
        pools = spec.q_stride > 1
        orders = model.stage_orders(model._config.grid_of(size))
        keys = orders[spec.stage - pools]
        queries = window_order.pooled_order(keys) if pools else keys
        assert (maps.query_grid, maps.key_grid) == (queries.grid, keys.grid)
        values = attention.qkv(keys.to_grid(tokens).flatten(1, 2))
        values = values.unflatten(-1, (3, attention.heads, -1))[:, :, 2].transpose(1, 2)
        padded = attention.qkv.bias.view(3, attention.heads, 1, -1)[2]  # h 1 d
        mixed = maps.weights @ values + maps.padding[..., None] * padded
        expected = attention.proj(mixed.transpose(1, 2).flatten(2))
        assert_close(queries.to_grid(output).flatten(1, 2), expected)
        total = maps.weights.sum(-1) + maps.padding
        assert_close(total, torch.ones_like(total))
        is_padded[number] = bool((maps.padding > 0).any())
    assert not is_padded[5]  # the global block
    assert any(is_padded.values()) == (size != (224, 224))


def test_maps_of_sam2_need_a_block_that_fits_the_memory() -> None:
    model = build_sam2()
    with pytest.raises(UsageError, match="choose a later block"):
        hiera_core.attention_maps(model, torch.zeros(1, 3, 1024, 1024), 1)
    with pytest.raises(UsageError, match="at least 29x29"):
        hiera_core.attention_maps(model, torch.zeros(1, 3, 16, 16), 1)


def test_the_command_draws_maps_of_sam2(
    hiera: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "det"
    build_sam2().save_pretrained(folder)
    picture = zoo.ASSETS / "samples" / "cat.jpg"
    code, _, err = hiera(
        "features", picture, "-m", folder, "--attention", "5", "--visualize", tmp_path / "a.png",
        "-o", tmp_path / "f.safetensors", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0, err
    shapes = sorted(tuple(t.shape) for t in load_file(tmp_path / "f.safetensors").values())
    assert (1, 8, 24, 24) in shapes and (tmp_path / "a.png").stat().st_size > 1000
