"""Tests of what happens to views on the device: normalisation and random erasing."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from hiera_core.training.dataloader import Batch, Collator, LoadedSample
from hiera_core.training.loading.batch import Erasure
from hiera_core.training.loading.finish_views import FinishViews, draw_erasure, erase
from hiera_core.training.sampler import SampleKey

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_views_are_normalised_as_in_the_worker() -> None:
    pixels = torch.randint(256, (4, 3, 9, 7), dtype=torch.uint8)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(pixels)
    finish = FinishViews(MEAN, STD)
    torch.testing.assert_close(finish.normalise(pixels), expected, rtol=0, atol=1e-6)
    clip = pixels.transpose(0, 1)[None]
    torch.testing.assert_close(
        finish.normalise(clip)[0], expected.transpose(0, 1), atol=1e-6, rtol=0
    )


def test_a_batch_of_bytes_is_a_quarter_as_large() -> None:
    """What workers send, and what is pinned and copied to the device."""
    views = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    erasure = Erasure(2, 3, 5, 6, 7)
    items = [
        LoadedSample(SampleKey(0, 0), views, erasures=(None, erasure)),
        LoadedSample(SampleKey(0, 1), error="damaged"),
    ]
    collate = Collator((3, 16, 16), None)
    collate.repeats = 2
    batch = collate(items)
    assert batch.x.dtype is torch.uint8 and batch.erasures == ((1, erasure),)
    finished = FinishViews(MEAN, STD)(batch)
    assert finished.x.dtype is torch.float32 and finished.x.shape == batch.x.shape
    assert finished.x.nbytes == 4 * batch.x.nbytes
    untouched = FinishViews(MEAN, STD).normalise(batch.x)
    changed = (finished.x != untouched).any(1)  # n, y, x
    assert changed[1, 2:7, 3:9].all() and int(changed.sum()) == 5 * 6
    assert isinstance(finished, Batch) and finished.weight.tolist() == [1, 1, 0, 0]


def test_noise_depends_on_the_seed_of_the_view_alone() -> None:
    view = torch.zeros(3, 16, 16)
    others = [torch.zeros(3, 16, 16) for _ in range(2)]
    erase(view, Erasure(0, 0, 8, 8, 5))
    torch.manual_seed(1)
    for other, seed in zip(others, (5, 6), strict=True):
        erase(other, Erasure(0, 0, 8, 8, seed))
    assert torch.equal(view, others[0]) and not torch.equal(view, others[1])
    clip = torch.zeros(3, 4, 16, 16)
    erase(clip, Erasure(0, 0, 8, 8, 5))
    assert torch.equal(clip, view[:, None].expand_as(clip))


def test_erased_boxes_have_the_area_and_the_share_of_the_recipe() -> None:
    torch.manual_seed(0)
    drawn = [draw_erasure(0.25, 40, 60) for _ in range(2000)]
    boxes = [erasure for erasure in drawn if erasure is not None]
    assert 0.2 < len(boxes) / len(drawn) < 0.3
    shares = [box.height * box.width / (40 * 60) for box in boxes]
    assert min(shares) > 0.015 and max(shares) < 0.35
    assert abs(sum(shares) / len(shares) - 0.17) < 0.02
    assert all(box.top + box.height <= 40 and box.left + box.width <= 60 for box in boxes)
    assert draw_erasure(0.0, 40, 60) is None
