"""Attention weights of a block, in the order of the grid."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import UsageError, check_type, is_whole
from .attention import MaskUnitAttention
from .encoder import Encoder, unwrap_model
from .hiera import HieraEncoder
from .sam2 import window_attention
from .sam2.hieradet import HieraDet
from .token_layout import TokenLayout

MAX_BYTES = 2 << 30  # largest attention matrix


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of a block.

    Attributes:
        weights: [b, heads, queries, keys] in row-major grid order. The weights of a query add up to
            1. In a block that attends within windows, they are 0 outside the query's window.
        query_grid, key_grid: Grids of the queries and keys, e.g. (14, 14) and (28, 28) in a block
            that pools.
        padding: [b, heads, queries], of SAM 2's encoder alone: the share of each query's attention
            that goes to padded tokens, where windows do not fit the grid. There, the weights of a
            query and this share add up to 1. It is 0 where nothing is padded.
    """

    weights: torch.Tensor
    query_grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    padding: torch.Tensor | None = None


@torch.no_grad()
def attention_maps(model: torch.nn.Module, x: torch.Tensor, block: int = -1) -> AttentionMaps:
    """Return the attention weights of a block, in evaluation mode.

    >>> hiera_core.attention_maps(model, x, block=24).weights.mean((1, 2))  # seen from everywhere

    Args:
        model: A Hiera, or SAM 2's encoder; it may be compiled, or wrapped by DDP or PEFT.
        x: [b, chans, *size], normalised as in the model's preprocessing.
        block: Number of the block, counted from 1; or from the end, if it is negative.

    Raises:
        UsageError: There is no such block, the input does not fit the model, or the weights would
            need more than 2 GiB.
    """
    encoder = unwrap_model(model)
    check_type("x", x, torch.Tensor, "a tensor: x = model.transform(image)")
    check_type("the model", encoder, Encoder, "a Hiera, or SAM 2's encoder")
    assert isinstance(encoder, HieraEncoder | HieraDet)
    index = _index(block, len(encoder.blocks))
    query_grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    if isinstance(encoder, HieraDet):
        grid = encoder.check_input(x)
        query_grid, key_grid = window_attention.attention_grids(encoder, index, grid)
    else:
        query_grid, key_grid = _grids_of(encoder, index, encoder.layout_of(x))
    queries, keys = math.prod(query_grid), math.prod(key_grid)
    heads = _attention_of(encoder, index).heads
    if 4 * len(x) * heads * queries * keys > MAX_BYTES:
        raise UsageError(
            f"the attention of block {index + 1} has {queries} x {keys} weights for each of its "
            f"{heads} heads, more than 2 GiB in all",
            "choose a later block, or fewer inputs at a time",
        )
    with _evaluation_mode(encoder):
        if isinstance(encoder, HieraDet):
            weights, padding = window_attention.attention_weights(encoder, index, x, grid)
            return AttentionMaps(weights, query_grid, key_grid, padding)
        return AttentionMaps(_on_grid(encoder, index, x), query_grid, key_grid)


def attention_grids(model: Encoder, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the grids of a block's queries and keys, for inputs of the model's own size; see
    `AttentionMaps`.

    Raises:
        UsageError: There is no such block.
    """
    index = _index(block, len(model.blocks))
    if isinstance(model, HieraDet):
        height, width = model._config.input_size
        grid = model._config.grid_of((height, width))
        return window_attention.attention_grids(model, index, grid)
    assert isinstance(model, HieraEncoder)
    return _grids_of(model, index, model.layout)


def _grids_of(
    model: HieraEncoder, index: int, layout: TokenLayout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pools, key_pools = _pools(model, index)
    return layout.grid_after(pools), layout.grid_after(key_pools)


def _on_grid(encoder: HieraEncoder, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the attention weights of a block of a Hiera. -> b h q k"""
    attention, layout = _attention_of(encoder, index), encoder.layout_of(x)
    pools, key_pools = _pools(encoder, index)
    queries, keys = (math.prod(layout.grid_after(count)) for count in (pools, key_pools))
    weights = _weights(attention, _input_of(encoder, attention, x))
    weights = weights.unflatten(0, (len(x), -1)).transpose(1, 2)  # b h w q k
    # With one global window, all tokens are in it, window by window.
    shape = (weights.shape[2], -1)
    query_cells = layout.cell_of_token(pools, x.device).reshape(*shape, 1)
    key_cells = layout.cell_of_token(key_pools, x.device).reshape(shape[0], 1, -1)
    full = weights.new_zeros(len(x), attention.heads, queries, keys)
    full[:, :, query_cells, key_cells] = weights
    return full


def _pools(model: HieraEncoder, index: int) -> tuple[int, int]:
    """Return how many pools a block's queries and keys have been through."""
    pools = min(model.block_specs[index].stage, model.q_pool)
    return pools, pools - (_attention_of(model, index).q_stride > 1)


def _attention_of(model: Encoder, index: int) -> MaskUnitAttention:
    attention = model.blocks[index].attn
    assert isinstance(attention, MaskUnitAttention)
    return attention


def _index(block: int, count: int) -> int:
    if not is_whole(block) or block == 0 or not -count <= block <= count:
        raise UsageError(f"there is no block {block!r:.60}", f"choose among 1 to {count}")
    return block - 1 if block > 0 else count + block


@contextlib.contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch off what is random in training, such as stochastic depth, within the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _input_of(encoder: HieraEncoder, attention: MaskUnitAttention, x: torch.Tensor) -> torch.Tensor:
    """Run the encoder, and return what its attention layer gets."""
    seen: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        encoder.encode(x.to(next(encoder.parameters()).dtype))
    finally:
        hook.remove()
    return seen[0]


def _weights(attention: MaskUnitAttention, tokens: torch.Tensor) -> torch.Tensor:
    """[b, (w t), c] -> [(b w), h, queries, keys], float32"""
    q, k, _ = attention.queries_keys_values(tokens)
    return ((q.float() * attention.scale) @ k.float().transpose(-2, -1)).softmax(-1)
