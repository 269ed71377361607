"""Tests of the order of tokens: windows are blocks of the grid, and every step can be undone."""

from __future__ import annotations

import math

import pytest
import torch

from hiera_core.errors import ConfigError
from hiera_core.models.token_layout import TokenLayout

LAYOUTS = [
    TokenLayout((16,), (8,), (2,), 3, 3),
    TokenLayout((16, 24), (8, 8), (2, 2), 3, 3),
    TokenLayout((16, 24), (4, 4), (2, 2), 3, 2),
    TokenLayout((16, 16), (16, 16), (2, 2), 3, 3),
    TokenLayout((4, 8, 16), (1, 8, 8), (1, 2, 2), 3, 3),
    TokenLayout((8, 8, 16), (4, 4, 4), (2, 2, 2), 2, 2),
]


def cells(layout: TokenLayout, pools: int = 0) -> torch.Tensor:
    """Return the numbers of the grid's cells after some pools. -> [1, cells, 1]"""
    count = math.prod(layout.grid_after(pools))
    return torch.arange(count, dtype=torch.float32).reshape(1, count, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_to_grid_undoes_to_windows(layout: TokenLayout) -> None:
    for pools in range(layout.pools + 1):
        windows = layout.to_windows(cells(layout, pools), pools)
        back = layout.to_grid(windows, pools)
        assert back.shape == (1, *layout.grid_after(pools), 1)
        assert torch.equal(back.reshape(1, -1, 1), cells(layout, pools))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pooling_the_sequence_pools_the_grid(layout: TokenLayout) -> None:
    """The maximum over the slowest axis of the windows is a max-pool of the grid."""
    x = torch.randn(1, math.prod(layout.grid), 1)
    windows = layout.to_windows(x)
    stride = math.prod(layout.stride)
    tokens = layout.window_tokens(1)
    pooled = windows.view(1, -1, stride, tokens, 1).amax(2).view(1, -1, 1)
    grid = layout.to_grid(pooled, 1)[0, ..., 0]
    pool = [
        torch.nn.functional.max_pool1d,
        torch.nn.functional.max_pool2d,
        torch.nn.functional.max_pool3d,
    ][len(layout.grid) - 1]
    expected = pool(x.reshape(1, 1, *layout.grid), layout.stride, layout.stride)[0, 0]
    assert torch.equal(grid, expected)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.maskable], ids=str)
def test_windows_are_blocks_of_the_grid(layout: TokenLayout) -> None:
    units = layout.to_units(layout.to_windows(cells(layout)))[0, ..., 0]
    grid = cells(layout).reshape(layout.grid)
    assert units.shape == (layout.windows, *layout.unit)
    numbers = layout.unit_of_window()
    for window in range(layout.windows):
        corner = torch.unravel_index(numbers[window], layout.unit_grid)
        block = tuple(
            slice(int(c) * u, int(c) * u + u) for c, u in zip(corner, layout.unit, strict=True)
        )
        assert torch.equal(units[window], grid[block])
    windows = layout.from_units(layout.to_units(layout.to_windows(cells(layout))))
    assert torch.equal(windows.reshape(1, -1, 1), layout.to_windows(cells(layout)))


def test_errors_about_illegal_grids_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        TokenLayout((20, 24), (8, 8), (2, 2), 3, 3)
    with pytest.raises(ConfigError, match="power of"):
        TokenLayout((12, 12), (6, 6), (2, 2), 2, 2)
    with pytest.raises(ConfigError, match="dimensions"):
        TokenLayout((16, 16), (8,), (2, 2), 3, 3)
