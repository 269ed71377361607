"""Random augmentation of training samples. All frames of a clip get the same augmentation.

Random numbers come from torch's global generator, which the caller seeds for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from .settings.recipe_parts import AugmentSettings

# Scale of timm's RandAugment. On this scale, the paper's magnitudes are 9 (images) and 7 (video).
MAX_MAGNITUDE = 10
MAGNITUDE_BINS = 31  # number of magnitudes in torchvision's RandAugment


class Augment:
    """Crop, flip, RandAugment, normalisation and random erasing.

    Args:
        settings: The recipe's augmentation settings.
        size: Height and width that the model takes, in pixels.
        mean, std: Statistics of the channels, for pixels in [0, 1].
        interpolation: `bicubic` or `bilinear`, both with antialiasing.
        grey: Whether the model takes one channel, of grey values.
    """

    def __init__(
        self,
        settings: AugmentSettings,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
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
        self.normalise_and_erase = v2.Compose(
            [
                *([v2.Grayscale()] if grey else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
                # Erased pixels become Gaussian noise, as in timm's mode "pixel".
                v2.RandomErasing(settings.erasing, value="random"),
            ]
        )

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Augment an image or a clip.

        uint8 [y, x, 3] -> float32 [c, height, width]; [t, y, x, 3] -> [c, t, height, width].
        c is 3, or 1 with `grey`.
        """
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)
        is_video = tensor.dim() == 4
        x = self.crop_and_flip(tv_tensors.Video(tensor) if is_video else tv_tensors.Image(tensor))
        if self.settings.randaugment:
            x = self._randaugment()(x)
        x = self.normalise_and_erase(x).as_subclass(torch.Tensor)
        return x.transpose(0, 1).contiguous() if is_video else x

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


def mix(
    pair: torch.Tensor, labels: torch.Tensor, settings: AugmentSettings, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply mixup or CutMix, chosen at random, to a pair of samples.

    CutMix of clips pastes the same region of every frame.

    Args:
        pair: Two samples, [2, 3, (t,) height, width].
        labels: Their class indices, [2].
        settings: The recipe's augmentation settings; `mixup` or `cutmix` is above 0.
        num_classes: Number of classes.

    Returns:
        The mixed samples, in the shape of `pair`, and their targets [2, classes].
    """
    choices = [
        transform(alpha=alpha, num_classes=num_classes)
        for transform, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
        if alpha > 0
    ]
    choice = choices[int(torch.randint(len(choices), ()))]
    if pair.dim() == 4:
        mixed, targets = choice(pair, labels)
    else:
        mixed, targets = choice(tv_tensors.Video(pair.transpose(1, 2)), labels)
        mixed = mixed.as_subclass(torch.Tensor).transpose(1, 2)
    return mixed, targets
