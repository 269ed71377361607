"""Tests of preprocessing that comes with a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from hiera_core.data.transforms import ImageTransform, VideoTransform
from hiera_core.errors import CheckpointError


@pytest.mark.parametrize(
    "saved",
    [
        {"resize": 22_400_000},
        {"size": [1, 1000], "resize": 100},
        {"std": [0.2, 0.0, 0.2]},
        {"std": [0.2, -0.2, 0.2]},
        {"mean": [float("nan")] * 3},
    ],
    ids=repr,
)
def test_preprocessing_that_cannot_be_right_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="preprocessing is not usable"):
        ImageTransform.from_preprocessing(saved, (224, 224))
    if not {"resize", "size"} & set(saved):
        with pytest.raises(CheckpointError, match="preprocessing is not usable"):
            VideoTransform.from_preprocessing(saved, (16, 224, 224))


def test_usual_crops_are_allowed() -> None:
    for resize in (224, 256, 448, 8 * 224):
        assert ImageTransform.from_preprocessing({"resize": resize}, (224, 224)).resize == resize
