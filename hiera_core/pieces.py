"""Windows in pieces that fit a CPU's cache.

Blocks that attend within windows may see any number of them at a time. On a CPU, all windows of a
batch at once leave the cache between any two layers, and buffers above 32 MB come fresh from the
system each time, page by page: a tenth of the time of a Hiera-B in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .kernels import is_watched, takes_onednn

# Of the MLP's hidden layer, the largest buffer. From 2 to 10 MB made no difference, measured with
# 1 MB of second-level cache a core and 32 MB of third.
PIECE_BYTES = 4 << 20
MLP_RATIO = 4


def piece_tokens(blocks: Sequence[Any], x: torch.Tensor) -> int | None:
    """How many tokens of [b, (w t), c] go through windowed blocks at a time; None for all at once:
    on other devices, for gradients, for fewer tokens, or where a hook would see the pieces."""
    first = blocks[0]
    if torch.is_grad_enabled() or first.training or not takes_onednn(x):
        return None
    window = first.attn.q_stride * first.attn.window_size
    if not window:  # a pool has joined the windows
        return None
    row_bytes = MLP_RATIO * first.dim_out * x.element_size()
    tokens = max(1, PIECE_BYTES // (row_bytes * window)) * window
    if tokens >= x.shape[0] * x.shape[1]:
        return None
    return None if any(is_watched(m) for block in blocks for m in block.modules()) else tokens


def run_in_pieces(blocks: Sequence[nn.Module], x: torch.Tensor, tokens: int) -> torch.Tensor:
    """b (w t) c -> b (w t') c', the pieces one after another through all the blocks."""
    done = []
    for piece in x.reshape(1, -1, x.shape[-1]).split(tokens, 1):
        for block in blocks:
            piece = block(piece)
        done.append(piece)
    return torch.cat(done, 1).view(x.shape[0], -1, done[0].shape[-1])
