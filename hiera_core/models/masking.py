"""Masks of mask units: default ratios, checks, random draws, and the gathers that drop units.

torch is imported inside the functions that need it, because commands check a mask ratio before they
spend seconds on that import.

Letters in shape comments: b batch, w mask units (windows), k visible units, n tokens, m kept rows,
t tokens of a window, c channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from ..records import Kind

if TYPE_CHECKING:
    import torch

    from .token_layout import TokenLayout

# Share of mask units that are hidden, as in pre-training (paper, section 4). This is the only
# definition.
MASK_RATIOS: dict[Kind, float] = {"image": 0.6, "video": 0.9}


class VisibleUnits(NamedTuple):
    """The mask units that the encoder sees, in the two forms that it needs."""

    mask: torch.Tensor  # [b, w] bool in grid order, True = visible
    keep_ids: torch.Tensor  # [b, k] window indices, ascending


def check_mask_ratio(mask_ratio: float, units: int | None = None) -> None:
    """Check a mask ratio and, if `units` is given, whether it suits that many mask units.

    Raises:
        UsageError: The ratio is outside (0, 1) or NaN, or leaves no visible or no masked unit.
    """
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


def visible_from_mask(mask: torch.Tensor, layout: TokenLayout) -> VisibleUnits:
    """Return the visible units from a mask: [b, mask units] bool, True = visible.

    Counting a boolean mask synchronises a GPU and breaks a compiled graph. So it is converted once,
    here; the model works with `keep_ids`. Training passes the indices of the visible units ([b, k]
    int64) in place of a mask.

    Raises:
        UsageError: The shape is wrong, or the rows do not all keep the same number of units, or
            keep none.
    """
    import torch

    if mask.dtype == torch.int64 and mask.dim() == 2 and mask.shape[1] < layout.windows:
        return visible_from_units(mask, layout)
    mask = mask.bool()
    if mask.dim() != 2 or mask.shape[1] != layout.windows:
        raise UsageError(
            f"mask has shape {tuple(mask.shape)}",
            f"expected [batch, {layout.windows}], True = visible",
        )
    counts = mask.sum(1)
    kept = int(counts[0])
    if kept == 0 or bool((counts != kept).any()):
        raise UsageError(
            f"mask rows keep {counts.tolist()} units", "keep the same number, at least one"
        )
    units = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
    return VisibleUnits(mask, _windows_of(units, layout))


def visible_from_units(units: torch.Tensor, layout: TokenLayout) -> VisibleUnits:
    """Return the visible units from their indices in grid order, [b, k] int64."""
    import torch

    hidden = torch.zeros(units.shape[0], layout.windows, dtype=torch.bool, device=units.device)
    mask = hidden.scatter(1, units, True)
    return VisibleUnits(mask, _windows_of(units, layout))


def _windows_of(units: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Map mask units, numbered in grid order, to their windows in ascending order. [b, k]"""
    if not layout.maskable:
        raise UsageError(
            f"mask units {layout.unit} of this model cannot be masked",
            "mask units must be a power of q_stride that survives every pool",
        )
    if layout.aligned_levels != layout.levels:  # windows are not numbered in grid order
        units = layout.unit_of_window(units.device).argsort()[units]
    return units.sort(dim=1).values


def gather_windows(x: torch.Tensor, keep_ids: torch.Tensor, windows: int) -> torch.Tensor:
    """Drop the windows that are not in `keep_ids`. b (w t) c, b k -> b (k t) c"""
    batch, _, channels = x.shape
    x = gather_rows(x.view(batch, windows, -1), keep_ids)
    return x.view(batch, -1, channels)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """b n c, b m -> b m c"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
