"""Mask-unit and global attention: one code path over windows of tokens.

Letters in shape comments: b batch, w windows (1 for global attention), t tokens of a window,
s pooled stride, h heads, d channels of a head, c channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from . import cpu
from .probes import known_forward

Implementation = Literal["fused", "eager"]

# CUDA's fused kernels put the batch on a grid axis of at most this size. Windows are folded into
# the batch, so 1,338 images or 168 clips exceed the limit.
MAX_FUSED_BATCH = 65_535


@known_forward
class MaskUnitAttention(nn.Module):
    """Multi-head attention within mask units or over all tokens, with optional query pooling.

    Tokens come in window-major order (see token_layout.py), so both kinds are plain attention over
    4-D tensors, which every fused kernel accepts.

    Args:
        dim, dim_out: Channels in and out.
        heads: Number of attention heads; each has dim_out // heads channels.
        q_stride: Number of queries that are pooled into one (4 for a stride of 2x2); 1 for none.
        window_size: Number of tokens in a mask unit after pooling.
        use_mask_unit_attn: Attend within mask units; otherwise over all tokens.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.dim_out, self.heads = dim, dim_out, heads
        self.head_dim = dim_out // heads
        self.scale = self.head_dim**-0.5
        self.q_stride, self.window_size = q_stride, window_size
        self.use_mask_unit_attn = use_mask_unit_attn
        self.implementation: Implementation = "fused"
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, tokens, dim] -> [b, tokens / q_stride, dim_out], both window-major."""
        attend = fused_attention if self.implementation == "fused" else eager_attention
        out = attend(*self.queries_keys_values(x), self.scale)
        # (b w) h t d -> b (w t) (h d)
        out = out.transpose(1, 2).reshape(x.shape[0], -1, self.dim_out)
        return cpu.linear(self.proj, out)

    def queries_keys_values(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[b, tokens, dim] -> three of [(b w), h, t, d]; the queries are pooled."""
        window = self.q_stride * self.window_size if self.use_mask_unit_attn else x.shape[1]
        # b (w t) c -> (b w) t 3 h d -> 3 (b w) h t d
        qkv = cpu.linear(self.qkv, x).view(-1, window, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (self._pool_queries(q) if self.q_stride > 1 else q), k, v

    def _pool_queries(self, q: torch.Tensor) -> torch.Tensor:
        """(b w) h (v s t) d -> (b w) h (v t) d, where a global window holds v mask units."""
        windows, heads, tokens, width = q.shape
        size = self.window_size or tokens // self.q_stride
        return q.reshape(windows, heads, -1, self.q_stride, size, width).amax(3).flatten(2, 3)


def pool_tokens(x: torch.Tensor, stride: int, window_size: int) -> torch.Tensor:
    """Max-pool window-major tokens by a stride. b (w s t) c -> b (w t) c, t = window_size.

    `amax` shares the gradient among tied maxima; the reference's `max` gives it to one of them.
    """
    batch, _, channels = x.shape
    return _by_pool(x, stride, window_size).amax(2).view(batch, -1, channels)


def pool_both(x: torch.Tensor, stride: int, window_size: int) -> torch.Tensor:
    """Concatenate the maximum and the mean of each pool. b (w s t) c -> b (w t) 2c"""
    batch, _, channels = x.shape
    pools = _by_pool(x, stride, window_size)
    return torch.cat([pools.amax(2), pools.mean(2)], -1).view(batch, -1, 2 * channels)


def _by_pool(x: torch.Tensor, stride: int, window_size: int) -> torch.Tensor:
    """b (w s t) c -> b w s t c"""
    batch, tokens, channels = x.shape
    size = window_size or tokens // stride  # 0: pooling has merged the windows into one
    return x.view(batch, -1, stride, size, channels)


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, limit: int = MAX_FUSED_BATCH
) -> torch.Tensor:
    """Return attention by a fused kernel, or by `cpu.attention` where that is faster.

    All tensors are [(b w), h, t, d]. A batch larger than `limit` is computed in parts.
    """
    out = cpu.attention(q, k, v, scale)
    if out is not None:
        return out
    if q.shape[0] <= limit:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    parts = zip(q.split(limit), k.split(limit), v.split(limit), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale) for part in parts])


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the same with an explicit softmax. The paper measured its speeds in this form."""
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
