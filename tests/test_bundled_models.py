"""Tests of the bundled models: file size, accuracy, and use without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core import zoo
from hiera_core.data import toy_datasets
from hiera_core.data.clip_reader import read_segments
from hiera_core.data.clip_sampling import Sampling
from hiera_core.data.video_files import video_writer
from hiera_core.inference.predict import Classifier

ASSETS = zoo.ASSETS
SAMPLES = ASSETS / "samples"
MODELS = [
    entry
    for entry in zoo.models().values()
    if any(checkpoint.asset for checkpoint in entry.checkpoints.values())
]
NO_NETWORK = """
import socket, sys
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from hiera_cli.app import main
sys.argv[0] = "hiera"
main()
"""


def test_bundled_models_are_small() -> None:
    assert [entry.name for entry in MODELS] == [
        "hiera_nano_32",
        "mae_hiera_nano_32",
        "hiera_nano_8x32",
        "mae_hiera_nano_8x32",
    ]
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 4_000_000
    for entry in MODELS:
        model = hiera_core.create_model(entry.name, pretrained=True)
        assert sum(p.numel() for p in model.parameters()) < 1_000_000
        assert model.layout.windows >= 16
        assert model.card["licence"] == "Apache-2.0"


def test_predict_needs_no_network_and_no_cache(tmp_path: Path) -> None:
    """The label of each bundled picture and clip is its file name."""
    for model, pattern in (("hiera_nano_32", "*.png"), ("hiera_nano_8x32", "*.mp4")):
        inputs = sorted(map(str, SAMPLES.glob(pattern)))
        assert inputs
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK, "predict", *inputs, "-m", model],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            record = json.loads(line)
            expected = Path(record["input"]).stem.replace("_", " ")
            assert record["topk"][0]["label"] == expected
            assert record["topk"][0]["prob"] > 0.5


def test_accuracy_on_held_out_digits(hiera: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = hiera("eval", "digits", "-m", "hiera_nano_32", "-f", "json")
    found = json.loads(out)
    assert code == 0 and found["samples"] == 359
    assert found["top1"] >= 98
    assert found["top1"] == pytest.approx(zoo.get("hiera_nano_32").top1, abs=0.3)
    per_class = sum(c["top1"] * c["samples"] for c in found["classes"]) / 359
    assert per_class == pytest.approx(found["top1"])
    wrong = 359 - round(found["top1"] / 100 * 359)
    assert sum(pair["count"] for pair in found["confusions"]) == wrong


def clips(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield preprocessed clips that are not in the training data, and their labels."""
    model = hiera_core.create_model("hiera_nano_8x32", pretrained=True)
    transform = Classifier(model).transform
    for i in range(count):
        file = video_writer.encode(
            toy_datasets.draw_clip(i % 4, np.random.default_rng((99, i))), toy_datasets.RATE
        )
        _, segments = read_segments(file, Sampling(clips=1, crops=1), transform)
        yield next(segments).views[0], i % 4


def test_the_video_model_recognises_motion() -> None:
    """Accuracy is above 95% on new clips, and at chance level when their frames are shuffled."""
    count = 400
    views, labels = zip(*clips(count), strict=True)
    model = Classifier(hiera_core.create_model("hiera_nano_8x32", pretrained=True))
    truth = torch.tensor(labels)
    accuracy = (model(views).argmax(1) == truth).float().mean().item()
    random = np.random.default_rng(0)
    shuffled = [view[random.permutation(len(view))] for view in views]
    shuffled_accuracy = (model(shuffled).argmax(1) == truth).float().mean().item()
    print(f"ordered {accuracy:.1%}, shuffled {shuffled_accuracy:.1%}")
    assert accuracy > 0.95
    assert abs(shuffled_accuracy - 0.25) < 3.5 * (0.25 * 0.75 / count) ** 0.5
    backwards = model([view[::-1].copy() for view in views]).argmax(1)
    opposite = torch.tensor([1, 0, 3, 2])
    assert (backwards == opposite[truth]).float().mean().item() > 0.95
