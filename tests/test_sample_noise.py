"""Tests of drop path and dropout that are drawn for each view of the batch of all processes."""

from __future__ import annotations

import numpy as np
import torch

import hiera_core
from hiera_core.models.layers import Dropout, DropPath
from hiera_core.training.steps.sample_noise import SampleNoise, uniform_rows

CONFIG = {"embed_dim": 8, "stages": (1, 1, 1), "drop_path_rate": 0.5, "head_dropout": 0.25}


def factors_of(seed: int, views: int, step: int, first: int) -> tuple[list[torch.Tensor], ...]:
    """Return the factors of the drop paths [2, b] and the dropouts [b, c] of a small model."""
    model = hiera_core.create_model("hiera_nano_32", **CONFIG)
    noise = SampleNoise(model, seed, views, torch.device("cpu"))
    noise.draw(step, first)
    paths = [m.factors for m in model.modules() if isinstance(m, DropPath)]
    dropouts = [m.factors for m in model.modules() if isinstance(m, Dropout)]
    return paths, dropouts


def test_rows_do_not_depend_on_where_a_draw_begins() -> None:
    whole = uniform_rows(5, 0, 40, 7)
    parts = [uniform_rows(5, first, 10, 7) for first in (0, 10, 20, 30)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(uniform_rows(6, 0, 40, 7), whole).any()
    many = uniform_rows(5, 0, 10_000, 2)
    assert abs(many.mean() - 0.5) < 0.01 and many.min() >= 0 and many.max() < 1


def test_two_halves_of_a_batch_get_what_the_whole_gets() -> None:
    whole, halves = factors_of(1, 24, 9, 0), [factors_of(1, 12, 9, first) for first in (0, 12)]
    for of_whole, first, second in zip(*([*f[0], *f[1]] for f in (whole, *halves)), strict=True):
        axis = 0 if of_whole.shape[0] == 24 else 1  # dropout [b, c], drop path [2, b]
        assert torch.equal(torch.cat([first, second], axis), of_whole)
    other_step, other_seed = factors_of(1, 24, 10, 0), factors_of(2, 24, 9, 0)
    for other in (other_step, other_seed):
        assert not torch.equal(other[0][-1], whole[0][-1])


def test_factors_have_the_rates_of_the_layers() -> None:
    (first, last), (dropout,) = factors_of(3, 2000, 0, 0)  # the rates are 0 (no layer), 0.25, 0.5
    for factors, rate in ((first, 0.25), (last, 0.5), (dropout, 0.25)):
        assert factors.unique().tolist() == torch.tensor([0, 1 / (1 - rate)]).tolist()
        assert abs(float(factors.mean()) - 1) < 0.1
    assert not torch.equal(last[0], last[1])  # the branches of a block are dropped on their own


def test_layers_apply_the_factors_in_training_only() -> None:
    drop, x = DropPath(0.5), torch.ones(3, 2, 4)
    drop.factors = torch.tensor([[0.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    assert drop(x)[:, 0, 0].tolist() == [0, 2, 0]
    assert drop(x, 1)[:, 0, 0].tolist() == [2, 2, 0]
    assert drop(x.bfloat16(), 1).dtype is torch.bfloat16
    assert torch.equal(drop.eval()(x), x)
    dropout = Dropout(0.5)
    dropout.factors = torch.tensor([[0.0, 2.0]])
    assert dropout(torch.ones(1, 2)).tolist() == [[0, 2]]
    assert torch.equal(dropout.eval()(x), x)
