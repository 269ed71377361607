"""Attention on a CPU by batched matrix products, where PyTorch's fused kernel is slower.

Letters in shape comments: n windows and heads, t queries, u keys, d channels of a head.
"""

from __future__ import annotations

import torch

from ...device import HAS_AMX, HAS_AVX512_BF16, IS_INTEL

# Size, in bytes, of the part of the attention matrix that is computed at a time. It fits the cache
# of a core.
SCORE_BYTES = 1 << 20
# Windows with at most this many keys. PyTorch's fused kernel handles one window and head after the
# other, in blocks that are larger than such a window. On a Zen 3 with 2 threads, it takes 2 to 4
# times as long for 16 keys, 1.2 times for 64, and 0.93 times for 196.
SMALL_WINDOW = 64


def fused_kernel_is_faster(dtype: torch.dtype, keys: int, needs_grad: bool) -> bool:
    """Return whether PyTorch's fused kernel is faster than batched products on this processor.

    The kernel multiplies with MKL, and in bf16 with AMX where the processor has it. MKL is slow on
    AMD processors, most of all for small windows. There, products in bf16 are computed in fp32, at
    0.3 to 0.7 of the speed of oneDNN's. Measured with 2 threads on a Zen 3, a Zen 5 and an Intel
    Xeon with AMX. On the Xeon, the kernel takes 0.35 to 0.95 of the time of the products in fp32,
    and 0.08 to 0.6 of it in bf16; but for its backward pass 0.9 to 1.2, and 2 to 4 times as long.
    On a Xeon with AVX512-BF16 but without AMX, Hiera-B in bf16 takes 0.9 of its time with it.

    A compiler fuses the softmax of the products with what surrounds it, so in a compiled program in
    bf16, small windows take 0.7 of the kernel's time with AMX.

    Args:
        dtype: fp32 or bf16.
        keys: Number of keys in a window.
        needs_grad: Whether the scores may be needed for the backward pass.
    """
    if dtype is not torch.float32:
        if HAS_AMX:
            is_small = torch.compiler.is_compiling() and keys <= SMALL_WINDOW
            return not needs_grad and not is_small
        return HAS_AVX512_BF16 and IS_INTEL and not needs_grad
    return keys > SMALL_WINDOW or (IS_INTEL and not needs_grad)


def matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return attention by batched products, a few heads or rows at a time. [(b w), h, t, d]"""
    windows, heads, queries, width = q.shape
    q, k, v = (x.reshape(windows * heads, -1, width) for x in (q, k, v))
    if torch.is_grad_enabled():
        out = _scores(q, k, scale).softmax(-1) @ v
    else:
        softmax = _softmax if q.dtype is torch.float32 else _precise_softmax
        rows = max(1, SCORE_BYTES // (k.shape[1] * k.element_size()))
        step = max(1, rows // queries)
        parts = zip(q.split(step), k.split(step), v.split(step), strict=True)
        tiles = [
            torch.cat([softmax(tile, y, scale) @ z for tile in x.split(rows, 1)], 1)
            if queries > rows
            else softmax(x, y, scale) @ z
            for x, y, z in parts
        ]
        out = torch.cat(tiles) if len(tiles) > 1 else tiles[0]
    return out.view(windows, heads, queries, width)


def _softmax(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """n t d, n u d -> n t u"""
    return _scores(q, k, scale).softmax(-1)


def _precise_softmax(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the softmax of scores that are more precise than bf16.

    A second product, which sums in fp32, finds the rounding error of the first. This leaves a
    quarter of the error, almost as little as the fused kernel. n t d, n u d -> n t u
    """
    scores = _scores(q, k, scale)
    rest = torch.baddbmm(scores, q, k.transpose(1, 2), beta=-1, alpha=scale)
    return scores.float().add_(rest).softmax(-1).to(q.dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """n t d, n u d -> n t u"""
    unused = q.new_empty(1, 1, 1)  # with beta=0 it is not read
    return torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=scale)
