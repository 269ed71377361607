"""Tests of data sets: formats, class numbers and reproducible splits."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hiera_core.data import datasets, toy_datasets
from hiera_core.errors import InputError, UsageError
from hiera_core.training.recipe_reader import read_recipe
from hiera_core.training.trainer import open_data


def picture(shade: int) -> bytes:
    """Return a PNG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with train/ and val/: a class with a space, a hidden file, a text file."""
    for split, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("a cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.png").write_bytes(picture(100 * number + i))
    (tmp_path / "train" / "dog" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    return tmp_path


def test_class_folders_are_read_and_split(folder: Path) -> None:
    found = datasets.open_splits(folder)
    assert found.train.classes == ["a cat", "dog"]
    assert found.train.labels is not None and found.val is not None
    assert found.train.labels.tolist() == [0] * 6 + [1] * 6
    assert len(found.val) == 6
    assert len(datasets.open_eval_data(folder)) == 6
    assert len(datasets.open_splits(folder, labelled=False).train) == 12
    half = datasets.open_splits(folder / "train", val=0.5)
    again = datasets.open_splits(folder / "train", val="0.5")
    assert half.val is not None and again.val is not None
    names = {s.name for s in half.val.sources}
    assert names == {s.name for s in again.val.sources}
    assert not names & {s.name for s in half.train.sources}
    assert len(half.train) == len(half.val) == 6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path,label\ntrain/a cat/0.png,cat\ntrain/dog/1.png,dog\n"),
        ("a.tsv", "train/a cat/0.png\tcat\ntrain/dog/1.png\tdog\n"),
        ("a.txt", "train/a cat/0.png cat\ntrain/dog/1.png dog\n"),
        ("b.csv", "train/a cat/0.png cat\ntrain/dog/1.png dog\n"),  # the format of SlowFast
        ("c.csv", "\ufefffilename, class\r\ntrain/a cat/0.png, cat\r\ntrain/dog/1.png, dog\r\n"),
        ("d.txt", "file label\ntrain/a cat/0.png cat\ntrain/dog/1,2.png dog\n"),
    ],
)
def test_lists_with_class_names(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    found = datasets.open_dataset(folder / name)
    assert found.classes == ["cat", "dog"]
    assert found.sources[0].content() == folder / "train/a cat/0.png"
    assert found.labels is not None and found.labels.tolist() == [0, 1]


def test_lists_with_class_numbers(folder: Path) -> None:
    (folder / "n.csv").write_text("train/dog/0.png,3\ntrain/dog/1.png\n")
    with pytest.raises(UsageError, match="line 2 has no label"):
        datasets.open_dataset(folder / "n.csv")
    (folder / "n.txt").write_text("train/dog/0.png 3\ntrain/dog/1.png 1\n")
    found = datasets.open_dataset(folder / "n.txt")
    assert found.classes is None and found.num_classes == 4
    (folder / "m.txt").write_text("train/dog/0.png\n")
    with pytest.raises(UsageError, match="line 1 has no label"):
        datasets.open_dataset(folder / "m.txt")
    assert len(datasets.open_dataset(folder / "m.txt", labelled=False)) == 1


def test_classes_that_are_only_held_out_count(folder: Path) -> None:
    """Without class names, the largest class number in all of the data gives their count."""
    lines = [f"train/dog/{i}.png {9 if i == 5 else i % 2}" for i in range(20)]
    (folder / "n.txt").write_text("\n".join(lines))
    for share in (0.2, 0.4, 0.6):
        found = datasets.open_splits(folder / "n.txt", share)
        assert found.val is not None
        assert found.train.num_classes == found.val.num_classes == 10


def test_fingerprints_differ_between_data_sets(folder: Path) -> None:
    digits = datasets.open_splits("digits")
    assert digits.val is not None
    fingerprints = {
        s.fingerprint for s in (digits.train, digits.val, datasets.open_dataset(folder / "train"))
    }
    assert len(fingerprints) == 3
    assert datasets.open_splits("digits").train.fingerprint == digits.train.fingerprint


def test_tar_shards_are_read(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard:02}.tar", "w") as archive:
            for i in range(3):
                for name, data in (
                    (f"{shard}{i}.png", picture(10 * shard + i)),
                    (f"{shard}{i}.cls", str(i % 2).encode()),
                    (f"{shard}{i}.json", b"{}"),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    for data in (tmp_path, tmp_path / "s-{00..01}.tar"):
        found = datasets.open_dataset(data)
        assert len(found) == 6
        assert found.labels is not None and found.labels.tolist() == [0, 1, 0] * 2
        assert found.sources[4].content() == picture(11)
    content = (tmp_path / "s-01.tar").read_bytes()
    last = found.sources[5]
    assert last.span is not None
    (tmp_path / "s-01.tar").write_bytes(content[: last.span[0] + 5])
    with pytest.raises(InputError, match="truncated"):
        last.content()
    with pytest.raises(UsageError, match="cannot be read"):
        datasets.open_dataset(tmp_path)


def test_built_in_data_sets() -> None:
    digits = datasets.open_splits("digits")
    assert digits.val is not None and (len(digits.train), len(digits.val)) == (1438, 359)
    assert digits.train.classes == toy_datasets.DIGITS
    shapes = datasets.open_splits("shapes")
    assert shapes.val is not None and len(shapes.val) == 800
    assert shapes.train.sources[0].content() == shapes.train.sources[0].content()


def test_only_the_order_of_frames_shows_the_direction() -> None:
    """Summed over time, clips of opposite directions are equal, and rows and columns are alike."""
    alike = 0
    for seed in range(20):
        clips = [toy_datasets.draw_clip(d, np.random.default_rng(seed)) for d in range(4)]
        assert clips[0].shape == (8, 48, 48, 3)
        assert (clips[0] == toy_datasets.draw_clip(0, np.random.default_rng(seed))).all()
        assert not (clips[0] == clips[1]).all()
        right, left, down, _ = (clip.astype(int).sum(0) for clip in clips)
        # The sums differ where the two shapes overlap, and because triangles stay upright.
        transposed = down.transpose(1, 0, 2)
        alike += bool((right == left).all()) and abs(right - transposed).mean() < 4
    assert alike >= 5


@pytest.mark.parametrize(
    ("data", "message"),
    [("digit", "did you mean digits"), ("/no/such/place", "give a folder"), ("", "no class")],
)
def test_unknown_data_sets_are_refused(data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(UsageError) as error:
        datasets.open_dataset(data or tmp_path)
    assert message in str(error.value)


def test_labels_are_mapped_to_the_classes_of_the_model(folder: Path) -> None:
    samples = datasets.open_dataset(folder / "val")
    by_name = datasets.remap_labels(samples, ["dog", "A_Cat", "mouse"], 3)
    assert by_name.labels is not None and by_name.labels.tolist() == [1] * 3 + [0] * 3
    with pytest.raises(UsageError, match="knows no class 'a cat'"):
        datasets.remap_labels(samples, ["dog", "cow"], 2)
    with pytest.raises(UsageError, match="2 classes, the model 1"):
        datasets.remap_labels(samples, None, 1)
    numbers = datasets.MediaDataset(samples.sources, samples.labels, ["2", "0"])
    found = datasets.remap_labels(numbers, ["x", "y", "z"], 3)
    assert found.labels is not None and found.labels.tolist() == [2] * 3 + [0] * 3
    wnids = [f"n{i:08}" for i in range(2)]
    found = datasets.remap_labels(
        datasets.MediaDataset(samples.sources, samples.labels, wnids), ["tench", "goldfish"], 2
    )
    assert found.labels is not None and found.labels.tolist() == [0] * 3 + [1] * 3


@pytest.mark.parametrize("inner", ["", "train/cat", "val/cat"])
def test_a_folder_does_not_hide_a_built_in_data_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    inner: str,
) -> None:
    caplog.set_level("INFO", "hiera")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / inner).mkdir(parents=True)
    (tmp_path / "digits/one").mkdir()
    for file in ("one/a.png", f"{inner or 'one'}/b.png"):
        (tmp_path / "digits" / file).write_bytes(picture(1))
    assert len(datasets.open_eval_data("digits")) == 359
    assert "digits is the built-in data set; ./digits is the folder of this name" in caplog.text
    splits = datasets.open_splits("digits")
    assert splits.val is not None and (len(splits.train), len(splits.val)) == (1438, 359)
    assert len(datasets.open_dataset("digits")) == 1797
    assert len(datasets.open_dataset("./digits", labelled=False)) == 2
    assert len(datasets.open_eval_data(Path("digits"))) <= 2
    open_data(read_recipe("hiera_nano_32"), "digits", "digits/run")
