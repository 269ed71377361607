"""Resample position embeddings to another input size, and compute absolute-window embeddings.

The learned embedding of a windowed transformer holds a pattern that repeats in every window. Plain
interpolation stretches this pattern, so that it no longer lines up with the windows. Therefore the
embedding is split: the pattern of a window is tiled as it is, and only the rest is interpolated
(Bolya et al. 2023, "Window Attention is Bugged", arXiv 2311.05613).

Letters in shape comments: n tokens in grid order, c channels.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..errors import ConfigError, UsageError
from .config import HieraConfig

log = logging.getLogger("hiera")

ResampleRule = Literal["absolute-window", "bicubic"]
RESAMPLE_RULES: tuple[ResampleRule, ...] = ("absolute-window", "bicubic")
MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}  # interpolation, by number of dimensions


def absolute_window(
    pos_embed: torch.Tensor, pos_embed_win: torch.Tensor, grid: Sequence[int]
) -> torch.Tensor:
    """Return an absolute-window embedding: a global map, interpolated, plus a tiled window pattern.

    Args:
        pos_embed: The global map, [1, c, *any].
        pos_embed_win: The pattern of a window, [1, c, *unit].
        grid: Number of tokens along each dimension.

    Returns:
        [1, n, c].
    """
    x = _interpolate(pos_embed, grid) + _tile(pos_embed_win, grid)
    return x.flatten(2).transpose(1, 2)


def resize(
    embed: torch.Tensor,
    old: Sequence[int],
    new: Sequence[int],
    window: Sequence[int] | None = None,
) -> torch.Tensor:
    """Resample a learned embedding to another grid. [1, n, c] -> [1, n', c], in the same dtype.

    Args:
        embed: The embedding.
        old, new: Number of tokens along each dimension.
        window: Number of tokens of a mask unit along each dimension. The mean over all windows is
            the pattern that is tiled. None: interpolate the embedding as a whole.
    """
    if tuple(old) == tuple(new):
        return embed
    x = embed.float().transpose(1, 2).unflatten(2, tuple(old))  # 1 c *old
    if window is None:
        x = _interpolate(x, new)
    else:
        pattern = _mean_window(x, window)
        x = _interpolate(x - _tile(pattern, old), new) + _tile(pattern, new)
    return x.flatten(2).transpose(1, 2).contiguous().to(embed.dtype)


def resample(
    state: Mapping[str, torch.Tensor],
    made_for: tuple[int, ...],
    config: HieraConfig,
    rule: ResampleRule = "absolute-window",
) -> dict[str, torch.Tensor]:
    """Return weights for the input size of `config`, from weights for another input size.

    Args:
        state: Parameters, in the reference's naming.
        made_for: The input size that they were trained with, in pixels (and frames).
        config: The model that they are for.
        rule: `absolute-window`, or `bicubic` to interpolate the embedding as a whole. With both
            rules, temporal embeddings are interpolated linearly, and the decoder's embedding as a
            whole: the decoder attends globally, so it has no pattern to tile.

    Raises:
        UsageError: The rule is unknown.
    """
    if rule not in RESAMPLE_RULES:
        raise UsageError(f"unknown resample rule {rule!r}", f"use {' or '.join(RESAMPLE_RULES)}")
    state = dict(state)
    if made_for == config.input_size or config.abs_win_pos_embed:
        return state
    try:
        old = dataclasses.replace(config, input_size=made_for).layout
    except ConfigError:  # the weights are for another architecture, which `load.fit` reports
        return state
    new, pools = config.layout, config.q_pool
    unit = config.mask_unit_size if rule == "absolute-window" else None
    grids = {
        "pos_embed": (old.grid, new.grid, unit),
        "pos_embed_spatial": (old.grid[1:], new.grid[1:], unit and unit[1:]),
        "pos_embed_temporal": (old.grid[:1], new.grid[:1], None),
        "decoder_pos_embed": (old.grid_after(pools), new.grid_after(pools), None),
    }
    for name, (before, after, window) in grids.items():
        if name in state and state[name].dim() == 3 and state[name].shape[1] == math.prod(before):
            state[name] = resize(state[name], before, after, window)
    log.info(
        "position embeddings resampled from %s to %s (%s)",
        *("x".join(map(str, size)) for size in (made_for, config.input_size)),
        rule,
    )
    return state


def input_size_of(
    state: Mapping[str, torch.Tensor],
    likely: Sequence[Any],
    patch_stride: Sequence[int],
) -> tuple[int, ...] | None:
    """Return the input size that weights were made for, or None if it cannot be inferred.

    An embedding shows only its number of tokens: 6,272 tokens can be 224x448 or 448x224 pixels.

    Args:
        state: Parameters, in the reference's naming.
        likely: Input sizes to try first. If none has the same number of tokens, a square is
            assumed.
        patch_stride: Stride of the patch embedding along each dimension.
    """
    dims = len(patch_stride)
    for size in likely:
        if _is_size(size, dims) and _fits(state, size, patch_stride):
            return tuple(size)
    name = "pos_embed_spatial" if "pos_embed_spatial" in state else "pos_embed"
    count = state[name].shape[1] if name in state and state[name].dim() == 3 else 0
    side = math.isqrt(count)
    time = state["pos_embed_temporal"].shape[1:2] if name == "pos_embed_spatial" else ()
    shape = (*time, *((side, side) if side * side == count else (count,)))
    if not count or len(shape) != dims:
        return None
    return tuple(tokens * stride for tokens, stride in zip(shape, patch_stride, strict=True))


def _fits(
    state: Mapping[str, torch.Tensor], size: Sequence[int], patch_stride: Sequence[int]
) -> bool:
    """Return whether the embeddings have as many tokens as an input of this size."""
    grid = [s // p for s, p in zip(size, patch_stride, strict=True)]
    lengths = {
        "pos_embed": math.prod(grid),
        "pos_embed_spatial": math.prod(grid[1:]),
        "pos_embed_temporal": grid[0],
    }
    equal = [state[name].shape[1] == length for name, length in lengths.items() if name in state]
    return bool(equal) and all(equal)


def _is_size(value: Any, dims: int) -> bool:
    """Return whether a value is a list of `dims` positive integers."""
    is_integers = isinstance(value, list | tuple) and all(type(n) is int and n > 0 for n in value)
    return is_integers and len(value) == dims


def _mean_window(x: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """Return the mean over all windows. 1 c *grid -> 1 c *window"""
    for dim, size in enumerate(window, start=2):
        x = x.unflatten(dim, (-1, size)).mean(dim)
    return x


def _tile(pattern: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Repeat a window's pattern over the grid. 1 c *window -> 1 c *grid"""
    pairs = zip(grid, pattern.shape[2:], strict=True)
    return pattern.tile(1, 1, *(side // window for side, window in pairs))


def _interpolate(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate a map; in two dimensions, with antialiasing. 1 c *any -> 1 c *size"""
    dims = x.dim() - 2
    resized: torch.Tensor = F.interpolate(
        x.float(),
        size=tuple(size),
        mode=MODES[dims],
        align_corners=False,
        antialias=dims == 2,
    )
    return resized.to(x.dtype)
