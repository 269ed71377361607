"""The last part of augmentation, on the device: bytes to numbers, random erasing, mixing."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .batch import Batch, Erasure
from .mixing import mix_views

# Area as a share of the view, and aspect ratio, of random erasing, as in timm and torchvision.
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
ATTEMPTS = 10  # to draw a box that fits


def draw_erasure(probability: float, height: int, width: int) -> Erasure | None:
    """Draw where a view is erased, with torch's global generator; None if it is not.

    Args:
        probability: Probability of erasing.
        height, width: Size of the view in pixels.
    """
    if probability <= 0 or torch.rand(()).item() >= probability:
        return None
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    for _ in range(ATTEMPTS):
        area = height * width * torch.empty(()).uniform_(*ERASED_AREA).item()
        ratio = math.exp(torch.empty(()).uniform_(low, high).item())
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top = int(torch.randint(height - rows + 1, ()))
            left = int(torch.randint(width - columns + 1, ()))
            seed = int(torch.randint(1 << 62, ()))
            return Erasure(top, left, rows, columns, seed)
    return None


@dataclass(frozen=True)
class FinishViews:
    """Normalises, erases and mixes the views of a training batch, on their device.

    Args:
        mean, std: Statistics of the channels, for pixels in [0, 1].
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with views that the model takes.

        `x` is uint8 [n r, c, (t,) height, width], and float32 of that shape in the result.
        """
        x = self.normalise(batch.x)
        for row, erasure in batch.erasures:
            erase(x[row], erasure)
        if batch.mixes:
            x = mix_views(x, batch.repeats, batch.mixes)
        return replace(batch, x=x)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, c, ...] -> float32 [n, c, ...]"""
        shape = (-1, *[1] * (pixels.dim() - 2))
        mean, std = (_constant(tuple(v), pixels.device).view(shape) for v in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return values as a tensor on a device. It is copied there once, because the host waits."""
    return torch.tensor(values, device=device)


def erase(view: torch.Tensor, erasure: Erasure) -> None:
    """Replace a box of a view [c, (t,) height, width] by noise, in place. All frames of a clip get
    the same noise."""
    top, left, rows, columns, seed = erasure
    generator = torch.Generator(view.device).manual_seed(seed)
    noise = torch.randn(len(view), rows, columns, generator=generator, device=view.device)
    if view.dim() == 4:
        noise = noise[:, None]
    view[..., top : top + rows, left : left + columns] = noise
