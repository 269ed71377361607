"""Masks of mask units: default ratios, checks, random draws, and the gathers that drop units.

torch is imported inside the functions that need it, because commands check a mask ratio before they
spend seconds on that import.

Letters in shape comments: b batch, w mask units (windows), k visible units, n tokens, m kept rows,
t tokens of a window, c channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError, is_number
from ..records import Kind

if TYPE_CHECKING:
    import torch

    from .token_layout import TokenLayout

# Share of mask units that are hidden, as in pre-training (paper, section 4). This is the only
# definition.
MASK_RATIOS: dict[Kind, float] = {"image": 0.6, "video": 0.9}


class VisibleUnits(NamedTuple):
    """The mask units that the encoder sees, in the forms that it needs."""

    mask: torch.Tensor  # [b, w] bool in grid order, True = visible
    keep_ids: torch.Tensor  # [b, k] numbers of the visible units in grid order
    windows: torch.Tensor  # [b, k] indices of the same units in window-major order, ascending
    layout: TokenLayout  # token order of the inputs


def check_mask_ratio(mask_ratio: float, units: int | None = None) -> None:
    """Check a mask ratio and, if `units` is given, whether it suits that many mask units.

    Raises:
        UsageError: The ratio is outside (0, 1) or NaN, or leaves no visible or no masked unit.
    """
    if not is_number(mask_ratio):
        raise UsageError(f"mask ratio is {mask_ratio!r:.60}", "give a number, such as 0.6")
    if not 0.0 < mask_ratio < 1.0:  # also False for NaN
        raise UsageError(f"mask ratio {mask_ratio} is outside (0, 1)", "use 0.6, or 0.9 for video")
    if units is None:
        return
    kept = visible_count(units, mask_ratio)
    if kept in (0, units):
        what = "visible" if kept == 0 else "masked"
        raise UsageError(
            f"mask ratio {mask_ratio} leaves no {what} unit of {units}",
            "choose one closer to 0.5",
        )


def visible_count(units: int, mask_ratio: float) -> int:
    """Return how many of the mask units stay visible: int(units * (1 - mask_ratio))."""
    return int(units * (1 - mask_ratio))


def draw_units(
    batch: int,
    units: int,
    mask_ratio: float,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the indices of randomly chosen visible units. -> [b, k] int64, in random order

    The order of random numbers is the reference's: the same seed gives the same mask.
    """
    import torch

    if generator is None:  # torch.compile cannot trace an argument `generator=None`
        noise = torch.rand(batch, units, device=device)
    else:
        noise = torch.rand(batch, units, device=device, generator=generator)
    return noise.argsort(dim=1)[:, : visible_count(units, mask_ratio)]


def visible_units(
    mask: torch.Tensor | None,
    keep_ids: torch.Tensor | None,
    layout: TokenLayout,
    check_ids: bool = True,
) -> VisibleUnits | None:
    """Return the visible units of a call, or None if it has neither a mask nor `keep_ids`.

    Args:
        mask: See `visible_from_mask`.
        keep_ids: Numbers of the visible units, see `check_keep_ids`. They need no counting on the
            device, so they compile without a graph break.
        layout: Token order of the model.
        check_ids: Check the values of `keep_ids`, which synchronises a GPU.

    Raises:
        UsageError: Both are given, or one of them does not fit the model.
    """
    if mask is not None and keep_ids is not None:
        raise UsageError("mask and keep_ids are both given", "give one of them")
    if mask is not None:
        return visible_from_mask(mask, layout)
    if keep_ids is None:
        return None
    check_keep_ids(keep_ids, layout.windows, values=check_ids)
    return visible_from_units(keep_ids.long(), layout)


def visible_from_mask(mask: torch.Tensor, layout: TokenLayout) -> VisibleUnits:
    """Return the visible units from a boolean mask, [b, mask units] or [b, *unit grid].

    True means visible.

    Counting a boolean mask synchronises a GPU and breaks a compiled graph. So it is converted once,
    here; the model works with indices.

    Raises:
        UsageError: The mask is not boolean, the shape is wrong, or the rows do not all keep the
            same number of units, or keep none.
    """
    import torch

    if not isinstance(mask, torch.Tensor):
        raise UsageError(f"mask is of type {type(mask).__name__}", "give a boolean tensor")
    if mask.dtype is not torch.bool:
        raise UsageError(
            f"mask is of dtype {mask.dtype}, and a mask is boolean",
            "give the numbers of the visible units as keep_ids=, or convert zeros and ones with "
            ".bool()",
        )
    if mask.shape[1:] == layout.unit_grid:
        mask = mask.flatten(1)
    if mask.dim() != 2 or mask.shape[1] != layout.windows or not mask.shape[0]:
        grid = ", ".join(map(str, layout.unit_grid))
        raise UsageError(
            f"mask has shape {tuple(mask.shape)}",
            f"expected [batch, {layout.windows}] or [batch, {grid}], True = visible",
        )
    counts = mask.sum(1)
    kept = int(counts[0])
    if kept == 0 or bool((counts != kept).any()):
        raise UsageError(
            f"mask rows keep {counts.tolist()} units", "keep the same number, at least one"
        )
    units = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
    return _visible(mask, units, layout)


def visible_from_units(units: torch.Tensor, layout: TokenLayout) -> VisibleUnits:
    """Return the visible units from their numbers in grid order, [b, k] int64, without a check."""
    import torch

    hidden = torch.zeros(units.shape[0], layout.windows, dtype=torch.bool, device=units.device)
    return _visible(hidden.scatter(1, units, True), units, layout)


def check_keep_ids(keep_ids: torch.Tensor, units: int, values: bool = True) -> None:
    """Check the numbers of visible units: [b, k] integers from 0 to `units` - 1, in any order.

    Args:
        keep_ids: The numbers, in row-major order of the grid of mask units.
        units: Number of mask units of the model.
        values: Also check the values. This synchronises a GPU, and is left out where there are no
            values: in a graph, and on the meta device.

    Raises:
        UsageError: The dtype or the shape is wrong, a number is out of range, or a row holds one
            twice.
    """
    import torch

    if not isinstance(keep_ids, torch.Tensor):
        raise UsageError(f"keep_ids is of type {type(keep_ids).__name__}", "give a tensor [b, k]")
    if keep_ids.dtype is torch.bool:
        raise UsageError("keep_ids is boolean", "give a boolean mask as mask=")
    if keep_ids.is_floating_point() or keep_ids.is_complex():
        raise UsageError(f"keep_ids is of dtype {keep_ids.dtype}", "give integers")
    if keep_ids.dim() != 2 or not 1 <= keep_ids.shape[1] <= units:
        raise UsageError(
            f"keep_ids has shape {tuple(keep_ids.shape)}",
            f"expected [batch, k], the numbers of k of the {units} mask units",
        )
    if not values or keep_ids.is_meta or torch.compiler.is_compiling():
        return
    ordered = keep_ids.long().sort(1).values
    outside = (ordered < 0) | (ordered >= units)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if not bool(outside.any() | repeated.any()):
        return
    if bool(outside.any()):
        raise UsageError(
            f"keep_ids holds the number {int(ordered[outside][0])}",
            f"the mask units have the numbers 0 to {units - 1}",
        )
    raise UsageError(
        f"a row of keep_ids holds the number {int(ordered[:, 1:][repeated][0])} twice",
        "give each visible unit once",
    )


def _visible(mask: torch.Tensor, units: torch.Tensor, layout: TokenLayout) -> VisibleUnits:
    """Return the visible units from both of their forms, [b, w] bool and [b, k] in grid order."""
    if not layout.maskable:
        raise UsageError(
            f"mask units {layout.unit} of this model cannot be masked",
            "mask units must be a power of q_stride that survives every pool",
        )
    if layout.aligned_levels == layout.levels:  # windows are numbered in grid order
        units = units.sort(dim=1).values
        return VisibleUnits(mask, units, units, layout)
    unit_of_window = layout.unit_of_window(units.device)
    windows = unit_of_window.argsort()[units].sort(dim=1).values
    return VisibleUnits(mask, unit_of_window[windows], windows, layout)


def gather_windows(x: torch.Tensor, kept: torch.Tensor, windows: int) -> torch.Tensor:
    """Drop the windows that are not in `kept`. b (w t) c, b k -> b (k t) c"""
    batch, _, channels = x.shape
    x = gather_rows(x.view(batch, windows, -1), kept)
    return x.view(batch, -1, channels)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """b n c, b m -> b m c"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def check_visible(visible: VisibleUnits, x: torch.Tensor) -> None:
    """Check that visible units have as many rows as a batch, and are on its device."""
    rows, device = visible.mask.shape[0], visible.mask.device
    if rows != x.shape[0]:
        raise UsageError(
            f"mask or keep_ids has {rows} rows for {x.shape[0]} inputs",
            "give one row for each input",
        )
    if device != x.device:
        raise UsageError(
            f"mask or keep_ids is on {device}, and the input on {x.device}",
            "move it to the device of the input",
        )
