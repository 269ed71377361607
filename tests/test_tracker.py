"""Tests of trackers: each of them receives the numbers of the log, without a network."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader
from hiera_core.training.trackers import tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages
Numbers = dict[tuple[str, int], float]
SETTINGS = {
    "model.config": {"embed_dim": 8, "stages": (1, 1, 1)},
    "batch_size": 32,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 0,
    "log_every": 1,
    "val_every": 1,
    "save_every": 1,
}


def run(folder: Path, name: str, **options: Any) -> None:
    found = datasets.open_dataset("digits")
    splits = datasets.Splits(found.subset(range(64)), found.subset(range(64, 96)))
    recipe = recipe_reader.read_recipe("hiera_nano_32", SETTINGS)
    choices = hiera_core.RunOptions(workers=0, live=False, track=(name,), **options)
    hiera_core.train(recipe, splits, folder, options=choices)


def logged(folder: Path) -> Numbers:
    """Return the numbers in the log: (name, step) -> value."""
    found: Numbers = {}
    for event in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        for key, value in event.items():
            if isinstance(value, float):
                found[f"{event['event']}/{key}", event["step"]] = value
    return found


def read_tensorboard(folder: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = found.Tags()["scalars"]
    return {(tag, event.step): event.value for tag in tags for event in found.Scalars(tag)}


def read_mlflow(folder: Path) -> Numbers:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").resolve().as_uri())
    id = json.loads((folder / tracker.IDS).read_text())["mlflow"]
    assert client.get_run(id).data.params["seed"] == "0"
    return {
        (name, metric.step): metric.value
        for name in client.get_run(id).data.metrics
        for metric in client.get_metric_history(id, name)
    }


def read_trackio(folder: Path) -> Numbers:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((folder / tracker.IDS).read_text())["trackio"]
    return {
        (key, row["step"]): value
        for row in SQLiteStorage.get_logs("hiera", name)
        for key, value in row.items()
        if "/" in key
    }


def read_wandb(folder: Path) -> Numbers:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Numbers = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for key, value in items.items():
                if "/" in key:
                    found[key, items["step"]] = value
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of wandb's file: blocks of 32 KiB, of parts with a checksum, a length and
    the place of the part in its record (1 whole, 2 first, 3 middle, 4 last)."""
    position, record = 7, b""  # after the header of the file
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, place = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):
            yield record
            record = b""


READERS: dict[str, Callable[[Path], Numbers]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "wandb": read_wandb,
}


@pytest.mark.parametrize(
    "name",
    ["tensorboard", "mlflow", "trackio", pytest.param("wandb", marks=pytest.mark.slow)],
)
def test_each_tracker_receives_the_numbers_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also of a run that has been interrupted: its steps are those of one run."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if name == "trackio":
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    folder = tmp_path / "run"
    run(folder, name)
    expected = logged(folder)
    assert len(expected) > 30 and ("val/top1", 4) in expected
    found = READERS[name](folder)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    if name == "tensorboard":
        return
    first = json.loads((folder / tracker.IDS).read_text())
    for path in (folder / "checkpoints").glob("step_00000004"):
        path.rename(tmp_path / "gone")
    (folder / "model.safetensors").unlink()
    run(folder, name, resume="auto")
    assert json.loads((folder / tracker.IDS).read_text()) == first
    assert set(READERS[name](folder)) == set(logged(folder))


def test_a_tracker_that_is_not_installed_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'hiera-toolkit\[wandb\]'"):
        tracker.check_installed(("wandb",))
    with pytest.raises(UsageError, match="unknown tracker 'wanb'; did you mean wandb"):
        hiera_core.RunOptions(track=("wanb",))


def test_the_option_of_tensorboard_is_a_tracker() -> None:
    options = hiera_core.RunOptions(tensorboard=True, track=("mlflow", "tensorboard"))
    assert options.trackers == ("tensorboard", "mlflow")


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the server were gone. One that cannot begin is an error."""
    pytest.importorskip("mlflow")
    from hiera_core.training.trackers import mlflow_tracker

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def fail(*_: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(mlflow_tracker.MlflowTracker, "log", fail)
    run(tmp_path / "run", "mlflow")
    assert len(logged(tmp_path / "run")) > 30
    warnings = [m for m in caplog.messages if "mlflow gets no more measurements" in m]
    assert len(warnings) == 1 and "the server is gone" in warnings[0]
    monkeypatch.setattr(mlflow_tracker.MlflowTracker, "__init__", fail)
    with pytest.raises(UsageError, match="--track mlflow cannot begin"):
        run(tmp_path / "other", "mlflow")
