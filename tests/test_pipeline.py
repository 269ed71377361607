"""Tests of the pipeline: what it says while a model is compiled, and when models are reported."""

from __future__ import annotations

import logging
import time
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
    run = classifier.run

    def slow(views: Any) -> Any:
        until = time.monotonic() + 20
        while "still compiling" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        return run(views)

    monkeypatch.setattr(classifier, "run", slow)
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
