"""Tests of the pipeline: what it says while a model is compiled, and when models are reported."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from hiera_core.data import sources
from hiera_core.inference import pipeline
from hiera_core.inference.predict import Classifier, Predictor

from .test_reconstruct import SAMPLES


def test_slow_compiling_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch waits, as if it was being compiled, until the message has come."""
    caplog.set_level(logging.INFO, "hiera")
    monkeypatch.setattr(pipeline, "COMPILE_NOTICE_S", 0.01)
    predictor = Predictor("hiera_nano_32", compile=True, dtype="fp32")
    classifier = predictor.classifier("image")
    classifier._logits = classifier.model.forward_logits  # what is compiled takes no part here
    start = classifier.start

    def slow(views: Any, **options: Any) -> Any:
        until = time.monotonic() + 20
        while "still compiling" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        return start(views, **options)

    monkeypatch.setattr(classifier, "start", slow)
    for _ in range(2):
        list(predictor(sources.expand([str(SAMPLES / "three.png")])))
    assert caplog.text.count("still compiling the model") == 1


def test_models_are_reported_when_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Classifier] = []
    Predictor("hiera_nano_32").on_model(seen.append)
    assert [classifier.name for classifier in seen] == ["hiera_nano_32"]
    monkeypatch.setitem(Predictor.default_models, "image", "hiera_nano_32")
    predictor = Predictor()
    predictor.on_model(seen.append)
    assert len(seen) == 1
    predictor.classifier("image")
    predictor.classifier("image")
    assert len(seen) == 2


def test_a_video_with_the_name_of_an_image_is_opened_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers decide what a file is. Videos that are not expected are not decoded ahead, because
    each may need as much memory as a batch of images."""
    opened: list[int] = []
    yielded = 0
    read = pipeline.read_segments

    def noted(*arguments: Any, **options: Any) -> Any:
        opened.append(yielded)
        return read(*arguments, **options)

    monkeypatch.setattr(pipeline, "read_segments", noted)
    content = (SAMPLES / "moving_right.mp4").read_bytes()
    paths = [tmp_path / f"{number}.jpg" for number in range(4)]
    for path in paths:
        path.write_bytes(content)
    (tmp_path / "4.jpg").write_bytes(content[:100])
    predictor = Predictor("hiera_nano_8x32", dtype="fp32", workers=2)
    expected = next(predictor(sources.expand([str(SAMPLES / "moving_right.mp4")])))
    opened.clear()
    for record in predictor(sources.expand([*map(str, paths), str(tmp_path / "4.jpg")])):
        yielded += 1
        if yielded == 5:
            assert record.status == "error"
            break
        assert record.kind == "video" and record.video == expected.video
        assert record.topk == expected.topk
    assert opened == [0, 1, 2, 3, 4]


def test_nothing_is_opened_to_plan_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(sources.expand([str(SAMPLES / "three.png")]))
    content = (SAMPLES / "moving_right.mp4").read_bytes()
    monkeypatch.setattr(Path, "open", None)
    assert not source.is_named_like_video
    assert sources.Source("x.mp4", path=Path("x.mp4")).is_named_like_video
    assert sources.Source("x", data=content).is_named_like_video
    assert sources.Source("http://x/film", url="http://x/film").is_named_like_video
