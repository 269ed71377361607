"""Token orders for exported programs: permutes become gathers of constant indices.

`TokenLayout` permutes up to 14 dimensions, one for each level of strides, and runtimes such as
TensorRT stop at 8. Gathers cost about the same where the program runs.

Letters in shape comments: b batch, n tokens, w windows, t tokens of a window, k kept windows,
c channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import torch

from ..models.encoder import Encoder
from ..models.hiera import HieraEncoder
from ..models.sam2.hieradet import HieraDet
from ..models.sam2.window_order import StageOrder, invert
from ..models.token_layout import TokenLayout


def prepare_for_export(model: Encoder, size: tuple[int, ...]) -> None:
    """Change a model so that its graph permutes by constant indices, for inputs of one size.

    Args:
        model: The model, which computes the same as before.
        size: Input size in pixels. SAM 2's encoder takes no other afterwards.
    """
    if isinstance(model, HieraEncoder):
        model.layout = GatherLayout.of(model.layout)
    if isinstance(model, HieraDet):
        _fix_size(model, size)


class GatherLayout(TokenLayout):
    """A token layout that permutes by gathering tokens."""

    @classmethod
    def of(cls, layout: TokenLayout) -> Self:
        """Return the layout that permutes as `layout` does."""
        values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout) if f.init}
        gathering = cls(**values)
        pools = range(layout.pools + 1)
        cells = [layout.cell_of_token(pool).flatten() for pool in pools]
        units = [_cells_of_unit(layout, pool) if layout.maskable else None for pool in pools]
        object.__setattr__(gathering, "cells", cells)
        object.__setattr__(gathering, "grid_places", [invert(index) for index in cells])
        places = [None if index is None else invert(index) for index in units]
        object.__setattr__(gathering, "unit_cells", units)
        object.__setattr__(gathering, "unit_places", places)
        return gathering

    def to_windows(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """b n c -> b (w t) c"""
        return x.index_select(1, self._index("cells", pools))

    def to_grid(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """b (w t) c -> b *grid c"""
        x = x.index_select(1, self._index("grid_places", pools))
        return x.unflatten(1, self.grid_after(pools))

    def to_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """b (k t) c -> b k *unit c"""
        places = self._index("unit_places", pools)
        x = x.unflatten(1, (-1, len(places))).index_select(2, places)
        return x.unflatten(2, self.unit_after(pools))

    def from_units(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """b k *unit c -> b k t c"""
        cells = self._index("unit_cells", pools)
        return x.flatten(2, -2).index_select(2, cells)

    def cell_of_token(self, pools: int, device: torch.device | None = None) -> torch.Tensor:
        """-> w t"""
        return self._index("cells", pools).reshape(self.windows, -1)

    def _index(self, name: str, pools: int) -> torch.Tensor:
        index: torch.Tensor = getattr(self, name)[pools]
        return index


class ConstantOrder(StageOrder):
    """Order of the tokens in a stage of SAM 2's encoder, whose inverse is a constant."""

    @classmethod
    def of(cls, order: StageOrder) -> Self:
        """Return the order that permutes as `order` does."""
        constant = cls(**vars(order))
        object.__setattr__(constant, "places", invert(order.cells))
        return constant

    def to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """b n c -> b y x c"""
        places: torch.Tensor = self.places  # type: ignore[attr-defined]
        return x.index_select(1, places).unflatten(1, self.grid)


def _cells_of_unit(layout: TokenLayout, pools: int) -> torch.Tensor:
    """Return the row-major index of each token in its mask unit, after a number of pools. -> t"""
    cells = torch.arange(math.prod(unit := layout.unit_after(pools)))
    return layout.from_units(cells.view(1, 1, *unit, 1), pools).flatten()


def _fix_size(model: HieraDet, size: tuple[int, ...]) -> None:
    """Make the token orders and the position embedding of SAM 2's encoder constants."""
    grid = model._config.grid_of((size[0], size[1]))
    orders: list[StageOrder] = [ConstantOrder.of(order) for order in model.stage_orders(grid)]
    with torch.no_grad():
        position = model.get_pos_embed(grid)
    model.stage_orders = lambda grid, device=None: orders  # type: ignore[method-assign]
    model._position = lambda grid: position  # type: ignore[method-assign]
