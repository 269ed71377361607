"""Tests of mixup and CutMix: the same as torchvision's, for a whole batch at once."""

from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from hiera_core.training.loading.mixing import PairMix, draw_mix, mix_targets, mix_views
from hiera_core.training.settings.recipe_parts import AugmentSettings


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("is_video", [False, True])
def test_a_pair_is_mixed_as_torchvision_does(mixup: float, cutmix: float, is_video: bool) -> None:
    settings = AugmentSettings(mixup=mixup, cutmix=cutmix)
    transform = (v2.MixUp if mixup else v2.CutMix)(alpha=mixup or cutmix, num_classes=5)
    labels = torch.tensor([1, 3])
    for seed in range(20):
        pair = torch.randn(2, 3, 4, 20, 30) if is_video else torch.randn(2, 3, 20, 30)
        torch.manual_seed(seed)
        mix = draw_mix(settings, 20, 30)
        torch.manual_seed(seed)
        torch.randint(1, ())  # the choice of the kind
        frames_first = tv_tensors.Video(pair.transpose(1, 2)) if is_video else pair
        expected, targets = transform(frames_first, labels)
        expected = expected.as_subclass(torch.Tensor)
        expected = expected.transpose(1, 2) if is_video else expected
        torch.testing.assert_close(mix_views(pair, 1, [mix]), expected)
        one_hot = torch.nn.functional.one_hot(labels, 5).float()
        torch.testing.assert_close(mix_targets(one_hot, mix), targets)


def test_each_view_of_a_batch_has_its_own_mix() -> None:
    """Two pairs of samples with two repeats each: one is left alone, one blended, two cut."""
    x = torch.randn(8, 3, 8, 8)
    mixes = [
        PairMix(),
        PairMix(0.25, 0.25),
        PairMix(0.5, 1.0, (0, 0, 8, 4)),
        PairMix(0.75, 1.0, (2, 2, 6, 6)),
    ]
    mixed = mix_views(x, 2, mixes)
    torch.testing.assert_close(mixed[[0, 2]], x[[0, 2]])  # repeat 0 of samples 0 and 1
    torch.testing.assert_close(mixed[1], 0.25 * x[1] + 0.75 * x[3])
    torch.testing.assert_close(mixed[3], 0.25 * x[3] + 0.75 * x[1])
    torch.testing.assert_close(mixed[4, :, :, :4], x[6, :, :, :4])
    torch.testing.assert_close(mixed[4, :, :, 4:], x[4, :, :, 4:])
    torch.testing.assert_close(mixed[7, :, 2:6, 2:6], x[5, :, 2:6, 2:6])
    assert torch.equal(mixed[7, :, :2], x[7, :, :2])
