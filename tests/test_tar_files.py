"""Images and videos in tar files are inputs of every command, read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import hiera_core
from hiera_core.data.tar_files import expand_braces

Command = Callable[..., tuple[int, str, str]]
SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of two shards as img2dataset writes them: picture, text and JSON."""
    for number, names in enumerate((("three", "five"), ("eight",))):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as archive:
            for name in names:
                archive.add(SAMPLES / f"{name}.png", f"{name}.png")
                for ending in ("txt", "json"):
                    entry = tarfile.TarInfo(f"{name}.{ending}")
                    entry.size = 2
                    archive.addfile(entry, io.BytesIO(b"{}"))
    return tmp_path


def test_members_are_inputs_of_every_command(shards: Path, hiera: Command) -> None:
    pattern = f"{shards}/0000{{0..1}}.tar"
    code, out, err = hiera("predict", pattern, "-m", "hiera_nano_32", "-f", "jsonl")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "passed over: 3 .json, 3 .txt" in err
    names = [f"{shards}/00000.tar/three.png", f"{shards}/00000.tar/five.png"]
    assert [record["input"] for record in records] == [*names, f"{shards}/00001.tar/eight.png"]
    assert [record["topk"][0]["label"] for record in records] == ["three", "five", "eight"]
    options = ("-m", "hiera_nano_32", "-o", shards / "features", "--shard-size", "1")
    code, _, _ = hiera("features", shards / "00000.tar", *options)
    assert code == 0
    code, out, _ = hiera("features", pattern, *options, "--resume", "-f", "jsonl")
    assert code == 0 and len(out.splitlines()) == 3
    assert len(list((shards / "features").glob("image-*"))) == 3
    code, _, _ = hiera("mae", shards / "00001.tar", "-m", "mae_hiera_nano_32", "-o", shards / "mae")
    assert code == 0 and len(list((shards / "mae").rglob("*.png"))) == 1
    found = hiera_core.predict(shards / "00000.tar", "hiera_nano_32")
    assert isinstance(found, list) and len(found) == 2


def test_damaged_and_missing_tar_files_are_errors_of_their_own(
    shards: Path, hiera: Command
) -> None:
    (shards / "cut.tar").write_bytes((shards / "00000.tar").read_bytes()[:900])
    (shards / "zip.tar").write_bytes(b"PK\x03\x04" + b"\0" * 600)
    with tarfile.open(shards / "empty.tar", "w"):
        pass
    names = [shards / f"{name}.tar" for name in ("cut", "zip", "empty", "none", "00001")]
    code, out, err = hiera("predict", *names, "-m", "hiera_nano_32", "-f", "jsonl")
    assert code == 1 and "unexpected" not in err
    status = [json.loads(line)["status"] for line in out.splitlines()]
    assert status.count("ok") == 1 and status[-1] == "ok" and len(status) >= 5


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]
