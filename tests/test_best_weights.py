"""Tests of the weights with the best measurement of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader
from hiera_core.training.judging.best_weights import BestWeights

pytestmark = pytest.mark.usefixtures("quick_curves")

SPLITS = datasets.open_splits("shapes")
NO_VAL = datasets.Splits(SPLITS.train)
NARROW = {"embed_dim": 8, "stages": (1, 1, 1)}


def recipe_of(model: str = "hiera_nano_32", **settings: Any) -> hiera_core.Recipe:
    chosen = {key.replace("__", "."): value for key, value in settings.items()}
    return recipe_reader.read_recipe(model, chosen)


def test_a_loss_is_better_if_it_is_lower_and_an_accuracy_if_higher() -> None:
    loss = BestWeights(recipe_of(keep_best="loss"), SPLITS)
    values = [{"val": {"loss": value}} for value in (2.0, 1.0, 1.0, 1.5, 0.5)]
    assert [loss.improves(each) for each in values] == [True, True, False, False, True]
    top1 = BestWeights(recipe_of(keep_best="top1"), SPLITS, 50.0)  # of a run that resumes
    values = [{"val": {"loss": 1.0, "top1": value}} for value in (40.0, 60.0, 60.0, 70.0)]
    assert [top1.improves(each) for each in values] == [False, True, False, True]
    probe = BestWeights(recipe_of("mae_hiera_nano_32", keep_best="probe", probe__every=1), SPLITS)
    assert not probe.improves({"val": {"loss": 1.0}})
    assert not probe.improves({"probe": {"top1": float("nan")}})
    assert probe.improves({"probe": {"top1": 3.0}})
    assert not BestWeights(recipe_of(), NO_VAL).improves({"val": {"loss": 1.0}})


def test_measurements_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="keep_best is top1, and an autoencoder has no classes"):
        recipe_of("mae_hiera_nano_32", keep_best="top1")
    with pytest.raises(UsageError, match="keep_best is probe, and the recipe has none"):
        recipe_of(keep_best="probe")
    with pytest.raises(UsageError, match="keep_best is loss, and no data is held out"):
        BestWeights(recipe_of(keep_best="loss"), NO_VAL)


def test_a_run_exports_its_best_weights(tmp_path: Path) -> None:
    """The learning rate is so high that the last weights are not the best ones."""
    found = datasets.open_dataset("digits")
    splits = datasets.Splits(found.subset(range(96)), found.subset(range(96, 160)))
    recipe = recipe_of(
        model__config=NARROW, batch_size=32, schedule__epochs=4, schedule__warmup_epochs=0,
        schedule__kind="constant", optimizer__lr=0.05, val_every=0.34, keep_best="loss",
    )  # fmt: skip
    options = hiera_core.RunOptions(workers=0, live=False)
    hiera_core.train(recipe, splits, tmp_path / "run", options=options)
    events = list(map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()))
    measured = {e["step"]: e["loss"] for e in events if e["event"] == "val"}
    best = min(measured, key=lambda step: measured[step])
    assert [e for e in events if e["event"] == "best"][-1]["step"] == best < 12
    card = json.loads((tmp_path / "run/best/hiera.json").read_text())
    assert card["training"]["step"] == best
    assert card["training"]["val"]["loss"] == measured[best]
    assert hiera_core.create_model(str(tmp_path / "run/best")).config["num_classes"] == 10
    # Another run in this folder removes them.
    options = hiera_core.RunOptions(workers=0, live=False, overwrite=True)
    short = {"schedule__epochs": 1, "schedule__warmup_epochs": 0}
    other = recipe_of(model__config=NARROW, batch_size=32, **short)
    hiera_core.train(other, splits, tmp_path / "run", options=options)
    assert not (tmp_path / "run/best").exists()
