"""Tests of probes: k-NN and logistic regression on frozen features, against scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.data.sources import Source
from hiera_core.errors import UsageError
from hiera_core.inference.features import BatchExtractor, FeatureExtractor
from hiera_core.probing import linear_probe
from hiera_core.probing.frozen_features import FrozenFeatures, frozen_features, known_by_content
from hiera_core.probing.nearest_neighbours import knn_scores
from hiera_core.probing.probe import ProbeData, judge, open_probe_data

from .fork_server import ForkServer
from .ports import free_port

Command = Callable[..., tuple[int, str, str]]
Features = tuple[FrozenFeatures, FrozenFeatures]
MODEL = "mae_hiera_nano_32"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def digits() -> ProbeData:
    return open_probe_data("digits")


@pytest.fixture(scope="module")
def features(digits: ProbeData, cache: Path) -> Features:
    extractor = FeatureExtractor(MODEL, dtype="fp32")
    return (
        frozen_features(digits.train, extractor, cache=cache / "train-features"),
        frozen_features(digits.val, extractor, cache=cache / "val-features"),
    )


def test_knn_equals_that_of_scikit_learn(features: Features) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, val = features
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07))
    theirs.fit(train.vectors.numpy(), train.labels.numpy())
    expected = theirs.predict_proba(val.vectors.numpy())
    scores = knn_scores(train, val.vectors, 10)
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), expected, atol=1e-4)


def test_votes_are_counted_in_parts(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for data sets whose similarities do not fit into memory."""
    train, val = features
    whole = knn_scores(train, val.vectors, 10)
    monkeypatch.setattr("hiera_core.probing.nearest_neighbours.CHUNK", 7 * len(train))
    torch.testing.assert_close(knn_scores(train, val.vectors, 10), whole, rtol=1e-4, atol=1e-6)
    few = train.rows(torch.arange(5))
    assert knn_scores(few, val.vectors, 10).count_nonzero(1).max() <= 5


def test_the_linear_probe_equals_that_of_scikit_learn(features: Features) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val = features[0].rows(torch.arange(0, len(features[0]), 3)), features[1]
    ours = linear_probe.fit_linear_probe(train, 10)
    assert ours.decay in linear_probe.DECAYS
    scaler = StandardScaler().fit(train.vectors.numpy())
    theirs = LogisticRegression(C=1 / (len(train) * ours.decay), max_iter=5000, tol=1e-6)
    theirs.fit(scaler.transform(train.vectors.numpy()), train.labels.numpy())
    right = theirs.score(scaler.transform(val.vectors.numpy()), val.labels.numpy())
    found = float((ours.scores(val.vectors).argmax(1) == val.labels).float().mean())
    assert abs(found - right) <= 0.005


def test_weight_decay_is_chosen_on_samples_that_were_held_out() -> None:
    """The features say nothing about the labels, so that strong decay is best."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(300, 64, generator=generator)
    vectors[:, 0] = torch.arange(300) % 2 + 0.8 * torch.randn(300, generator=generator)
    found = linear_probe.fit_linear_probe(FrozenFeatures(vectors, torch.arange(300) % 2), 2)
    assert found.decay > min(linear_probe.DECAYS)
    one = FrozenFeatures(vectors[:1], torch.zeros(1, dtype=torch.int64))
    assert linear_probe.fit_linear_probe(one, 2).scores(vectors).isfinite().all()


def test_probes_tell_a_good_pretraining_from_a_bad_one(
    digits: ProbeData, features: Features
) -> None:
    torch.manual_seed(0)
    untrained = FeatureExtractor(hiera_core.create_model(MODEL), dtype="fp32")
    parts = (range(0, len(digits.train), 3), range(0, len(digits.val), 2))
    train, val = digits.train.subset(parts[0]), digits.val.subset(parts[1])
    bad = frozen_features(train, untrained), frozen_features(val, untrained)
    good = [part.rows(torch.tensor(rows)) for part, rows in zip(features, parts, strict=True)]
    for method in ("knn", "linear"):
        better, worse = (judge(digits, *pair, method=method) for pair in (good, bad))
        assert better.samples == worse.samples == len(val)
        assert better.top1 > worse.top1 + 5, method


def test_cached_features_are_not_computed_again(
    hiera: Command, features: Features, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchExtractor, "compute", lambda *_: pytest.fail("it was computed"))
    arguments = ("eval", "digits", "-m", MODEL, "--dtype", "fp32", "--cache", cache, "-f", "json")
    code, out, err = hiera(*arguments, "--probe", "linear")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["samples"] == 359 and found["top1"] > 97 and found["top5"] == 100
    assert found["probe"]["method"] == "linear" and found["probe"]["train_samples"] == 1438
    code, out, _ = hiera(*arguments, "--probe", "knn", "--neighbours", "1")
    assert code == 0 and json.loads(out)["top1"] > 90
    code, _, err = hiera(*arguments, "--probe", "knn", "-m", "hiera_nano_32")
    assert code == 2 and "was made with model" in err and "name another folder with --cache" in err


def test_two_processes_agree_with_one(
    features: Features, digits: ProbeData, fork_server: ForkServer, tmp_path: Path
) -> None:
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = ("eval", "digits", "-m", MODEL, "--dtype", "fp32", "--probe", "knn", "-q")
    processes = [
        fork_server.start(tmp_path, *arguments, "--cache", tmp_path / "cache", **group, RANK=rank,
                          LOCAL_RANK=rank)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(200) for process in processes]
    assert outputs[1] == ("", "") and outputs[0][1] == ""
    found = json.loads(outputs[0][0])
    expected = judge(digits, *features, method="knn")
    assert found["samples"] == 359 and abs(found["top1"] - expected.top1) < 0.3
    assert sorted(path.name for path in (tmp_path / "cache/val-features").iterdir()) == [
        "0-of-2",
        "1-of-2",
    ]


def make_data(folder: Path, count: int = 4) -> Path:
    """Write `count` red and `count` blue pictures into class folders."""
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 190
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_folders_are_split_and_damaged_files_are_named(hiera: Command, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 8)
    (data / "red/0.png").write_text("damaged")
    code, out, err = hiera("eval", data, "-m", MODEL, "--probe", "knn", "--val", "0.25")
    assert code == 1 and "red/0.png" in err
    found = json.loads(out)
    assert found["top1"] == 100 and found["failed"] == 1 and found["samples"] in (3, 4)
    assert {accuracy["label"] for accuracy in found["classes"]} <= {"red", "blue"}
    assert hiera_core.probe(str(data), MODEL, "linear", val=0.25).top1 == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe", "knn"], "has no val/"),
        (["--probe", "cnn"], "knn"),
        (["--probe", "linear", "--neighbours", "3"], "--neighbours belongs to --probe knn"),
        (["--probe", "knn", "--val", "0"], "share"),
        (["--probe", "knn", "--val", "1e-9"], "holds out none"),
        (["--probe", "knn", "--neighbours", "0"], "greater than or equal to 1"),
        (["--val", "0.1"], "--val, --cache and --neighbours belong to --probe"),
        (["--probe", "knn", "--val", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_usage_errors(
    hiera: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = hiera("eval", make_data(tmp_path / "data", 1), "-m", MODEL, *options)
    assert (code, out) == (2, "") and message in err


def test_bad_arguments_are_usage_errors(tmp_path: Path) -> None:
    data: Any = make_data(tmp_path / "data")
    with pytest.raises(UsageError, match="unknown probe"):
        hiera_core.probe(data, MODEL, "cnn", val=0.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="neighbours"):
        hiera_core.probe(data, MODEL, val=0.5, neighbours=0)
    for path in data.rglob("*.png"):
        path.write_text("damaged")
    with pytest.raises(UsageError, match="no training sample can be used; the first: "):
        hiera_core.probe(data, MODEL, val=0.5)


def test_changed_files_are_computed_again(tmp_path: Path) -> None:
    """The pictures of two classes are swapped. They keep their names."""
    data = tmp_path / "data"
    make_data(data / "train"), make_data(data / "val")
    cache = tmp_path / "cache"
    for _ in range(2):
        assert hiera_core.probe(data, MODEL, cache=cache, dtype="fp32").top1 == 100
    (data / "val/red").rename(data / "val/x")
    (data / "val/blue").rename(data / "val/red")
    (data / "val/x").rename(data / "val/blue")
    for path in (data / "val").rglob("*.png"):
        path.touch()
    assert hiera_core.probe(data, MODEL, cache=cache, dtype="fp32").top1 == 0


@pytest.mark.parametrize("cache", ["data", "data/cache", "other", ""])
def test_a_cache_does_not_touch_other_files(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(Path("data/train")), make_data(Path("data/val")), make_data(Path("other"))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = hiera("eval", "data", "-m", MODEL, "--probe", "knn", "--cache", cache)
    assert code == 2 and "name a" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_reasons_are_named(hiera: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_data(data / "train"), make_data(data / "val")
    code, _, err = hiera("eval", data, "-m", "mae_hiera_nano_8x32", "--probe", "knn")
    assert code == 2 and "takes video clips" in err
    (data / "val/red").rename(data / "val/green")
    code, _, err = hiera("eval", data, "-m", MODEL, "--probe", "knn")
    assert code == 2 and "the training data knows no class 'green'" in err
    for path in (data / "val/green").iterdir():
        path.unlink()
    (data / "val/green").rmdir()
    code, out, err = hiera("eval", data, "-m", MODEL, "--probe", "knn", "-f", "table")
    assert code == 0 and out.startswith("k-NN with 8 neighbours, 8 training samples\n")
    assert err == "hiera: no validation sample of the classes red\n"
    for path in (data / "train/red").iterdir():
        path.unlink()
    (data / "train/red").rmdir()
    code, _, err = hiera("eval", data, "-m", MODEL, "--probe", "linear")
    assert code == 2 and "the training samples have one class" in err


def test_a_remote_member_at_another_position_is_not_the_one_in_the_cache() -> None:
    url = "s3://bucket/a.tar"
    members = [Source(f"{url}/0.jpg", url=url, span=(512, size)) for size in (10, 10, 11)]
    first, again, other = (known_by_content(member).name for member in members)
    assert first == again != other and other.endswith(f"{url}/0.jpg")
