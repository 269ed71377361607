"""Tests of several devices in one stream, and of batches that fp16 cannot hold. Two replicas on the
CPU stand for two GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core.data import memory, sources
from hiera_core.errors import DeviceError, UsageError
from hiera_core.inference import batching
from hiera_core.inference.features import FeatureExtractor, FeatureSelection
from hiera_core.inference.predict import Classifier, Predictor
from hiera_core.inference.transfer import Uploads

from .conftest import SMALL, assert_close, draw_weights
from .test_transfer import FakeCuda, pictures_of
from .test_video_reader import write_video

CPU = torch.device("cpu")
TWO = [CPU, CPU]


@pytest.fixture(scope="module")
def model() -> Any:
    return draw_weights(hiera_core.Hiera(**SMALL)).eval()


def stream(count: int) -> Iterator[Any]:
    for number, picture in enumerate(pictures_of(count, 64)):
        yield memory.as_source(b"damaged" if number % 7 == 3 else picture, number)


def note_threads(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of the thread of every batch. The first replica is slow."""
    used: list[str] = []
    for number, runner in enumerate([classifier, *classifier.replicas]):

        def compute(x: torch.Tensor, plain: Any = runner.compute, number: int = number) -> Any:
            used.append(threading.current_thread().name)
            time.sleep(0.01 * (1 - number))
            return plain(x)

        monkeypatch.setattr(runner, "compute", compute)
    return used


@pytest.mark.parametrize("fake_cuda", [False, True])
def test_two_replicas_give_the_records_of_one_in_order(
    model: Any, fake_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [r.to_json() for r in Predictor(model, dtype="fp32", batch_size=2)(stream(25))]
    predictor = Predictor(model, device=TWO, dtype="fp32", batch_size=2)
    classifier = predictor.classifier("image")
    assert classifier.depth == 2 and classifier.replicas[0].model is classifier.model
    if fake_cuda:
        for runner in (classifier, *classifier.replicas):
            runner.uploads = Uploads(CPU, FakeCuda())
    used = note_threads(classifier, monkeypatch)
    found = [r.to_json() for r in predictor(stream(25))]
    assert [r["input"] for r in found] == [r["input"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["status"], ours["error"]) == (theirs["status"], theirs["error"])
        assert [k["id"] for k in ours["topk"]] == [k["id"] for k in theirs["topk"]]
    counts = {name: used.count(name) for name in used}
    assert len(counts) == 2 and max(counts.values()) - min(counts.values()) <= 1
    assert not any("Main" in name for name in counts)


def test_a_video_is_shared_by_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", frames=90, size=(96, 64))
    options: Any = {
        "model": "hiera_nano_32",
        "sampling": hiera_core.Sampling(every=0.1),
        "selection": FeatureSelection(()),
        "batch_size": 2,
        "dtype": "fp32",
    }
    (expected,) = FeatureExtractor(**options)(sources.expand([str(path)]))
    extractor = FeatureExtractor(**options, device="cpu,cpu")
    used = note_threads(extractor.runner("image"), monkeypatch)
    (found,) = extractor(sources.expand([str(path)]))
    assert_close(found.result["embedding"], expected.result["embedding"])
    assert len(found.result["embedding"]) > 20 and len(set(used)) == 2


def test_memory_that_runs_out_on_one_replica(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(model, device=TWO, dtype="fp32", batch_size=4)
    classifier = predictor.classifier("image")
    (replica,) = classifier.replicas
    plain, limit = replica.compute, [2]

    def compute(x: torch.Tensor) -> Any:
        if len(x) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x)

    monkeypatch.setattr(replica, "compute", compute)
    records = list(predictor(stream(20)))
    assert sum(r.status == "ok" for r in records) == 17
    assert (classifier.batch_size, replica.batch_size) == (4, 2)
    limit[0] = 0
    with pytest.raises(DeviceError, match="no memory left for one image"):
        list(predictor(stream(20)))


def test_tasks_for_one_device_refuse_several(tmp_path: Path) -> None:
    for call in (
        lambda: hiera_core.bench("hiera_nano_32", device="cpu,cpu"),
        lambda: hiera_core.train("hiera_nano_32", "digits", tmp_path / "run", device="cuda:all"),
        lambda: Classifier(hiera_core.Hiera(**SMALL), device="cpu,cpu"),
    ):
        with pytest.raises(UsageError, match="names several devices"):
            call()


# fp16 ---------------------------------------------------------------------------------------------


def overflowing() -> Any:
    """Return a classifier whose last norm has values beyond those of fp16 (65,504) for all inputs:
    the head is small enough that the logits are ordinary again."""
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(6e4)
        model.norm.bias.mul_(6e4)
        model.head.projection.weight.div_(6e4)
    return model


def test_an_overflow_of_fp16_is_computed_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "wide_half", lambda device: torch.float32)
    exact = Classifier(overflowing(), dtype="fp32")(pictures_of(5, 64))
    runner = Classifier(overflowing(), dtype="fp16", batch_size=2)
    assert_close(runner(pictures_of(5, 64)), exact, 1e-2)
    assert caplog.text.count("computed again in fp32") == 1
    assert runner.dtype is torch.float16 and runner.model.norm.weight.dtype is torch.float16
    ordinary = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    caplog.clear()
    assert Classifier(ordinary, dtype="fp16")(pictures_of(2, 64)).isfinite().all()
    assert caplog.text == ""


def test_weights_that_are_not_finite_are_not_tried_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "wide_half", lambda device: torch.float32)
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    runner, tried = Classifier(model, dtype="fp16", batch_size=1), []
    plain = runner._compute_again
    monkeypatch.setattr(runner, "_compute_again", lambda p: (tried.append(1), plain(p))[1])
    assert not runner([np.zeros((64, 64, 3), np.uint8)] * 3).isfinite().any()
    assert len(tried) == 1


def test_other_dtypes_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Classifier(overflowing(), dtype="bf16")
    monkeypatch.setattr(runner, "_compute_again", lambda pixels: pytest.fail("it was"))
    assert runner(pictures_of(1, 64)).isfinite().all()
