"""Mixup and CutMix of pairs of samples: drawn where a batch is collated, applied on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..settings.recipe_parts import AugmentSettings

Box = tuple[int, int, int, int]  # y1, x1, y2, x2 in pixels
NO_BOX: Box = (0, 0, 0, 0)


@dataclass(frozen=True)
class PairMix:
    """How two samples are mixed.

    Attributes:
        share: Share of the own sample in the target.
        blend: Share of the own sample in the pixels: that of mixup, and 1 for CutMix.
        box: Where CutMix takes the pixels of the other sample; empty for mixup.
    """

    share: float = 1.0
    blend: float = 1.0
    box: Box = NO_BOX


def draw_mix(settings: AugmentSettings, height: int, width: int) -> PairMix:
    """Draw how a pair is mixed, by mixup or CutMix, whichever chance chooses. Random numbers come
    from torch's global generator, in the order of torchvision's `MixUp` and `CutMix`.

    Args:
        settings: The recipe's augmentation settings; `mixup` or `cutmix` is above 0.
        height, width: Size of a view in pixels.
    """
    alphas = [("mixup", settings.mixup), ("cutmix", settings.cutmix)]
    choices = [(kind, alpha) for kind, alpha in alphas if alpha > 0]
    kind, alpha = choices[int(torch.randint(len(choices), ()))]
    concentration = torch.tensor([float(alpha)])
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    if kind == "mixup":
        return PairMix(share, share)
    x, y = int(torch.randint(width, (1,))), int(torch.randint(height, (1,)))
    half = 0.5 * math.sqrt(1.0 - share)
    half_width, half_height = int(half * width), int(half * height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    share = 1.0 - (bottom - top) * (right - left) / (height * width)
    return PairMix(share, 1.0, (top, left, bottom, right))


def mix_targets(targets: torch.Tensor, mix: PairMix) -> torch.Tensor:
    """Return the targets of a mixed pair. [2, classes] -> [2, classes]"""
    return targets.flip(0).mul(1.0 - mix.share).add(targets.mul(mix.share))


def mix_views(x: torch.Tensor, repeats: int, mixes: list[PairMix]) -> torch.Tensor:
    """Return the views of a batch, mixed.

    Args:
        x: [n r, c, (t,) height, width]; samples 0 and 1 are a pair, 2 and 3, and so on.
        repeats: Number of views r of each sample.
        mixes: For each view of each pair, [n / 2 * r].
    """
    pairs = x.unflatten(0, (-1, 2, repeats))
    others = pairs.flip(1)
    if any(mix.blend != 1.0 for mix in mixes):
        blends = torch.tensor([mix.blend for mix in mixes], dtype=x.dtype).view(-1, 1, repeats)
        blends = blends.to(x.device, non_blocking=True)
        blends = blends.view(*blends.shape, *[1] * (x.dim() - 1))
        pairs = others * (1.0 - blends) + pairs * blends
    else:
        pairs = pairs.clone()
    for number, mix in enumerate(mixes):
        top, left, bottom, right = mix.box
        if bottom > top and right > left:
            place = (number // repeats, slice(None), number % repeats, ...)
            region = (*place, slice(top, bottom), slice(left, right))
            pairs[region] = others[region]
    return pairs.flatten(0, 2)
