"""Keep the decoded frames of clips in the smallest form, in memory that the device can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..transforms import CropGrid
from .video_reader import DecodedFrame
from .yuv_layout import YuvLayout

# Largest size of a resized frame, in multiples of the part that the crops need.
MAX_RESIZED = 3


@dataclass(frozen=True)
class FrameStore:
    """Where the frames of clips are kept, and in which form.

    Attributes:
        empty: Returns memory for an array of a shape and a dtype.
        takes_planes: Whether frames may be planes, see `YuvLayout`: where the model's device turns
            them into RGB. Otherwise they are RGB.
    """

    empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty
    takes_planes: bool = False


ON_HOST = FrameStore()


class KeptFrames:
    """The frames of a segment, each in the form that is smallest: as it is decoded, or the resized
    part of it that the crops need.

    Args:
        store: Where they are kept.
        count: Number of frames.
        size: (height, width) of a crop.
        crops: Number of crops.

    Attributes:
        frames: uint8 [n, height, width, 3], float32 [n, rows, columns, 3], resized; or uint8
            [n, bytes] with a `layout`. None until the first frame is put.
        layout: How planes lie in `frames`, or None for RGB.
        grid: What the crops need of the first frame.
    """

    def __init__(self, store: FrameStore, count: int, size: tuple[int, int], crops: int) -> None:
        self._store, self._count, self._size, self._crops = store, count, size, crops
        self._rgb_size = (0, 0)
        self.frames: np.ndarray | None = None
        self.layout: YuvLayout | None = None
        self.grid: CropGrid

    def put(self, row: int, decoded: DecodedFrame) -> None:
        """Keep a frame. Rows follow one another, from 0 on."""
        if self.frames is None:
            self._begin(decoded)
        elif self.layout is not None and decoded.layout != self.layout:
            self._leave_planes(row)
        if self.layout is None:
            self._put_rgb(row, decoded.pixels)
        else:
            assert self.frames is not None
            self.frames[row] = decoded.pixels

    def _begin(self, decoded: DecodedFrame) -> None:
        """Allocate memory for frames like the first one."""
        self.layout = decoded.layout
        if self.layout is None:
            height, width = decoded.pixels.shape[:2]
            self._begin_rgb((height, width))
        else:
            self.grid = CropGrid.for_crops(*self.layout.size, self._size, self._crops)
            self.frames = self._store.empty((self._count, self.layout.nbytes), np.uint8)

    def _begin_rgb(self, size: tuple[int, int]) -> None:
        self._rgb_size = size
        self.grid = grid = CropGrid.for_crops(*size, self._size, self._crops)
        if is_smaller_unresized(3 * size[0] * size[1], grid):
            self.frames = self._store.empty((self._count, *size, 3), np.uint8)
        else:
            self.frames = self._store.empty((self._count, len(grid.y), len(grid.x), 3), np.float32)

    def _put_rgb(self, row: int, pixels: np.ndarray) -> None:
        pixels = _at_size(pixels, self._rgb_size)
        assert self.frames is not None
        self.frames[row] = pixels if self.frames.dtype == np.uint8 else self.grid.sample(pixels)

    def _leave_planes(self, count: int) -> None:
        """Turn the frames that are kept into RGB, because the next one has other planes, or none.

        Args:
            count: Number of frames that are kept.
        """
        packed, layout = self.frames, self.layout
        assert packed is not None and layout is not None
        self.layout = None
        self._begin_rgb(layout.size)
        for row in range(count):
            frame = torch.from_numpy(packed[row : row + 1])
            self._put_rgb(row, layout.to_rgb(frame)[0].numpy())


def keeps_planes(layout: YuvLayout, size: tuple[int, int], crops: int) -> bool:
    """Return whether the planes of a frame are smaller than the resized part of it that the crops
    need.

    Args:
        layout: Of the planes.
        size: (height, width) of a crop.
        crops: Number of crops.
    """
    grid = CropGrid.for_crops(*layout.size, size, crops)
    return is_smaller_unresized(layout.nbytes, grid)


def is_smaller_unresized(nbytes: int, grid: CropGrid) -> bool:
    """Return whether a frame needs less memory as it is than resized, in float32.

    Very long frames are large when they are resized whole, so these are resized in part.

    Args:
        nbytes: Size of the frame as it is.
        grid: What the crops need of it.
    """
    resized = 3 * np.float32().itemsize * len(grid.y) * len(grid.x)
    return nbytes <= resized and not is_long(grid)


def is_long(grid: CropGrid) -> bool:
    """Return whether a resized frame is much larger than the part of it that the crops need."""
    return grid.scaled[0] * grid.scaled[1] > MAX_RESIZED * len(grid.y) * len(grid.x)


def _at_size(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a frame at the size of the first one, which another rotation can change."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
