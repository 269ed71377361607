"""Tests of splits, orders and weights for classes of unequal size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiera_core.data import datasets
from hiera_core.data.classes.class_balance import balanced_order, balanced_weights, held_out_rows
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader
from hiera_core.training.dataloader import Batch
from hiera_core.training.losses import compute_losses
from hiera_core.training.sampler import StepSampler

LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3], [100, 41, 9, 1]))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_class_is_held_out_in_proportion(share: float) -> None:
    rows = held_out_rows(len(LABELS), share, LABELS)
    assert len(rows) == round(share * len(LABELS)) == len(np.unique(rows))
    held_out = np.bincount(LABELS[rows], minlength=4)
    assert (abs(held_out - share * np.bincount(LABELS)) <= 1).all()
    assert held_out[3] == 0  # the only sample of a class is for training
    assert np.array_equal(rows, held_out_rows(len(LABELS), share, LABELS))
    assert not np.array_equal(rows, np.arange(len(rows)))


def test_built_in_data_keeps_the_split_of_the_bundled_models() -> None:
    found = datasets.open_splits("digits")
    assert found.val is not None and found.val.labels is not None
    order = np.random.default_rng(0).permutation(1797)
    names = [source.name for source in found.val.sources]
    assert names == [f"digits/{row:04}.png" for row in sorted(order[:359])]


def test_a_balanced_pass_has_all_classes_equally_often() -> None:
    order = balanced_order(LABELS, 5)
    assert len(order) == len(LABELS)
    counts = np.bincount(LABELS[order])
    assert counts.max() - counts.min() <= 1
    times = np.bincount(order, minlength=len(LABELS))
    for number in range(4):
        own = times[number == LABELS]
        assert own.max() - own.min() <= 1
    assert np.array_equal(order, balanced_order(LABELS, 5))
    assert not np.array_equal(order, balanced_order(LABELS, 6))
    recipe = recipe_reader.read_recipe("hiera_nano_32", {"data.balanced": True, "batch_size": 50})
    batches = StepSampler(len(LABELS), recipe, labels=LABELS).batches()
    drawn = [key.sample for _ in range(3) for key in next(batches)]
    assert np.bincount(LABELS[drawn]).min() > 25


def test_the_mean_weight_of_samples_is_one() -> None:
    weights = balanced_weights(LABELS, 6)
    assert weights[LABELS].mean() == pytest.approx(1.0)
    assert weights[4:].tolist() == [0, 0]
    sums = [weights[LABELS[number == LABELS]].sum() for number in range(4)]
    assert sums == pytest.approx([sums[0]] * 4)


def test_the_loss_is_weighted() -> None:
    class Logits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    recipe = recipe_reader.read_recipe("hiera_nano_32", {"augment.label_smoothing": 0})
    batch = Batch(torch.randn(3, 2), torch.ones(3), torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    plain = compute_losses(Logits(), batch, recipe, torch.float32).losses
    weights = torch.tensor([1.0, 3.0])
    found = compute_losses(Logits(), batch, recipe, torch.float32, weights).losses
    assert found[:2].tolist() == pytest.approx((plain[:2] * weights).tolist())
    logs = batch.x[2].log_softmax(0)
    assert float(found[2]) == pytest.approx(float(-(0.5 * logs[0] + 1.5 * logs[1])))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("mae_hiera_nano_32", {"data.balanced": True}, "data.balanced needs classes"),
        ("mae_hiera_nano_32", {"class_weights": "balanced"}, "class_weights needs classes"),
        ("hiera_nano_32", {"class_weights": "inverse"}, "class_weights is 'inverse'"),
        (
            "hiera_nano_32",
            {"class_weights": "balanced", "data.balanced": True},
            "are both given",
        ),
    ],
)
def test_wrong_settings_are_refused(model: str, settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_reader.read_recipe(model, settings)
