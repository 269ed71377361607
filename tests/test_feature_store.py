"""Tests of feature files: what is resumed, what is refused, and what an interruption leaves."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.inference import feature_formats
from hiera_core.inference.feature_store import FeatureStore
from hiera_core.inference.features import FeatureExtractor

from .conftest import SMALL, draw_weights

Command = Callable[..., tuple[int, str, str]]
NANO = ["-m", "hiera_nano_32", "--dtype", "fp32"]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Return a folder of 12 pictures that all differ."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for number in range(12):
        make_picture(folder / f"{number:02}.png", number)
    return folder


def make_picture(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path)


def rows(folder: Path) -> Counter[str]:
    """Count the rows of every input in a folder of shards."""
    found: Counter[str] = Counter()
    for path in folder.iterdir():
        if path.suffix in feature_formats.FORMATS:
            found.update(feature_formats.read(path)[1])
    return found


def check_records(out: str, expected: list[str]) -> None:
    """Check that there is a record for each input, in order, with that input's own features."""
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["input"] for r in records] == expected
    assert [r["index"] for r in records] == list(range(len(expected)))
    for record in records:
        arrays, names = feature_formats.read(record["file"]["name"])
        row = record["file"]["row"]
        assert names[row] == record["input"]
        alone = hiera_core.features(record["input"], "hiera_nano_32", dtype="fp32")["embedding"]
        assert torch.allclose(arrays["embedding"][row], alone, atol=1e-4)


def test_inputs_are_known_by_name(hiera: Command, inputs: Path, tmp_path: Path) -> None:
    """A file that sorts in earlier, and one that is gone, do not double the rows of the others."""
    out_folder = tmp_path / "out"
    run = ["features", inputs, *NANO, "-o", out_folder, "--shard-size", "5"]
    assert hiera(*run)[0] == 0
    make_picture(inputs / "00a.png", 100)
    make_picture(inputs / "zz.png", 101)
    (inputs / "05.png").unlink()
    code, out, _ = hiera(*run, "--resume")
    names = sorted(str(path) for path in inputs.iterdir())
    assert code == 0
    check_records(out, names)
    assert rows(out_folder) == Counter([*names, str(inputs / "05.png")])


def test_inputs_of_one_name_keep_a_row_each(hiera: Command, inputs: Path, tmp_path: Path) -> None:
    twice = [inputs / "00.png", inputs / "01.png", inputs / "00.png"]
    run = ["features", *NANO, "-o", tmp_path / "out"]
    hiera(*run, *twice)
    code, out, _ = hiera(*run, *twice, inputs / "00.png", "--resume")
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert code == 0 and rows(tmp_path / "out")[str(twice[0])] == 3
    assert len({(file["name"], file["row"]) for file in files}) == 4


def test_inputs_of_one_name_are_told_apart_if_one_failed(
    hiera: Command, inputs: Path, tmp_path: Path
) -> None:
    """A tar file has two members of one name, and the first of them is damaged at first."""

    def pack(*contents: bytes) -> None:
        with tarfile.open(tmp_path / "t.tar", "w") as file:
            for content in contents:
                member = tarfile.TarInfo("x.png")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))

    first, second = ((inputs / f"0{n}.png").read_bytes() for n in (0, 1))
    run = ["features", tmp_path / "t.tar", *NANO, "-o", tmp_path / "out", "--resume"]
    pack(b"damaged", second)
    assert hiera(*run)[0] == 1
    for expected in ([b"damaged", second], [first, second], [first, second]):
        pack(*expected)
        code, out, _ = hiera(*run)
        assert code == (1 if b"damaged" in expected else 0)
        for record, number in zip(map(json.loads, out.splitlines()), (0, 1), strict=True):
            if expected[number] == b"damaged":
                assert record["status"] == "error"
                continue
            arrays, _ = feature_formats.read(record["file"]["name"])
            alone = hiera_core.features(inputs / f"0{number}.png", "hiera_nano_32", dtype="fp32")[
                "embedding"
            ]
            found = arrays["embedding"][record["file"]["row"]]
            assert torch.allclose(found, alone, atol=1e-4)
    assert sum(rows(tmp_path / "out").values()) == 2


@pytest.mark.parametrize("name", ["image-00007.npz", "video-12345.parquet", "image-00000.npz"])
def test_overwrite_keeps_files_that_only_have_the_name_of_a_shard(
    hiera: Command, inputs: Path, tmp_path: Path, name: str
) -> None:
    run = ["features", inputs, *NANO, "-o", tmp_path / "out"]
    assert hiera(*run, "--save-as", "safetensors")[0] == 0
    path = tmp_path / "out" / name
    np.savez(path, scan=np.ones(3)) if name.endswith(".npz") else path.write_text("mine")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    code, _, err = hiera(*run, "--overwrite")
    assert code == 2 and str(path) in err and len(err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"kind": None},
        {"kind": "audio"},
        {"model": None},
        {"inputs": [["a"]]},
        {"inputs": "a"},
        {"indices": ["x"]},
        {"indices": [None]},
        {"indices": [0, 1]},
        {"indices": [True]},
        {"occurrences": [-1]},
        {"occurrences": 3},
        {"shapes": 3},
        {"shapes": {}},
        {"shapes": {"embedding": ["x"]}},
        {"shapes": {"embedding": None}},
        {"settings": []},
    ],
)
def test_damaged_metadata_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = {
        "inputs": ["a"], "indices": [0], "kind": "image", "model": "m",
        "shapes": {"embedding": [2]}, "settings": {},
    }  # fmt: skip
    arrays = {"embedding": np.zeros((1, 2), np.float32)}
    path = tmp_path / "image-00000.safetensors"
    feature_formats.write(path, arrays, metadata)
    assert FeatureStore(tmp_path, resume=True).find("a", 0) is not None
    changed = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    feature_formats.write(path, arrays, changed)
    with pytest.raises(UsageError, match="features"):
        FeatureStore(tmp_path, resume=True)


def test_compressed_metadata_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "image-00000.npz"
    np.savez_compressed(path, metadata=np.array(" " * 10_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UsageError, match="ValueError"):
        FeatureStore(tmp_path, "npz", resume=True)


@pytest.mark.parametrize("save_as", ["npz", "parquet"])
def test_overwrite_removes_the_shards_of_every_format(
    hiera: Command, inputs: Path, tmp_path: Path, save_as: str
) -> None:
    folder = tmp_path / "out"
    hiera("features", inputs, *NANO, "-o", folder, "--shard-size", "3", "--save-as", save_as)
    for name in ("notes.txt", "video-00003.safetensors", "image-1.npz"):
        (folder / name).touch()
    code, _, _ = hiera("features", inputs / "00.png", *NANO, "-o", folder, "--overwrite")
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "image-00000.safetensors", "image-1.npz", "notes.txt",
    ]  # fmt: skip


def test_overwrite_that_cannot_begin_keeps_the_old_shards(
    hiera: Command, inputs: Path, tmp_path: Path
) -> None:
    run = ["features", inputs, "-o", tmp_path / "out"]
    hiera(*run, *NANO)
    before = rows(tmp_path / "out")
    code, *_ = hiera(*run, "-m", "hiera_nano_32", "--checkpoint", "none.pth", "--overwrite")
    assert code == 3 and rows(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-as", "npz"], "is not npz"),
        (["--dtype", "bf16"], "dtype fp32, not bf16"),
        (["-m", "mae_hiera_nano_32"], "model hiera_nano_32, not mae_hiera_nano_32"),
        (["--stages", "1", "--pool", "mean"], "stages"),
        (["--pool", "none"], "pool"),
        (["--clips", "2"], "views"),
        (["--max-pixels", "5000000"], "max pixels"),
        (["--checkpoint", "other.safetensors"], "weights"),
    ],
)
def test_resume_refuses_what_would_mix(
    hiera: Command,
    inputs: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = draw_weights(hiera_core.create_model("hiera_nano_32", pretrained=True))
    hiera_core.weights.files.write_safetensors(Path("other.safetensors"), model.state_dict())
    run = ["features", inputs, *NANO, "-o", "out"]
    assert hiera(*run)[0] == 0
    make_picture(inputs / "new.png", 100)
    before = rows(tmp_path / "out")
    code, _, err = hiera(*run, *options, "--resume")
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert rows(tmp_path / "out") == before


def test_weights_that_changed_under_the_same_name_are_refused(
    hiera: Command, inputs: Path, tmp_path: Path
) -> None:
    """One value of one tensor is different."""
    model = hiera_core.Hiera(**SMALL)
    draw_weights(model).save_pretrained(tmp_path / "model")
    run = ["features", inputs, "-m", tmp_path / "model", "-o", tmp_path / "out", "--resume"]
    assert hiera(*run)[0] == 0
    assert hiera(*run)[0] == 0
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[3, 7] += 0.01
    model.save_pretrained(tmp_path / "model")
    code, _, err = hiera(*run)
    assert code == 2 and "was made with weights" in err


# Interruptions ------------------------------------------------------------------------------------


class Stop(BaseException):
    """A signal."""


def extract(folder: Path, stop_at: int | None = None) -> Iterator[Any]:
    for record in FeatureExtractor("hiera_nano_32", batch_size=2)(sources.expand([str(folder)])):
        if record.index == stop_at:
            raise Stop
        yield record


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
def test_a_file_is_whole_or_not_there(inputs: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    with pytest.raises(Stop) as raised, FeatureStore(path) as store:
        for record in extract(inputs, stop_at=7):
            store.add(record)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs"]
    assert "is not written after 7 inputs" in raised.value.__notes__[0]
    path.write_text("old")
    with pytest.raises(Stop), FeatureStore(path) as store:
        for record in extract(inputs, stop_at=7):
            store.add(record)
    assert path.read_text() == "old"


def test_on_error_stop_writes_no_file(hiera: Command, inputs: Path, tmp_path: Path) -> None:
    (inputs / "03.png").write_text("damaged")
    run = ["features", inputs, *NANO, "--on-error", "stop"]
    code, _, err = hiera(*run, "-o", tmp_path / "out.npz")
    assert code == 1 and "out.npz is not written after 3 inputs" in err
    assert not (tmp_path / "out.npz").exists()
    code, _, err = hiera(*run, "-o", tmp_path / "out")
    assert code == 1 and "--resume continues" in err
    assert sum(rows(tmp_path / "out").values()) == 3


def test_a_folder_keeps_what_was_done(hiera: Command, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop), FeatureStore(tmp_path / "out", shard_inputs=3) as store:
        for record in extract(inputs, stop_at=7):
            store.add(record)
    assert sum(rows(tmp_path / "out").values()) == 7


def test_a_full_disk_does_not_replace_the_first_error(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done cannot be written at the end of the block either."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Stop), FeatureStore(tmp_path / "out") as store:
        for record in extract(inputs, stop_at=7):
            store.add(record)
            monkeypatch.setattr(os, "fsync", full)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_another_version_is_not_continued(inputs: Path, tmp_path: Path) -> None:
    """Its shards do not say which weights they were made with."""
    with FeatureStore(tmp_path / "out", settings={"pool": True}) as store:
        for record in extract(inputs):
            store.add(record)
    with pytest.raises(UsageError, match="was made with"):
        store = FeatureStore(tmp_path / "out", settings={"pool": True}, resume=True)
        store.use_model("image", {"weights": "0123"})
