"""Random changes to training samples. All frames of a clip get the same ones.

Randomness comes from torch's global generator, which the caller seeds for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from .recipe import AugmentSettings

MAGNITUDES = 10  # timm's scale, in which the paper's "9" is meant
BINS = 31  # torchvision's


class Augment:
    """Crop, flip, RandAugment, normalise, erase.

    Args:
        part: the recipe's.
        size: height and width the model takes.
        mean, std: of channels scaled to [0, 1].
        interpolation: `bicubic` or `bilinear`, both with antialias.
    """

    def __init__(
        self,
        part: AugmentSettings,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
    ) -> None:
        self.part, self.fill = part, [round(255 * m) for m in mean]
        self.interpolation = InterpolationMode(interpolation)
        self.first = v2.Compose(
            [
                v2.RandomResizedCrop(
                    list(size), part.scale, part.ratio, self.interpolation, antialias=True
                ),
                v2.RandomHorizontalFlip(part.flip),
            ]
        )
        self.last = v2.Compose(
            [
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
                # Noise as large as the pixels' own (timm's mode "pixel").
                v2.RandomErasing(part.erasing, value="random"),
            ]
        )

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [y, x, 3] -> float32 [3, height, width]; [t, y, x, 3] -> [3, t, height, width]."""
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)
        video = tensor.dim() == 4
        x = self.first(tv_tensors.Video(tensor) if video else tv_tensors.Image(tensor))
        if self.part.randaugment:
            x = self._randaugment()(x)
        x = self.last(x).as_subclass(torch.Tensor)
        return x.transpose(0, 1).contiguous() if video else x

    def _randaugment(self) -> v2.RandAugment:
        """Its magnitude is drawn for each sample, as timm's `m9-mstd0.5` has it."""
        drawn = self.part.randaugment + self.part.randaugment_std * torch.randn(()).item()
        level = min(max(drawn, 0.0), MAGNITUDES) / MAGNITUDES
        return v2.RandAugment(
            self.part.randaugment_ops,
            round(level * (BINS - 1)),
            BINS,
            interpolation=InterpolationMode.BILINEAR,
            fill=self.fill,
        )


def mix(
    pair: torch.Tensor, labels: torch.Tensor, part: AugmentSettings, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or cutmix of two samples; of a clip, the same region of every frame.

    Args:
        pair: [2, 3, (t,) height, width].
        labels: [2] class numbers.

    Returns:
        the same shape, and targets [2, classes].
    """
    choices = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, part.mixup), (v2.CutMix, part.cutmix))
        if alpha > 0
    ]
    choice = choices[int(torch.randint(len(choices), ()))]
    if pair.dim() == 4:
        mixed, targets = choice(pair, labels)
    else:
        mixed, targets = choice(tv_tensors.Video(pair.transpose(1, 2)), labels)
        mixed = mixed.as_subclass(torch.Tensor).transpose(1, 2)
    return mixed, targets
