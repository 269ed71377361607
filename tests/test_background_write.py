"""Tests of checkpoints that a thread writes."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.data import datasets
from hiera_core.errors import OutputError
from hiera_core.training import recipe_reader
from hiera_core.training.checkpoints import checkpoint_file
from hiera_core.training.checkpoints.background_write import BackgroundWrite, Snapshot

pytestmark = pytest.mark.usefixtures("quick_curves")

SETTINGS: dict[str, Any] = {
    "model.config": {"embed_dim": 8, "stages": (1, 1, 1), "drop_path_rate": 0.3},
    "batch_size": 32,
    "schedule.warmup_epochs": 0,
    "ema": 0.5,
}


def run(folder: Path, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    samples = datasets.open_dataset("digits").subset(range(64))
    recipe = recipe_reader.read_recipe("hiera_nano_32", {**SETTINGS, **settings})
    choices = hiera_core.RunOptions(workers=0, live=False, **options)
    return hiera_core.train(recipe, datasets.Splits(samples), folder, options=choices)


def test_a_snapshot_does_not_change_with_the_tensors() -> None:
    weight, number = torch.arange(6.0).view(2, 3), torch.tensor(3)
    snapshot = Snapshot(True)
    first = snapshot.take({"weight": weight, "number": number})
    weight.zero_()
    assert first["weight"].tolist() == [[0, 1, 2], [3, 4, 5]] and int(first["number"]) == 3
    second = snapshot.take({"weight": weight, "number": number})
    assert second["weight"].data_ptr() == first["weight"].data_ptr()  # no new memory
    assert not second["weight"].any()
    assert Snapshot(False).take({"weight": weight}) == {}


def test_an_error_is_raised_once_by_wait() -> None:
    background = BackgroundWrite()
    background.wait()

    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    background.start(fail)
    with pytest.raises(OSError, match="full"):
        background.wait()
    background.wait()
    done = threading.Event()
    background.start(done.set)
    background.wait()
    assert done.is_set()


def test_a_thread_writes_what_a_blocking_save_writes(tmp_path: Path) -> None:
    """The run goes on while the thread is slow, and every file has the values of its step."""
    settings = {"schedule.epochs": 3, "save_every": 0.5, "keep_checkpoints": 9}
    run(tmp_path / "blocking", settings, blocking_saves=True)
    run(tmp_path / "thread", settings)
    for path in sorted((tmp_path / "blocking/checkpoints").glob("step_*/state.safetensors")):
        same = tmp_path / "thread" / path.relative_to(tmp_path / "blocking")
        assert same.read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "thread/checkpoints").glob("step_*"))) == 6


def test_a_slow_write_takes_no_values_of_later_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"schedule.epochs": 2, "save_every": 1}
    run(tmp_path / "quick", settings)
    write, threads = checkpoint_file.write_tensors, []

    def slow(path: Path | None, tensors: Any) -> str:
        threads.append(threading.current_thread().name)
        threading.Event().wait(0.5)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint_file, "write_tensors", slow)
    run(tmp_path / "slow", settings)
    assert threads == ["checkpoint", "checkpoint"]
    for name in ("step_00000002", "step_00000004"):
        paths = [
            tmp_path / run / "checkpoints" / name / "state.safetensors" for run in ("quick", "slow")
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path | None, tensors: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "write_tensors", full)
        with pytest.raises(OutputError, match=r"step_00000001 cannot be written \(No space left"):
            run(tmp_path / "run", {"schedule.epochs": 4, "save_every": 0.5})
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_old_checkpoints_are_kept_as_the_recipe_says(tmp_path: Path) -> None:
    """The last two, and every second pass; resuming from one of them gives the same weights."""
    settings = {"schedule.epochs": 5, "save_every": 0.5, "keep_every": 2, "keep_checkpoints": 2}
    run(tmp_path / "run", settings)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000009", "step_00000010"]
    start = str(tmp_path / "run/checkpoints/step_00000004")
    run(tmp_path / "again", settings, resume=start)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert same[0] == same[1]
    shutil.rmtree(tmp_path / "again")
