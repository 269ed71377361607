"""Tests of `hiera eval`: counts, output formats and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hiera_core
from hiera_core import zoo
from hiera_core.data import datasets, toy_datasets
from hiera_core.data.sources import Source
from hiera_core.inference import evaluate as evaluate_module
from hiera_core.inference.evaluate import Evaluation, published_top1

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of four digits in each of three classes. One file is damaged."""
    digits = toy_datasets.Digits()
    for number, name in ((3, "three"), (5, "five"), (8, "eight")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in np.flatnonzero(digits.labels == number)[:4]:
            content = digits[int(index)].content()
            assert isinstance(content, bytes)
            (tmp_path / "data" / name / f"{index}.png").write_bytes(content)
    first = next((tmp_path / "data" / "five").iterdir())
    first.write_bytes(first.read_bytes()[:60])
    return tmp_path / "data"


def test_damaged_pictures_are_counted(folder: Path, hiera: Run) -> None:
    code, out, err = hiera("eval", folder, "-m", "hiera_nano_32", "-f", "json")
    found = json.loads(out)
    assert code == 1
    assert (found["samples"], found["failed"]) == (11, 1)
    assert {c["label"]: c["samples"] for c in found["classes"]} == {
        "three": 4,
        "five": 3,
        "eight": 4,
    }
    assert found["top1"] > 80 and found["published_top1"] is None
    assert err.count("hiera:") == 2 and "1 failed" in err


def test_output_formats(folder: Path, hiera: Run) -> None:
    _, out, _ = hiera("eval", folder, "-m", "hiera_nano_32", "-f", "table")
    assert out.startswith("top-1  ") and "11 samples, 1 unreadable" in out
    target = folder.parent / "classes.csv"
    hiera("eval", folder, "-m", "hiera_nano_32", "-o", target)
    header, *rows = target.read_text().splitlines()
    assert header == "id,label,samples,top1,top5" and len(rows) == 3
    code, _, err = hiera("eval", folder, "-m", "hiera_nano_32", "-o", target)
    assert code == 2 and "--overwrite" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no data 'nothing'"),
        (["digits", "-m", "hiera_nano_33"], "did you mean hiera_nano_32"),
        (["digits", "-m", "mae_hiera_nano_32"], "use hiera_nano_32"),
        (["digits", "-m", "mae_hiera_nano_32"], "--probe knn or --probe linear"),
        (["digits", "-m", "sam2_hiera_tiny"], "`hiera eval --probe knn`"),
        (["digits", "-m", "hiera_tiny_224", "--random-init"], "knows no class 'zero'"),
        (["shapes", "-m", "hiera_nano_8x32", "--clips", "0"], "clips"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, hiera: Run) -> None:
    code, out, err = hiera("eval", *arguments)
    assert code == 2 and out == "" and message in err


def test_a_pretrained_run_is_judged_by_a_probe(hiera: Run, tmp_path: Path) -> None:
    """The error of `hiera predict`, for which there is no probe, does not name the option."""
    hiera_core.create_model("mae_hiera_nano_32").save_pretrained(tmp_path / "run")
    for option in ("--checkpoint", "-m"):
        code, out, err = hiera("eval", "digits", option, tmp_path / "run", "-q")
        assert code == 3 and out == "" and "has no classifier: it was only pre-trained" in err
        assert "add --probe knn or --probe linear" in err and err.count("\n") == 1
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", tmp_path / "run")
    assert code == 3 and "--probe" not in err


def test_built_in_data_has_a_model_that_ships_in_the_package(
    hiera: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = datasets.open_eval_data("digits")
    assert whole.labels is not None
    few = datasets.MediaDataset([whole.sources[i] for i in range(8)], whole.labels[:8])
    monkeypatch.setattr(datasets, "open_eval_data", lambda data: few)
    monkeypatch.setattr(evaluate_module, "open_eval_data", lambda data: few)
    code, out, err = hiera("eval", "digits", "-f", "json")
    assert code == 0 and json.loads(out)["top1"] > 80, err
    assert evaluate_module.evaluate("digits").top1 > 80
    for data, name in toy_datasets.BUNDLED.items():
        (checkpoint,) = zoo.get(name).checkpoints.values()
        assert checkpoint.bundled_path is not None and data in datasets.BUILT_IN


def test_a_video_model_fails_on_every_picture(hiera: Run, folder: Path) -> None:
    """The classes of the data may fit by chance, so every sample reports the error."""
    listing = folder.parent / "list.txt"
    listing.write_text("".join(f"{path} 1\n" for path in sorted(folder.rglob("*.png"))))
    code, out, err = hiera("eval", listing, "-m", "hiera_nano_8x32", "-f", "json")
    assert code == 1 and json.loads(out)["samples"] == 0
    assert "takes video clips" in err


def test_published_accuracy_is_that_of_the_same_data_and_weights() -> None:
    classes = [f"n{i:08}" for i in range(1000)]
    sources = [Source("x")] * 50_000
    labels = np.zeros(50_000, np.int64)
    imagenet = datasets.MediaDataset(sources, labels, classes)
    entry = zoo.get("hiera_base_224")
    card = {"model": entry.name, "source": f"{entry.name}.{entry.default}"}
    assert published_top1(imagenet, card) == 84.5
    assert published_top1(imagenet, {**card, "source": "mine/"}) is None
    assert published_top1(imagenet, {}) is None
    assert published_top1(datasets.MediaDataset(sources[:100], labels[:100], classes), card) is None
    kinetics = datasets.MediaDataset(sources[:19_800], np.arange(19_800) % 400)
    video = {"model": "hiera_base_16x224", "source": "hiera_base_16x224.mae_k400_ft_k400"}
    assert published_top1(kinetics, video) == 84.0
    found = Evaluation.empty(3)
    assert (found.top1, found.top5, found.classes(), found.confusions()) == (0, None, [], [])
