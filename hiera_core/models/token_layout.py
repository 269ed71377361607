"""Token order: the one place that knows where a token of the grid lies in the sequence.

Letters in shape comments: b batch, n tokens, w windows (mask units), t tokens of a window,
k kept windows, c channels; s1 is the finest stride, s2 the next, u the unit's place in the grid.

The patch embedding gives tokens in grid order. Right after it they are permuted, once, into
*window-major* order, finest stride slowest inside a window:

    b (uy y3 y2 y1) (ux x3 x2 x1) c  ->  b (uy ux) (y1 x1 y2 x2 y3 x3) c

From then on everything is a view: a window is a row of t tokens, a pool takes the maximum over the
slowest s of a window's t, dropping a masked window is a row gather, and global attention sees one
row of w*t tokens. The reference keeps the transpose of this (t slowest, w fastest), in which every
windowed attention must copy; `reference_order` gives its order back where callers can see it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class TokenLayout:
    """Token order of one model, for 1, 2 or 3 spatial dimensions.

    Args:
        grid: tokens along each dimension after the patch embedding, e.g. (56, 56).
        unit: mask unit in tokens, e.g. (8, 8).
        stride: query pooling stride between stages, e.g. (2, 2).
        levels: how many strides order the tokens: stages - 1, pooled or not.
        pools: how many of them are pooled (`q_pool`).

    Raises:
        ConfigError: the grid cannot be cut this way, or a pool does not fit a window.
    """

    grid: tuple[int, ...]
    unit: tuple[int, ...]
    stride: tuple[int, ...]
    levels: int
    pools: int
    windows: int = field(init=False)
    # Window tokens are whole levels of the permute (the usual case): one copy instead of two.
    aligned_levels: int | None = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.grid) == len(self.unit) == len(self.stride):
            raise ConfigError(
                f"input, mask unit and q_stride have {len(self.grid)}, {len(self.unit)} and "
                f"{len(self.stride)} dimensions",
                "give all three the same number",
            )
        for dim, (size, step) in enumerate(zip(self.grid, self.token_multiple, strict=True)):
            if size < 1 or size % step:
                raise ConfigError(
                    f"{size} tokens along dimension {dim} cannot be cut into mask units of "
                    f"{self.unit[dim]} with {self.levels} strides of {self.stride[dim]}",
                    f"use a multiple of {step}",
                )
        object.__setattr__(self, "windows", math.prod(self.grid) // math.prod(self.unit))
        exact = [
            m
            for m in range(self.levels + 1)
            if all(s**m == u for s, u in zip(self.stride, self.unit, strict=True))
        ]
        object.__setattr__(self, "aligned_levels", exact[0] if exact else None)
        self._check_pools()

    @property
    def token_multiple(self) -> tuple[int, ...]:
        """Each side of the grid must be a multiple of this."""
        pairs = zip(self.stride, self.unit, strict=True)
        return tuple(math.lcm(u, s**self.levels) for s, u in pairs)

    @property
    def maskable(self) -> bool:
        """Whether windows are blocks of the grid that survive every pool, so that they can go."""
        return self.aligned_levels is not None and self.aligned_levels >= self.pools

    @property
    def unit_grid(self) -> tuple[int, ...]:
        """Mask units along each dimension, e.g. (7, 7)."""
        return tuple(g // u for g, u in zip(self.grid, self.unit, strict=True))

    def grid_after(self, pools: int) -> tuple[int, ...]:
        """The grid after so many pools, e.g. (56, 56), (28, 28), (14, 14), (7, 7)."""
        return tuple(g // s**pools for g, s in zip(self.grid, self.stride, strict=True))

    def unit_after(self, pools: int) -> tuple[int, ...]:
        """A mask unit's tokens along each dimension after so many pools."""
        return tuple(max(u // s**pools, 1) for u, s in zip(self.unit, self.stride, strict=True))

    def window_tokens(self, pools: int) -> int:
        """Tokens in a window after so many pools; 0 once a pool has joined windows."""
        return math.prod(self.unit) // math.prod(self.stride) ** pools

    # Grid order <-> window-major order -------------------------------------------------------

    def to_windows(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Grid order, after so many pools, to window-major order. b n c -> b (w t) c."""
        batch, tokens, channels = x.shape
        x = x.reshape(batch, *self._split_grid(pools), channels)
        x = x.permute(0, *self._order(), x.dim() - 1)
        if self.aligned_levels is None:  # t is not a whole number of levels: take the long way
            x = x.reshape(batch, -1, self.windows, channels).transpose(1, 2)
        return x.reshape(batch, tokens, channels)

    def to_grid(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Window-major order to the grid. b (w t) c -> b *grid c, e.g. b y x c."""
        batch, _, channels = x.shape
        if self.aligned_levels is None and self.window_tokens(pools):
            x = x.reshape(batch, self.windows, -1, channels).transpose(1, 2)
        order, split = self._order(), self._split_grid(pools)
        x = x.reshape(batch, *(split[axis - 1] for axis in order), channels)
        inverse = [1 + order.index(axis) for axis in range(1, len(order) + 1)]
        x = x.permute(0, *inverse, x.dim() - 1)
        return x.reshape(batch, *self.grid_after(pools), channels)

    def to_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Kept windows to small grids, if the layout is maskable. b (k t) c -> b k *unit c."""
        dims, levels = len(self.grid), (self.aligned_levels or 0) - pools
        unit, batch, channels = self.unit_after(pools), x.shape[0], x.shape[-1]
        # b k (y2 x2 y3 x3) c -> b k (y3 y2) (x3 x2) c
        x = x.reshape(batch, -1, *(self.stride * levels), channels)
        order = [2 + level * dims + dim for dim in range(dims) for level in reversed(range(levels))]
        x = x.permute(0, 1, *order, x.dim() - 1)
        return x.reshape(batch, -1, *unit, channels)

    def from_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """The inverse of `to_units`, windows apart. b k *unit c -> b k t c."""
        dims, levels = len(self.grid), (self.aligned_levels or 0) - pools
        batch, kept, channels = x.shape[0], x.shape[1], x.shape[-1]
        # b k (y3 y2) (x3 x2) c -> b k (y2 x2 y3 x3) c
        x = x.reshape(batch, kept, *(s for s in self.stride for _ in range(levels)), channels)
        finest_first = reversed(range(levels))
        order = [2 + dim * levels + level for level in finest_first for dim in range(dims)]
        return x.permute(0, 1, *order, x.dim() - 1).reshape(batch, kept, -1, channels)

    def reference_order(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Window-major order to the reference package's. b (k t) c -> b (t k) c."""
        tokens = self.window_tokens(pools)
        if tokens < 2:
            return x
        x = x.reshape(x.shape[0], -1, tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    # Masks ------------------------------------------------------------------------------------

    def unit_of_window(self, device: torch.device | None = None) -> torch.Tensor:
        """For each window, the number of its mask unit in row-major grid order. -> w"""
        units = torch.arange(self.windows, device=device).reshape(self.unit_grid)
        for dim, size in enumerate(self.unit):
            units = units.repeat_interleave(size, dim)
        return self.to_windows(units.reshape(1, -1, 1)).reshape(self.windows, -1)[:, 0]

    def cell_of_token(self, pools: int, device: torch.device | None = None) -> torch.Tensor:
        """For each window and token of it, its row-major place in the pooled grid. -> w t"""
        cells = torch.arange(math.prod(self.grid_after(pools)), device=device)
        return self.to_windows(cells.reshape(1, -1, 1), pools).reshape(self.windows, -1)

    # The permute ------------------------------------------------------------------------------

    def _split_grid(self, pools: int) -> list[int]:
        """Each side cut into (u, s_levels, ..., s2, s1); strides already pooled have size 1."""
        sizes = []
        for side, step in zip(self.grid, self.stride, strict=True):
            strides = [1 if level < pools else step for level in range(self.levels)]
            sizes += [side // step**self.levels, *reversed(strides)]
        return sizes

    def _order(self) -> list[int]:
        """Axes of the cut grid (counted from 1) in memory order.

        Levels run from the finest to the coarsest, as in the reference; then the levels that
        number the windows are moved to the front, unless windows are not whole levels.
        """
        dims, cuts = len(self.grid), self.levels + 1
        levels = [[1 + dim * cuts + cut for dim in range(dims)] for cut in reversed(range(cuts))]
        front = self.aligned_levels or 0
        return [axis for level in levels[front:] + levels[:front] for axis in level]

    def _check_pools(self) -> None:
        flat = math.prod(self.stride)
        for pool in range(self.pools):
            tokens = self.window_tokens(pool)
            # The reference too can pool over windows, once a window is a single token.
            if tokens > 1 and (tokens % flat or tokens * flat**pool != math.prod(self.unit)):
                raise ConfigError(
                    f"mask unit {self.unit} leaves {tokens} tokens in a window, which a pool of "
                    f"{flat} does not divide",
                    f"use a power of {self.stride}",
                )
