"""Frames of a video as its decoder makes them: a plane of brightness (Y), and two planes of colour
(U, V) of half its height and width. That is half the size of RGB.

`YuvLayout.to_rgb` returns the pixels that swscale, FFmpeg's library for colours, makes of them on
x86 processors, bit for bit: products of 16 bits that are rounded down, and one colour for each
square of four pixels (libswscale/yuv2rgb.c, libswscale/x86/yuv_2_rgb.asm). The library differs
between processors, and its use between versions of PyAV, so `planar_video` compares both on noise
before it relies on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

# Weights of red and blue in the brightness, of each standard.
WEIGHTS = {
    "BT.601": (0.299, 0.114),
    "BT.709": (0.2126, 0.0722),
    "BT.2020": (0.2627, 0.0593),
    "SMPTE 240M": (0.212, 0.087),
    "FCC": (0.30, 0.11),
}
# Levels of black and white: 16 to 235, and 16 to 240 for colours, unless the range is full.
BLACK, LEVELS, COLOUR_LEVELS = 16, 219, 224


@dataclass(frozen=True)
class Conversion:
    """Coefficients of a conversion to RGB, in units of 1 / 8192, as swscale rounds them."""

    y: int
    v_red: int
    u_blue: int
    u_green: int
    v_green: int
    black: int  # level of black, in eighths

    @classmethod
    def of(cls, red: float, blue: float, is_full: bool) -> Conversion:
        """Return the conversion of a standard.

        Args:
            red, blue: See `WEIGHTS`.
            is_full: Whether levels are those of the full range, 0 to 255.
        """
        green = 1 - red - blue
        factors = (
            2 * (1 - red),
            2 * (1 - blue),
            -2 * blue * (1 - blue) / green,
            -2 * red * (1 - red) / green,
        )
        # swscale keeps the coefficients of the limited range, in units of 1 / 65536.
        known = [round(factor * 255 / COLOUR_LEVELS * 65536) for factor in factors]
        if is_full:
            known = [int(number * COLOUR_LEVELS / 255) for number in known]
        y = 65536 if is_full else 65536 * 255 // LEVELS
        y, v_red, u_blue, u_green, v_green = ((number + 4) >> 3 for number in (y, *known))
        return cls(y, v_red, u_blue, u_green, v_green, 0 if is_full else 8 * BLACK)


@dataclass(frozen=True)
class YuvLayout:
    """How a frame lies in a row of bytes: Y, U and V, each [rows, columns].

    Attributes:
        height, width: Of the frame as it is decoded, in pixels.
        turns: Counterclockwise quarter turns that make it upright.
        conversion: How its pixels become RGB.
    """

    height: int
    width: int
    turns: int
    conversion: Conversion

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright frame."""
        return (self.width, self.height) if self.turns % 2 else (self.height, self.width)

    @property
    def nbytes(self) -> int:
        """Size of a frame in bytes."""
        return sum(rows * columns for rows, columns in self._planes)

    @property
    def _planes(self) -> tuple[tuple[int, int], ...]:
        colour = (self.height + 1) // 2, (self.width + 1) // 2
        return (self.height, self.width), colour, colour

    def pack(self, frame: Any) -> np.ndarray:
        """Return the planes of a decoded frame of PyAV. -> uint8 [nbytes]"""
        planes = (
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:rows, :columns].ravel()
            for plane, (rows, columns) in zip(frame.planes, self._planes, strict=True)
        )
        return np.concatenate([*planes])

    def to_rgb(self, frames: torch.Tensor) -> torch.Tensor:
        """Return upright frames in RGB. Same device.

        uint8 [n, nbytes] -> uint8 [n, height, width, 3]
        """
        known = self.conversion
        parts = frames.split([rows * columns for rows, columns in self._planes], 1)
        y, u, v = (
            part.unflatten(1, plane).to(torch.int32).mul(8)
            for part, plane in zip(parts, self._planes, strict=True)
        )
        y, u, v = y - known.black, u - 8 * 128, v - 8 * 128
        colour = torch.stack(
            [
                _product(v, known.v_red),
                _product(u, known.u_green) + _product(v, known.v_green),
                _product(u, known.u_blue),
            ],
            -1,
        )
        rows, columns = colour.shape[1:3]
        grey = _product(y, known.y)
        grey = functional.pad(grey, (0, 2 * columns - self.width, 0, 2 * rows - self.height))
        squares = grey.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
        # n rows 2 columns 2 -> n rows 2 columns 2 3
        rgb = squares[..., None] + colour[:, :, None, :, None]
        rgb = rgb.clamp_(0, 255).to(torch.uint8).flatten(3, 4).flatten(1, 2)
        rgb = rgb[:, : self.height, : self.width]
        return torch.rot90(rgb, self.turns, (1, 2)) if self.turns % 4 else rgb


def _product(levels: torch.Tensor, coefficient: int) -> torch.Tensor:
    """Return the upper 16 bits of products. int32 -> int16"""
    return (levels * coefficient >> 16).to(torch.int16)
