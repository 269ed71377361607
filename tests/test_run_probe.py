"""Tests of a probe that judges the features during pre-training."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.inference.features import FeatureExtractor
from hiera_core.probing.frozen_features import frozen_features
from hiera_core.probing.probe import ProbeData, judge
from hiera_core.training import recipe_reader
from hiera_core.training.distributed import World
from hiera_core.training.judging import run_probe

pytestmark = pytest.mark.usefixtures("quick_curves")

SMALL = {
    "model.config": {
        "embed_dim": 8,
        "stages": (1, 1, 1),
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "batch_size": 64,
    "val_every": 10,
}
OPTIONS = hiera_core.RunOptions(workers=0, live=False)


def probes(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == "probe"]


def digits(train: int, val: int) -> datasets.Splits:
    """Return the first digits, for training and for validation."""
    found = datasets.open_dataset("digits")
    return datasets.Splits(found.subset(range(train)), found.subset(range(train, train + val)))


def pretrain(
    folder: Path, options: hiera_core.RunOptions = OPTIONS, **settings: Any
) -> dict[str, Any]:
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    recipe = recipe_reader.read_recipe("mae_hiera_nano_32", chosen)
    return hiera_core.train(recipe, digits(192, 64), folder, options=options)


def test_a_probe_is_logged_and_agrees_with_eval(tmp_path: Path) -> None:
    """The last one is what the functions of the library find for the weights of the run."""
    result = pretrain(tmp_path / "run", probe__every=1, schedule__epochs=2, ema=0.5)
    found = probes(tmp_path / "run")
    assert [event["step"] for event in found] == [3, 6]
    names = ("top1", "top5", "samples", "train_samples")
    assert result["probe"] == {name: found[-1][name] for name in names}
    assert (result["probe"]["samples"], result["probe"]["train_samples"]) == (64, 192)
    card = json.loads((tmp_path / "run/hiera.json").read_text())
    assert card["training"]["probe"] == result["probe"]
    extractor = FeatureExtractor(str(tmp_path / "run"), device="cpu", dtype="fp32")
    data = digits(192, 64)
    parts = [frozen_features(part, extractor) for part in (data.train, data.val)]
    again = judge(ProbeData(data.train, data.val), *parts, method="knn")
    assert result["probe"]["top1"] == pytest.approx(again.top1)


def test_a_probe_ranks_a_good_and_a_bad_pre_training(tmp_path: Path) -> None:
    """One continues from bundled weights; the other one's learning rate destroys them."""
    start = hiera_core.RunOptions(workers=0, live=False, init_from="mae_hiera_nano_32")
    settings = {"model.config": {}, "probe.samples": 150, "probe.every": 9}
    good = pretrain(tmp_path / "good", start, **settings, optimizer__lr=1e-5)
    bad = pretrain(tmp_path / "bad", start, **settings, optimizer__lr=0.5)
    assert good["probe"]["train_samples"] == 150
    assert good["probe"]["top1"] > bad["probe"]["top1"] + 10


def test_a_probe_needs_labels_and_held_out_data(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"probe: .* has no class folders"):
        hiera_core.train(
            "mae_hiera_nano_32",
            pictures,
            tmp_path / "run",
            settings={**SMALL, "batch_size": 4, "probe.every": 1},
            options=OPTIONS,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("probe.method", "mlp", "probe.method is 'mlp'; expected one of knn, linear"),
        ("probe.every", 0, "probe.every is 0"),
        ("probe.samples", -1, "probe.samples is -1"),
        ("probe.evry", 1, "unknown key 'probe.evry'; did you mean every"),
    ],
)
def test_wrong_settings_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_reader.read_recipe("mae_hiera_nano_32", {key: value})


def test_a_solver_of_any_length_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes ask each other again and again, so that no collective waits for the solver."""
    asked: list[bool] = []
    original = World.any

    def count(self: World, flag: bool) -> bool:
        asked.append(flag)
        return original(self, flag)

    def slow_judge(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return judge(*arguments, **options)

    monkeypatch.setattr(run_probe, "POLL_S", 0.02)
    monkeypatch.setattr(run_probe, "judge", slow_judge)
    monkeypatch.setattr(World, "any", count)
    result = pretrain(tmp_path / "run", probe__every=1, probe__method="linear")
    assert result["probe"]["samples"] == 64
    assert sum(asked) >= 5, "it was asked while the solver worked"


def test_a_solver_ends_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the process would wait for its thread."""
    ended = threading.Event()

    def endless(*_: Any, on_step: Any, **__: Any) -> Any:
        try:
            for _step in range(1000):
                on_step()
                time.sleep(0.01)
        finally:
            ended.set()

    def fail(self: World, flag: bool) -> bool:
        if flag:
            raise RuntimeError("another process is gone")
        return False

    monkeypatch.setattr(run_probe, "POLL_S", 0.02)
    monkeypatch.setattr(run_probe, "judge", endless)
    monkeypatch.setattr(World, "any", fail)
    with pytest.raises(RuntimeError, match="another process is gone"):
        pretrain(tmp_path / "run", probe__every=1)
    assert ended.is_set()


def test_a_solver_ends_when_the_run_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    # A shell's background jobs ignore SIGINT, and a run leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def endless(*_: Any, on_step: Any, **__: Any) -> Any:
        for _step in range(2000):
            steps.append(1)
            on_step()
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(run_probe, "POLL_S", 0.02)
    monkeypatch.setattr(run_probe, "judge", endless)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "run", probe__every=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) >= 5 and not probes(tmp_path / "run")
    monkeypatch.setattr(run_probe, "judge", judge)
    result = hiera_core.train(
        None,
        digits(192, 64),
        tmp_path / "run",
        options=hiera_core.RunOptions(workers=0, live=False, resume="auto"),
    )
    assert result["probe"]["samples"] == 64, "the measurement that was pending"
