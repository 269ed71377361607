"""Random augmentation of training samples, in bytes. All frames of a clip get the same.

Normalisation, erasing and mixing follow on the device, see `FinishViews`.

Random numbers come from torch's global generator, which the caller seeds for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from .loading.batch import Erasure
from .loading.finish_views import draw_erasure
from .settings.recipe_parts import AugmentSettings

# Scale of timm's RandAugment. On this scale, the paper's magnitudes are 9 (images) and 7 (video).
MAX_MAGNITUDE = 10
MAGNITUDE_BINS = 31  # number of magnitudes in torchvision's RandAugment


class Augment:
    """Crop, flip, RandAugment, and the draw of random erasing.

    Args:
        settings: The recipe's augmentation settings.
        size: Height and width that the model takes, in pixels.
        mean: Means of the channels, for pixels in [0, 1].
        interpolation: `bicubic` or `bilinear`, both with antialiasing.
        grey: Whether the model takes one channel, of grey values.
    """

    def __init__(
        self,
        settings: AugmentSettings,
        size: Sequence[int],
        mean: Sequence[float],
        interpolation: str = "bicubic",
        grey: bool = False,
    ) -> None:
        self.settings, self.fill = settings, [round(255 * m) for m in mean] * (3 if grey else 1)
        self.interpolation = InterpolationMode(interpolation)
        self.crop_and_flip = v2.Compose(
            [
                v2.RandomResizedCrop(
                    list(size), settings.scale, settings.ratio, self.interpolation, antialias=True
                ),
                v2.RandomHorizontalFlip(settings.flip),
            ]
        )
        self.to_grey = v2.Grayscale() if grey else None

    def __call__(self, pixels: np.ndarray) -> tuple[torch.Tensor, Erasure | None]:
        """Augment an image or a clip, and draw where it is to be erased.

        uint8 [y, x, 3] -> uint8 [c, height, width]; [t, y, x, 3] -> [c, t, height, width].
        c is 3, or 1 with `grey`.
        """
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)
        is_video = tensor.dim() == 4
        x = self.crop_and_flip(tv_tensors.Video(tensor) if is_video else tv_tensors.Image(tensor))
        if self.settings.randaugment:
            x = self._randaugment()(x)
        if self.to_grey is not None:
            x = self.to_grey(x)
        x = x.as_subclass(torch.Tensor)
        erasure = draw_erasure(self.settings.erasing, *x.shape[-2:])
        return (x.transpose(0, 1) if is_video else x).contiguous(), erasure

    def _randaugment(self) -> v2.RandAugment:
        """Return RandAugment with a random magnitude, as in timm's `m9-mstd0.5`."""
        settings = self.settings
        magnitude = settings.randaugment + settings.randaugment_std * torch.randn(()).item()
        level = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
        return v2.RandAugment(
            settings.randaugment_ops,
            round(level * (MAGNITUDE_BINS - 1)),
            MAGNITUDE_BINS,
            interpolation=InterpolationMode.BILINEAR,
            fill=self.fill,
        )
