"""Tests of trackers whose server is slow or gone: the run neither waits for it nor ends."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import TrainingError, UsageError
from hiera_core.training import recipe_reader, trainer
from hiera_core.training.trackers import sender, tracker
from hiera_core.training.trackers.sender import Outcome, Sender

from .test_tracker import SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


class Recording:
    """A tracker that remembers what it gets, and may hang or fail."""

    id = "run-1"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.outcome: Outcome | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.gate.wait(20)
        self.threads.add(threading.current_thread().name)
        if values.get("fail"):
            raise ConnectionError("the server is gone")
        self.steps.append(step)

    def close(self, outcome: Outcome = "finished") -> None:
        self.gate.wait(20)
        self.outcome = outcome


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_calls_are_made_in_order_by_one_thread() -> None:
    inner = Recording()
    found = Sender(lambda: inner, "mlflow")
    for step in range(100):
        found.log(step, {"loss": 1.0})
    found.close("failed")
    assert inner.steps == [*range(100)] and inner.outcome == "failed"
    assert inner.threads == {"mlflow"} and found.id == "run-1"


def test_a_server_that_hangs_costs_a_bounded_time_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "CLOSE_S", 0.1)
    monkeypatch.setattr(sender, "MOST_WAITING", 20)
    inner = Recording()
    inner.gate.clear()
    found = Sender(lambda: inner, "mlflow")
    start = time.monotonic()
    for step in range(1000):
        found.log(step, {"loss": 1.0})
    found.close()
    assert time.monotonic() - start < 5
    assert len(warnings(caplog)) == 1 and "it is too slow" in warnings(caplog)[0]
    other = Sender(lambda: inner, "wandb")
    other.log(1, {"loss": 1.0})
    other.close()
    assert len(warnings(caplog)) == 2 and "wandb gets no more" in warnings(caplog)[1]
    inner.gate.set()


def test_an_error_is_one_warning_and_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    inner = Recording()
    found = Sender(lambda: inner, "mlflow")
    found.log(1, {"loss": 1.0})
    for step in range(2, 6):
        found.log(step, {"fail": 1.0})
    found.close()
    assert inner.steps == [1] and inner.outcome is None
    assert len(warnings(caplog)) == 1 and "the server is gone" in warnings(caplog)[0]


def test_a_tracker_that_does_not_begin_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "BEGIN_S", 0.1)
    gate = threading.Event()

    def never() -> Recording:
        gate.wait(20)
        return Recording()

    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        Sender(never, "mlflow")
    gate.set()
    with pytest.raises(TimeoutError, match="its own"):
        Sender(lambda: (_ for _ in ()).throw(TimeoutError("its own")), "mlflow")


def test_a_tracker_is_closed_if_another_one_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Recording()

    class Module:
        MlflowTracker = staticmethod(lambda run: inner)

        @staticmethod
        def WandbTracker(run: Any) -> Any:
            raise ConnectionError("no server")

    monkeypatch.setattr(tracker.importlib, "import_module", lambda *_: Module)
    with pytest.raises(UsageError, match="--track wandb cannot begin"):
        tracker.open_trackers(("mlflow", "wandb"), tmp_path, 0, {})
    assert inner.outcome == "failed"


def test_trackio_hides_only_what_its_own_thread_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may still wait for its server when the result of the run is printed."""
    name = "hiera_core.training.trackers.trackio_tracker"
    package = types.ModuleType("trackio")
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    begun, gate = threading.Event(), threading.Event()

    def finish() -> None:
        print("pages")
        begun.set()
        gate.wait(20)

    monkeypatch.setattr(package, "finish", finish, raising=False)
    found = module.TrackioTracker.__new__(module.TrackioTracker)
    thread = threading.Thread(target=found.close)
    thread.start()
    begun.wait(20)
    print("result")
    gate.set()
    thread.join()
    assert capsys.readouterr().out == "result\n"
    monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(20)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def train(folder: Path, **options: Any) -> None:
    found = datasets.open_dataset("digits")
    splits = datasets.Splits(found.subset(range(64)), found.subset(range(64, 96)))
    recipe = recipe_reader.read_recipe("hiera_nano_32", {**SETTINGS, **options.pop("settings", {})})
    chosen = hiera_core.RunOptions(workers=0, live=False, track=("mlflow",), **options)
    hiera_core.train(recipe, splits, folder, options=chosen)


def test_a_server_that_stops_answering_does_not_hold_up_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    silent_server: str,
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    from hiera_core.training.trackers.mlflow_tracker import MlflowTracker

    monkeypatch.setattr(sender, "CLOSE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def begin(self: Any, run: Any) -> None:  # it has begun, and then the server is gone
        self._client, self.id = MlflowClient(silent_server), "x"

    monkeypatch.setattr(MlflowTracker, "__init__", begin)
    start = time.monotonic()
    train(tmp_path / "run")
    assert time.monotonic() - start < 30, "4 steps of a narrow model"
    assert (tmp_path / "run/model.safetensors").is_file()
    found = [message for message in warnings(caplog) if "mlflow gets no more" in message]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), ("nan", "FAILED"), ("stop", "KILLED"), ("other", "KILLED")],
)
def test_how_a_run_ends_is_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str | None, status: str
) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    original = trainer.Trainer._report

    def report(self: Any, *arguments: Any) -> Any:
        if error == "nan":
            raise TrainingError("loss is NaN at step 1")
        if error == "stop":
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_report", report)
    if error == "other":  # another process has received a signal
        monkeypatch.setattr(trainer.Trainer, "_is_told_to_stop", lambda _: True)
    folder = tmp_path / "run"
    if error is None:
        train(folder)
    else:
        with pytest.raises((TrainingError, KeyboardInterrupt)):
            train(folder)
    client = MlflowClient((folder / "mlruns").resolve().as_uri())
    id = json.loads((folder / tracker.IDS).read_text())["mlflow"]
    assert client.get_run(id).info.status == status


def test_wandb_gets_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from hiera_core.training.trackers.wandb_tracker import WandbTracker

    codes: list[int] = []

    class Run:
        def finish(self, exit_code: int) -> None:
            codes.append(exit_code)

    found = WandbTracker.__new__(WandbTracker)
    found._run = Run()
    outcomes: tuple[Outcome, ...] = ("finished", "failed", "interrupted")
    for outcome in outcomes:
        found.close(outcome)
    assert codes == [0, 1, 130]
