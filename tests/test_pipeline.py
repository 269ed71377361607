"""Tests of the pipeline: what it says while a model is compiled, when models are reported, and the
device and dtype that `auto` chooses."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_cli.load_model import load_model
from hiera_core.data import sources
from hiera_core.device import select_dtype
from hiera_core.inference import batching, pipeline
from hiera_core.inference.columns import callables
from hiera_core.inference.pipeline import Owned
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


# Device and dtype ---------------------------------------------------------------------------------


def auto_dtype(monkeypatch: pytest.MonkeyPatch, model: Any) -> torch.dtype:
    """Return the dtype of a classifier for images on a machine where `auto` is float64."""

    def select(name: Any, device: torch.device) -> torch.dtype:
        return torch.float64 if name == "auto" else select_dtype(name, device)

    monkeypatch.setattr(batching, "select_dtype", select)
    return Predictor(model).runner("image").dtype


def test_auto_is_for_every_model_that_is_not_the_caller_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without this, `hiera predict --checkpoint` would stay on the CPU of a machine with a GPU."""
    model = hiera_core.hiera_nano_32(pretrained=True)
    file = tmp_path / "nano.pth"
    torch.save({"model_state": model.state_dict()}, file)
    chosen = functools.partial(load_model, "classifier")
    monkeypatch.setitem(Predictor.default_models, "image", "hiera_nano_32")
    for given in (
        None,
        "hiera_nano_32",
        lambda kind: hiera_core.hiera_nano_32(pretrained=True),
        Owned(hiera_core.hiera_nano_32(pretrained=True)),
        chosen("hiera_nano_32", str(file), False),
        chosen("hiera_nano_32", None, True),
        load_model("encoder", "hiera_nano_32", None, False, (64, 64)),
        callables.Classifier("hiera_nano_32", checkpoint=file).chosen_model(),
        callables.Classifier("hiera_nano_32", random_init=True).chosen_model(),
    ):
        assert auto_dtype(monkeypatch, given) is torch.float64, given
    assert auto_dtype(monkeypatch, model) is torch.float32, "a model of the caller keeps its dtype"
    assert model.pos_embed.dtype is torch.float32
