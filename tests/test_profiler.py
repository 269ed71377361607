"""Tests of traces and dry runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader
from hiera_core.training.distributed import World
from hiera_core.training.steps.dry_run import dry_run

NARROW = {"embed_dim": 8, "stages": (1, 1, 1)}
SETTINGS = {
    "model.config": NARROW,
    "batch_size": 16,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "ema": 0.9,
}


def splits(count: int) -> datasets.Splits:
    return datasets.Splits(datasets.open_dataset("digits").subset(range(count)))


def test_a_trace_holds_the_steps(tmp_path: Path) -> None:
    recipe = recipe_reader.read_recipe("hiera_nano_32", SETTINGS)
    options = hiera_core.RunOptions(workers=0, live=False, profile=2)
    hiera_core.train(recipe, splits(112), tmp_path / "run", options=options)
    (path,) = (tmp_path / "run/profile").iterdir()
    assert path.name == "trace-00000004.json"
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2
    # A run that ends first writes what it has, and the next run in the folder removes it.
    again = hiera_core.RunOptions(workers=0, live=False, profile=50, overwrite=True)
    hiera_core.train(recipe, splits(80), tmp_path / "run", options=again)
    names = [e.get("name", "") for e in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2
    plain = hiera_core.RunOptions(workers=0, live=False, overwrite=True)
    hiera_core.train(recipe, splits(80), tmp_path / "run", options=plain)
    assert not (tmp_path / "run/profile").exists()
    with pytest.raises(UsageError, match="profile is -1"):
        hiera_core.RunOptions(profile=-1)


def test_a_dry_run_knows_the_size_of_the_run() -> None:
    recipe = recipe_reader.read_recipe("hiera_nano_32", {**SETTINGS, "freeze": 1})
    world = World(torch.device("cpu"))
    found = dry_run(recipe, splits(128), world, hiera_core.RunOptions(workers=0))
    assert (found.steps, found.steps_per_pass) == (8, 8)
    assert 0 < found.trained < found.parameters
    # The parameters, and for those that are trained two moments and an average.
    assert found.checkpoint == pytest.approx(4 * (found.parameters + 3 * found.trained), rel=0.01)
    assert found.seconds == pytest.approx(8 * found.step_time)
    assert found.memory > 1 << 20 and 0 <= found.wait <= 1


def test_a_dry_run_writes_nothing(
    hiera: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    narrow = ("--set", "model.config={embed_dim: 8, stages: [1, 1, 1]}")
    run = ("train", "hiera_nano_32", "digits", "-o", tmp_path / "run", "-j", "0")
    code, out, _ = hiera(*run, *narrow, "--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["steps"] == "550, 22 in a pass over the data"
    assert lines["duration"].endswith("without validation and pictures")
    assert set(lines) >= {"model", "step", "rate", "memory", "checkpoint"}
