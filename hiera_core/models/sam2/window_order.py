"""Order of the tokens of a HieraDet: windows of any size on grids of any size.

Tokens are in *window-major* order: the tokens of a window are adjacent, so a window is a row of a
tensor. Within a window, the four positions of a 2x2 pool vary slowest, so a pool is a maximum over
one axis. Stages whose windows are the pooled windows of the stage before share their order; only
where a stage has other windows are the tokens permuted.

Windows at the edges of a grid can be smaller. In the released models they are padded with zeros.
Here a sequence holds the real tokens alone, in up to four groups of windows of equal size (whole
windows, right edge, bottom edge, corner), and attention adds the padding where it counts. So global
attention is always a view, and no other layer computes padding.

Letters in shape comments: w windows, y, x rows and columns of a window, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

POOL = 2  # side of a pool; all stages but the first begin with one


@dataclass(frozen=True)
class WindowGroup:
    """Windows of equal size that are adjacent in the sequence.

    Args:
        count: Number of windows.
        height, width: Size of each in real tokens.
    """

    count: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens of a window."""
        return self.height * self.width

    def pooled(self) -> WindowGroup:
        """Return the group after a pool. A last odd row or column is lost, as in the released
        models."""
        return WindowGroup(self.count, self.height // POOL, self.width // POOL)


@dataclass(frozen=True)
class StageOrder:
    """Order of the tokens in a stage, after its first block.

    Args:
        grid: Rows and columns of tokens.
        groups: Groups of windows, in the order of the sequence.
        cells: Row-major index of each token in the grid, [n].
        side: Side of a whole window.
        reorder: Index that permutes the output of the stage's first block, [n], or None if this
            block's windows are nested in those before.
    """

    grid: tuple[int, int]
    groups: tuple[WindowGroup, ...]
    cells: torch.Tensor
    side: int
    reorder: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all windows are whole."""
        return all(group.tokens == self.side**2 for group in self.groups)

    def to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Permute tokens to the grid. b n c -> b y x c"""
        return x.index_select(1, invert(self.cells)).unflatten(1, self.grid)


def is_nested(sides: Sequence[int], stage: int) -> bool:
    """Return whether the windows of a stage are the pooled windows of the stage before.

    Args:
        sides: Side of a window in each stage.
        stage: The stage, counted from 0.
    """
    return stage > 0 and sides[stage] * POOL == sides[stage - 1]


def stage_orders(
    grid: tuple[int, int], sides: Sequence[int], device: torch.device | None = None
) -> list[StageOrder]:
    """Return the order of every stage, for a grid of tokens after the patch embedding.

    Args:
        grid: Rows and columns of tokens.
        sides: Side of a window in each stage.
        device: Where the indices are needed.
    """
    orders = [_new_order(grid, sides, 0, device)]
    for stage in range(1, len(sides)):
        pooled = pooled_order(orders[-1])
        if not is_nested(sides, stage):
            order = _new_order(pooled.grid, sides, stage, device)
            reorder = invert(pooled.cells)[order.cells]
            pooled = StageOrder(order.grid, order.groups, order.cells, order.side, reorder)
        orders.append(pooled)
    return orders


def pools_within(sides: Sequence[int], stage: int) -> int:
    """Return how many pools follow until windows change, for the first stage with these windows."""
    last = stage
    while last + 1 < len(sides) and is_nested(sides, last + 1):
        last += 1
    return last - stage + (last + 1 < len(sides))


def invert(permutation: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a permutation. [n] -> [n]"""
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def _new_order(
    grid: tuple[int, int], sides: Sequence[int], stage: int, device: torch.device | None
) -> StageOrder:
    """Split a grid into windows: whole ones, right edge, bottom edge, corner."""
    side, pools = sides[stage], pools_within(sides, stage)
    height, width = grid
    groups: list[WindowGroup] = []
    found: list[torch.Tensor] = []
    cells = torch.arange(height * width, device=device).view(height, width)
    rows, columns = ([size // side * side, size % side] for size in grid)
    for band, y in zip(cells.split(rows), (side, rows[1]), strict=True):
        for part, x in zip(band.split(columns, 1), (side, columns[1]), strict=True):
            if part.numel():
                # (w1 y) (w2 x) -> (w1 w2) y x
                windows = part.unflatten(0, (-1, y)).unflatten(2, (-1, x)).transpose(1, 2)
                windows = windows.flatten(0, 1)
                groups.append(WindowGroup(len(windows), y, x))
                found.append(_nested(windows, pools).flatten())
    return StageOrder(grid, tuple(groups), torch.cat(found), side)


def _nested(windows: torch.Tensor, pools: int) -> torch.Tensor:
    """Order the tokens of windows for a number of pools. w y x -> w (y x)

    Each pool's four positions vary slowest. Rows and columns that it loses come last.
    """
    if not pools:
        return windows.flatten(1)
    y, x = (size // POOL * POOL for size in windows.shape[1:])
    parts = [
        _nested(windows[:, top:y:POOL, left:x:POOL], pools - 1)
        for top in range(POOL)
        for left in range(POOL)
    ]
    lost = [windows[:, :y, x:].flatten(1), windows[:, y:].flatten(1)]
    return torch.cat(parts + lost, 1)


def pooled_order(order: StageOrder) -> StageOrder:
    """Return the order after a pool that keeps the windows."""
    height, width = (size // POOL for size in order.grid)
    groups = tuple(group.pooled() for group in order.groups)
    sizes = [group.count * group.tokens for group in order.groups]
    first = [  # of each pool, the upper left token stands for the pool
        cells.view(group.count, -1)[:, : pooled.tokens].flatten()
        for cells, group, pooled in zip(order.cells.split(sizes), order.groups, groups, strict=True)
    ]
    cells = torch.cat(first)
    y, x = cells // order.grid[1] // POOL, cells % order.grid[1] // POOL
    kept = tuple(group for group in groups if group.tokens)
    return StageOrder((height, width), kept, y * width + x, order.side // POOL)
