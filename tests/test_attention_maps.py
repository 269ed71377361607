"""Attention weights in grid order compute what the layer computes."""

from __future__ import annotations

import pytest
import torch

import hiera_core
from hiera_core.errors import UsageError

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
