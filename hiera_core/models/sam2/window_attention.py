"""Attention weights of a block of SAM 2's encoder, in the order of the grid.

Letters in shape comments: b batch, w windows, h heads, q queries, k keys, d channels of a head.
"""

from __future__ import annotations

import torch

from .hieradet import HieraDet, HieraDetBlock, pool_window, zero_keys_values
from .window_order import StageOrder, WindowGroup, pooled_order


def attention_grids(
    model: HieraDet, index: int, grid: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the grids of the queries and keys of a block.

    Args:
        model: The encoder.
        index: Number of the block, counted from 0.
        grid: Rows and columns of tokens after the patch embedding.
    """
    spec = model.block_specs[index]
    pools = (spec.stage, spec.stage - (spec.q_stride > 1))
    query_grid, key_grid = ((grid[0] >> n, grid[1] >> n) for n in pools)
    return query_grid, key_grid


def attention_weights(
    model: HieraDet, index: int, x: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention weights of a block, and the share of them that padded tokens take.

    Args:
        model: The encoder, in evaluation mode.
        index: Number of the block, counted from 0.
        x: Images [b, chans, y, x], normalised.
        grid: Rows and columns of tokens after the patch embedding.

    Returns:
        Weights [b, h, q, k] over the real tokens, and the share of padded tokens [b, h, q], both in
        row-major order of the grid. Their sum over k is 1.
    """
    spec, block = model.block_specs[index], model.blocks[index]
    assert isinstance(block, HieraDetBlock)
    orders = model.stage_orders(grid, x.device)
    keys = orders[spec.stage - (spec.q_stride > 1)]
    queries = pooled_order(keys) if spec.q_stride > 1 else keys
    groups, whole = keys.groups, keys.side**2
    if not spec.use_mask_unit_attn:  # one window that holds all tokens
        groups, whole = (WindowGroup(1, *keys.grid),), keys.cells.numel()
    parts = _weights_of_groups(block, _input_of(model, block, x), groups, whole)
    return _on_grid(parts, groups, queries, keys, pools=spec.q_stride > 1)


def _on_grid(
    parts: list[torch.Tensor],
    groups: tuple[WindowGroup, ...],
    queries: StageOrder,
    keys: StageOrder,
    pools: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Place the weights of groups of windows, [b, w, h, q, k] each, in the order of the grid."""
    batch, _, heads = parts[0].shape[:3]
    counts = queries.cells.numel(), keys.cells.numel()
    full = parts[0].new_zeros(batch, heads, *counts)
    padding = full.new_zeros(batch, heads, counts[0])
    query_start = key_start = 0
    for group, weights in zip(groups, parts, strict=True):
        seen = group.pooled() if pools else group
        query_cells = queries.cells[query_start:][: seen.count * seen.tokens].view(seen.count, -1)
        key_cells = keys.cells[key_start:][: group.count * group.tokens].view(group.count, -1)
        query_start, key_start = query_start + query_cells.numel(), key_start + key_cells.numel()
        if not seen.tokens:  # the pool loses all rows or columns of these windows
            continue
        weights = weights.transpose(1, 2)  # b h w q k
        real, padded = weights.split([group.tokens, weights.shape[-1] - group.tokens], -1)
        full[:, :, query_cells[:, :, None], key_cells[:, None]] = real
        padding[:, :, query_cells] = padded.sum(-1)
    return full, padding


def _weights_of_groups(
    block: HieraDetBlock, tokens: torch.Tensor, groups: tuple[WindowGroup, ...], whole: int
) -> list[torch.Tensor]:
    """Return the weights of each group of windows, with those of padded tokens last. float32

    b (w k) c -> list of b w h q whole
    """
    attn, batch = block.attn, len(tokens)
    zero_key, _ = zero_keys_values(attn, tokens, tokens.dtype)
    found = []
    for part, group in zip(
        attn.qkv(tokens).split([g.count * g.tokens for g in groups], 1), groups, strict=True
    ):
        # b (w k) c -> b w k 3 h d -> 3 b w h k d
        part = part.reshape(batch, group.count, group.tokens, 3, attn.heads, attn.head_dim)
        q, k, _ = part.permute(3, 0, 1, 4, 2, 5).unbind(0)
        q = pool_window(q, group, 3) if attn.q_stride > 1 else q
        missing = zero_key.expand(*k.shape[:3], whole - group.tokens, attn.head_dim)
        k = torch.cat([k, missing], 3)
        scores = (q.float() * attn.scale) @ k.float().transpose(-2, -1)
        found.append(scores.softmax(-1))
    return found


def _input_of(model: HieraDet, block: HieraDetBlock, x: torch.Tensor) -> torch.Tensor:
    """Run the encoder, and return what the attention of a block gets, [b, n, c]."""
    seen: list[torch.Tensor] = []
    hook = block.norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        model.encode(x.to(next(model.parameters()).dtype))
    finally:
        hook.remove()
    return seen[0]
