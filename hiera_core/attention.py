"""Mask-unit and global attention: one code path over windows of tokens.

Letters in shape comments: b batch, w windows (1 for global attention), t tokens of a window,
s pooled stride, h heads, d channels of a head, c channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import HAS_ONEDNN, Linear

Implementation = Literal["fused", "eager"]

# CUDA's fused kernels put the batch on a grid axis that ends here, and windows are folded into the
# batch: 1,338 images or 168 clips reach it.
MAX_FUSED_BATCH = 65_535
# Of the attention matrix that is held at a time on a CPU: what fits the cache of a core.
SCORE_BYTES = 1 << 20
# Of one that is kept for the backward pass; above, the fused kernel computes it anew. Also of one
# that a compiled program holds whole: its softmax is quick, and every call costs.
KEPT_SCORE_BYTES = 64 << 20


class MaskUnitAttention(nn.Module):
    """Multi-head attention within mask units or over all tokens, with optional query pooling.

    Tokens come in window-major order (see tokens.py), so both kinds are plain attention over
    4-D tensors, which every fused kernel accepts.

    Args:
        dim, dim_out: channels in and out.
        heads: attention heads; each has dim_out // heads channels.
        q_stride: queries pooled by this flat stride (4 for 2x2); 1 for none.
        window_size: tokens of a mask unit after pooling.
        use_mask_unit_attn: attend within mask units; otherwise over all tokens.
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
        self.qkv = Linear(dim, 3 * dim_out)
        self.proj = Linear(dim_out, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, tokens, dim] -> [b, tokens / q_stride, dim_out], both window-major."""
        batch, tokens, _ = x.shape
        seen = self.q_stride * self.window_size if self.use_mask_unit_attn else tokens
        # b (w t) c -> (b w) t 3 h d -> 3 (b w) h t d
        qkv = self.qkv(x).view(-1, seen, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.q_stride > 1:
            q = self._pool_queries(q)
        attend = fused_attention if self.implementation == "fused" else eager_attention
        x = attend(q, k, v, self.scale)
        # (b w) h t d -> b (w t) (h d)
        x = x.transpose(1, 2).reshape(batch, -1, self.dim_out)
        return self.proj(x)

    def _pool_queries(self, q: torch.Tensor) -> torch.Tensor:
        """(b w) h (v s t) d -> (b w) h (v t) d: v windows lie inside one global window."""
        windows, heads, tokens, width = q.shape
        size = self.window_size or tokens // self.q_stride
        return q.reshape(windows, heads, -1, self.q_stride, size, width).amax(3).flatten(2, 3)


def pool_tokens(x: torch.Tensor, stride: int, window_size: int) -> torch.Tensor:
    """Max-pool window-major tokens by a flat stride. b (w s t) c -> b (w t) c, t = window_size.

    `amax` shares the gradient among equal values, where the reference's `max` gives it to one.
    """
    batch, tokens, channels = x.shape
    size = window_size or tokens // stride  # 0: windows have been joined into one
    return x.view(batch, -1, stride, size, channels).amax(2).view(batch, -1, channels)


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, limit: int = MAX_FUSED_BATCH
) -> torch.Tensor:
    """No attention matrix in memory. All [(b w), h, t, d]; in parts above `limit`."""
    exported = torch.compiler.is_exporting()  # for any device, and any batch: no sizes are asked
    if q.dtype is torch.bfloat16 and q.is_cpu and HAS_ONEDNN and not exported:
        score_bytes = q[..., 0].numel() * k.shape[2] * q.element_size()
        few, grad = score_bytes <= KEPT_SCORE_BYTES, torch.is_grad_enabled()
        if few and not grad and torch.compiler.is_compiling():
            return eager_attention(q, k, v, scale)
        if few or not grad:
            return attention_by_products(q, k, v, scale)
    if q.shape[0] <= limit:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    parts = zip(q.split(limit), k.split(limit), v.split(limit), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale) for part in parts])


def attention_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Batched products, a few heads or rows at a time: [(b w), h, t, d], in bf16 on a CPU.

    There PyTorch's fused kernel computes in fp32, at 0.3 to 0.7 of the speed of oneDNN's products.
    """
    windows, heads, queries, width = q.shape
    q, k, v = (x.reshape(windows * heads, -1, width) for x in (q, k, v))
    if torch.is_grad_enabled():
        out = _scores(q, k, scale).softmax(-1) @ v
    else:
        rows = max(1, SCORE_BYTES // (k.shape[1] * k.element_size()))
        step = max(1, rows // queries)
        parts = zip(q.split(step), k.split(step), v.split(step), strict=True)
        tiles = [
            torch.cat([_precise_softmax(tile, y, scale) @ z for tile in x.split(rows, 1)], 1)
            for x, y, z in parts
        ]
        out = torch.cat(tiles)
    return out.view(windows, heads, queries, width)


def _precise_softmax(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Of scores with the digits that rounding to bf16 cuts off: a second product, which sums in
    fp32, finds the difference. A fourth of the error, the fused kernel's nearly."""
    scores = _scores(q, k, scale)
    rest = torch.baddbmm(scores, q, k.transpose(1, 2), beta=-1, alpha=scale)
    return scores.float().add_(rest).softmax(-1).to(q.dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """n t d, n u d -> n t u"""
    nothing = q.new_empty(1, 1, 1)  # with beta = 0 it is not read
    return torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=scale)


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same by explicit softmax, as the paper's speeds were measured."""
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
