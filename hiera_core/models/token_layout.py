"""Token order: conversions between the grid of tokens and their order in the sequence.

Letters in shape comments: b batch, n tokens, w windows (mask units), t tokens of a window,
k kept windows, c channels. s1 is the finest stride, s2 the next; y1, x1 are positions within s1,
and so on; uy, ux is the position of a mask unit in the grid.

The patch embedding returns tokens in grid order. After it, they are permuted once, into
*window-major* order, in which the finest stride varies slowest within a window:

    b (uy y3 y2 y1) (ux x3 x2 x1) c  ->  b (uy ux) (y1 x1 y2 x2 y3 x3) c

In this order, all other steps are views or simple operations. A window is a row of t tokens. A pool
is a maximum over the slowest axis within a window. Dropping masked windows is a gather of rows.
Global attention sees a single row of w*t tokens. The reference uses the transposed order (t varies
slowest, w fastest), in which every windowed attention has to copy. `reference_order` returns that
order for outputs that callers see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class TokenLayout:
    """Token order of a model, for inputs of 1, 2 or 3 dimensions.

    Args:
        grid: Number of tokens along each dimension after the patch embedding, e.g. (56, 56).
        unit: Size of a mask unit in tokens, e.g. (8, 8).
        stride: Query pooling stride between stages, e.g. (2, 2).
        levels: Number of strides that order the tokens: stages - 1, whether they are pooled or not.
        pools: Number of strides that are pooled (`q_pool`).

    Attributes:
        windows: Number of windows.
        aligned_levels: Number of levels that a window consists of, or None if that is not a whole
            number. It is whole in all released models; the permute then needs one copy instead of
            two.

    Raises:
        ConfigError: The grid cannot be divided this way, or a pool does not fit a window.
    """

    grid: tuple[int, ...]
    unit: tuple[int, ...]
    stride: tuple[int, ...]
    levels: int
    pools: int
    windows: int = field(init=False)
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
                    f"{size} tokens along dimension {dim} cannot be divided into mask units of "
                    f"{self.unit[dim]} with {self.levels} strides of {self.stride[dim]}",
                    f"use a multiple of {step}",
                )
        object.__setattr__(self, "windows", math.prod(self.grid) // math.prod(self.unit))
        exact = [
            level
            for level in range(self.levels + 1)
            if all(s**level == u for s, u in zip(self.stride, self.unit, strict=True))
        ]
        object.__setattr__(self, "aligned_levels", exact[0] if exact else None)
        self._check_pools()

    @property
    def token_multiple(self) -> tuple[int, ...]:
        """Number of tokens, along each dimension, of which the grid must be a multiple."""
        pairs = zip(self.stride, self.unit, strict=True)
        return tuple(math.lcm(u, s**self.levels) for s, u in pairs)

    @property
    def maskable(self) -> bool:
        """Whether windows can be dropped: each is a block of the grid, even after all pools."""
        return self.aligned_levels is not None and self.aligned_levels >= self.pools

    @property
    def unit_grid(self) -> tuple[int, ...]:
        """Number of mask units along each dimension, e.g. (7, 7)."""
        return tuple(g // u for g, u in zip(self.grid, self.unit, strict=True))

    def grid_after(self, pools: int) -> tuple[int, ...]:
        """Return the grid after a number of pools, e.g. (56, 56), (28, 28), (14, 14), (7, 7)."""
        return tuple(g // s**pools for g, s in zip(self.grid, self.stride, strict=True))

    def unit_after(self, pools: int) -> tuple[int, ...]:
        """Return the size of a mask unit in tokens after a number of pools, e.g. (8, 8), (4, 4)."""
        return tuple(max(u // s**pools, 1) for u, s in zip(self.unit, self.stride, strict=True))

    def window_tokens(self, pools: int) -> int:
        """Return the number of tokens of a window after a number of pools.

        It is 0 if a pool has merged windows.
        """
        return math.prod(self.unit) // math.prod(self.stride) ** pools

    # Grid order <-> window-major order -------------------------------------------------------

    def to_windows(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Permute from grid order to window-major order. b n c -> b (w t) c

        Args:
            x: Tokens in grid order.
            pools: Number of pools that they have been through.
        """
        batch, tokens, channels = x.shape
        x = x.reshape(batch, *self._split_grid(pools), channels)
        x = x.permute(0, *self._order(), x.dim() - 1)
        if self.aligned_levels is None:  # a window is not a whole number of levels: copy once more
            x = x.reshape(batch, -1, self.windows, channels).transpose(1, 2)
        return x.reshape(batch, tokens, channels)

    def to_grid(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Permute from window-major order to the grid. b (w t) c -> b *grid c, e.g. b y x c"""
        batch, _, channels = x.shape
        if self.aligned_levels is None and self.window_tokens(pools):
            x = x.reshape(batch, self.windows, -1, channels).transpose(1, 2)
        order, split = self._order(), self._split_grid(pools)
        x = x.reshape(batch, *(split[axis - 1] for axis in order), channels)
        inverse = [1 + order.index(axis) for axis in range(1, len(order) + 1)]
        x = x.permute(0, *inverse, x.dim() - 1)
        return x.reshape(batch, *self.grid_after(pools), channels)

    def to_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Permute each window of a maskable layout to a small grid. b (k t) c -> b k *unit c"""
        dims, levels = len(self.grid), (self.aligned_levels or 0) - pools
        unit, batch, channels = self.unit_after(pools), x.shape[0], x.shape[-1]
        # b k (y2 x2 y3 x3) c -> b k (y3 y2) (x3 x2) c
        x = x.reshape(batch, -1, *(self.stride * levels), channels)
        order = [2 + level * dims + dim for dim in range(dims) for level in reversed(range(levels))]
        x = x.permute(0, 1, *order, x.dim() - 1)
        return x.reshape(batch, -1, *unit, channels)

    def from_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Permute small grids back to windows: the inverse of `to_units`. b k *unit c -> b k t c"""
        dims, levels = len(self.grid), (self.aligned_levels or 0) - pools
        batch, kept, channels = x.shape[0], x.shape[1], x.shape[-1]
        # b k (y3 y2) (x3 x2) c -> b k (y2 x2 y3 x3) c
        x = x.reshape(batch, kept, *(s for s in self.stride for _ in range(levels)), channels)
        finest_first = reversed(range(levels))
        order = [2 + dim * levels + level for level in finest_first for dim in range(dims)]
        return x.permute(0, 1, *order, x.dim() - 1).reshape(batch, kept, -1, channels)

    def reference_order(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """Permute from window-major order to the order of the reference. b (k t) c -> b (t k) c"""
        tokens = self.window_tokens(pools)
        if tokens < 2:
            return x
        x = x.reshape(x.shape[0], -1, tokens, x.shape[-1]).transpose(1, 2)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    # Masks ------------------------------------------------------------------------------------

    def unit_of_window(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the index of each window's mask unit in row-major grid order. -> w"""
        units = torch.arange(self.windows, device=device).reshape(self.unit_grid)
        for dim, size in enumerate(self.unit):
            units = units.repeat_interleave(size, dim)
        return self.to_windows(units.reshape(1, -1, 1)).reshape(self.windows, -1)[:, 0]

    def cell_of_token(self, pools: int, device: torch.device | None = None) -> torch.Tensor:
        """Return the row-major index of each token in the grid after a number of pools. -> w t"""
        cells = torch.arange(math.prod(self.grid_after(pools)), device=device)
        return self.to_windows(cells.reshape(1, -1, 1), pools).reshape(self.windows, -1)

    # The permute ------------------------------------------------------------------------------

    def _split_grid(self, pools: int) -> list[int]:
        """Return each side of the grid, split into (u, s_levels, ..., s2, s1).

        Strides that have been pooled have size 1.
        """
        sizes = []
        for side, step in zip(self.grid, self.stride, strict=True):
            strides = [1 if level < pools else step for level in range(self.levels)]
            sizes += [side // step**self.levels, *reversed(strides)]
        return sizes

    def _order(self) -> list[int]:
        """Return the axes of the split grid, counted from 1, in window-major order.

        Levels go from the finest to the coarsest, as in the reference. Then the levels that index
        the windows are moved to the front, if windows consist of whole levels.
        """
        dims, splits = len(self.grid), self.levels + 1
        levels = [[1 + dim * splits + i for dim in range(dims)] for i in reversed(range(splits))]
        within_window = self.aligned_levels or 0
        ordered = levels[within_window:] + levels[:within_window]
        return [axis for level in ordered for axis in level]

    def _check_pools(self) -> None:
        """Check that each pool divides the tokens of a window.

        Raises:
            ConfigError: A pool does not.
        """
        pooled = math.prod(self.stride)  # number of tokens that a pool merges
        for pool in range(self.pools):
            tokens = self.window_tokens(pool)
            # As in the reference, a pool may merge windows if each is a single token.
            if tokens > 1 and (tokens % pooled or tokens * pooled**pool != math.prod(self.unit)):
                raise ConfigError(
                    f"mask unit {self.unit} leaves {tokens} tokens in a window, which a pool of "
                    f"{pooled} does not divide",
                    f"use a power of {self.stride}",
                )
