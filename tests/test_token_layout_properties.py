"""Properties of the token order, for layouts that hypothesis draws.

They are compared with a slow definition, one token at a time. A token at position p of a dimension
has the digits p % s, p // s % s, ... (one for each stride s, the finest first), and what remains is
its place in the coarsest grid. The reference sorts tokens by the finest digits of all dimensions,
then by the next ones, and last by the place. Token number r of that order belongs to window
r % windows, and has the place r // windows in it. We sort by window first.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hiera_core.errors import ConfigError
from hiera_core.models.attention import pool_tokens
from hiera_core.models.masking import gather_windows, visible_from_units, visible_units
from hiera_core.models.token_layout import TokenLayout

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

MAX_TOKENS = 2000
quick = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples in every run
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much],
)
many = hypothesis.settings(quick, max_examples=3000, derandomize=False)


@st.composite
def layouts(draw, maskable: bool = False):  # type: ignore[no-untyped-def]
    dims = draw(st.integers(1, 3))
    stride = draw(st.tuples(*[st.integers(1, 3)] * dims))
    levels = draw(st.integers(0, 3))
    pools = draw(st.integers(0, levels))
    power = draw(st.integers(pools if maskable else 0, levels))
    unit = tuple(s**power for s in stride)
    if not maskable and draw(st.booleans()):  # any other size
        unit = draw(st.tuples(*[st.integers(1, 6)] * dims))
    repeats = draw(st.tuples(*[st.integers(1, 3)] * dims))
    steps = (math.lcm(u, s**levels) for u, s in zip(unit, stride, strict=True))
    grid = tuple(step * n for step, n in zip(steps, repeats, strict=True))
    hypothesis.assume(math.prod(grid) <= MAX_TOKENS)
    try:
        layout = TokenLayout(grid, unit, stride, levels, pools)
    except ConfigError:  # a pool does not divide a window
        hypothesis.reject()
    hypothesis.assume(layout.maskable or not maskable)
    return layout


def positions(layout: TokenLayout, pools: int) -> list[tuple[int, ...]]:
    """Return the positions of all tokens after some pools, in grid order."""
    return list(itertools.product(*map(range, layout.grid_after(pools))))


def reference_rank(layout: TokenLayout, pools: int) -> list[int]:
    """Return the cells of the grid, sorted as the reference sorts them."""

    def key(position: tuple[int, ...]) -> list[tuple[int, ...]]:
        levels = range(layout.levels - pools)
        digits = [
            tuple(p // s**k % s for p, s in zip(position, layout.stride, strict=True))
            for k in levels
        ]
        coarse = tuple(p // s ** len(levels) for p, s in zip(position, layout.stride, strict=True))
        return [*digits, coarse]

    found = positions(layout, pools)
    return sorted(range(len(found)), key=lambda cell: key(found[cell]))


def window_major(layout: TokenLayout, pools: int) -> list[int]:
    """Return the cells of the grid in window-major order."""
    rank = reference_rank(layout, pools)
    if not layout.window_tokens(pools):  # pooling has merged the windows
        return rank
    return [cell for window in range(layout.windows) for cell in rank[window :: layout.windows]]


def cells(layout: TokenLayout, pools: int = 0) -> torch.Tensor:
    return torch.arange(len(positions(layout, pools)), dtype=torch.float32).reshape(1, -1, 1)


def check_order(layout: TokenLayout) -> None:
    for pools in range(layout.pools + 1):
        order, grid = window_major(layout, pools), cells(layout, pools)
        tokens = grid[:, order]
        if layout.window_tokens(pools) or layout.aligned_levels is not None:
            assert torch.equal(layout.to_windows(grid, pools), tokens)
        expected = grid.reshape(1, *layout.grid_after(pools), 1)
        assert torch.equal(layout.to_grid(tokens, pools), expected)
        if layout.window_tokens(pools):
            rank = reference_rank(layout, pools)
            assert layout.reference_order(tokens, pools).flatten().tolist() == rank


def check_pools(layout: TokenLayout) -> None:
    """Each pool is the maximum over a block of `stride` cells, for every stage in turn."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(layout.grid, generator=generator)
    tokens = grid.reshape(1, -1, 1)[:, window_major(layout, 0)]
    for pools in range(1, layout.pools + 1):
        stride = math.prod(layout.stride)
        tokens = pool_tokens(tokens, stride, layout.window_tokens(pools))
        pooled = torch.empty(layout.grid_after(pools))
        for position in positions(layout, pools):
            sides = [
                slice(p * s**pools, (p + 1) * s**pools)
                for p, s in zip(position, layout.stride, strict=True)
            ]
            pooled[position] = grid[tuple(sides)].max()
        assert torch.equal(layout.to_grid(tokens, pools)[0, ..., 0], pooled)


def check_units(layout: TokenLayout, drawn: int) -> None:
    """Windows are blocks of the grid at every resolution, and masks keep the right ones."""
    numbers = layout.unit_of_window().tolist()
    assert sorted(numbers) == list(range(layout.windows))
    kept = torch.randperm(layout.windows, generator=torch.Generator().manual_seed(drawn))
    ids = kept[: 1 + drawn % layout.windows][None]
    visible = visible_from_units(ids, layout)
    again = visible_units(visible.mask, None, layout)
    assert again is not None and torch.equal(again.keep_ids, visible.keep_ids)
    assert sorted(visible.keep_ids[0].tolist()) == sorted(ids[0].tolist())
    assert [numbers[window] for window in visible.windows[0]] == visible.keep_ids[0].tolist()
    for pools in range(layout.pools + 1):
        unit, grid = (
            layout.unit_after(pools),
            cells(layout, pools).reshape(layout.grid_after(pools)),
        )
        tokens = layout.to_windows(cells(layout, pools), pools)
        some = gather_windows(tokens, visible.windows, layout.windows)
        maps = layout.to_units(some, pools)
        for row, number in enumerate(visible.keep_ids[0].tolist()):
            corner = [int(c) for c in torch.unravel_index(torch.tensor(number), layout.unit_grid)]
            block = tuple(slice(c * u, (c + 1) * u) for c, u in zip(corner, unit, strict=True))
            assert torch.equal(maps[0, row, ..., 0], grid[block])
        assert torch.equal(layout.from_units(maps, pools).flatten(1, 2), some)


@hypothesis.given(layouts())
@quick
def test_the_order_is_that_of_the_definition(layout: TokenLayout) -> None:
    check_order(layout)


@hypothesis.given(layouts())
@quick
def test_pools_take_the_maximum_of_blocks(layout: TokenLayout) -> None:
    check_pools(layout)


@hypothesis.given(layouts(maskable=True), st.integers(0, 1000))
@quick
def test_masks_keep_blocks_of_the_grid(layout: TokenLayout, drawn: int) -> None:
    check_units(layout, drawn)


@pytest.mark.slow
@hypothesis.given(layouts(), layouts(maskable=True), st.integers(0, 1000))
@many
def test_many_layouts(layout: TokenLayout, maskable: TokenLayout, drawn: int) -> None:
    check_order(layout)
    check_pools(layout)
    check_units(maskable, drawn)
