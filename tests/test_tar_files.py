"""Images and videos in tar files are inputs of every command, read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.data.sources import expand
from hiera_core.data.tar_files import expand_braces
from hiera_core.errors import InputError, UsageError

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


def test_globs_match_tar_files(shards: Path) -> None:
    names = [source.name.rpartition("/")[2] for source in expand([f"{shards}/*.tar"])]
    assert names == ["three.png", "five.png", "eight.png"]


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


def test_hidden_members_are_no_inputs(tmp_path: Path, hiera: Command) -> None:
    """macOS adds `._x.png` to every file `x.png` of an archive."""
    names = ("._three.png", "./__MACOSX/._five.png", ".thumbs/eight.png", "./three.png")
    with tarfile.open(tmp_path / "mac.tar", "w") as archive:
        for name in names:
            archive.add(SAMPLES / "three.png", name)
        for name in ("._three.cls", "three.cls"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"3"))
    code, out, err = hiera("predict", tmp_path / "mac.tar", "-m", "hiera_nano_32", "-f", "jsonl")
    assert code == 0 and len(out.splitlines()) == 1 and "4 hidden" in err
    samples = datasets.open_dataset(tmp_path / "mac.tar", labelled=False)
    assert [source.name.rpartition("/")[2] for source in samples.sources] == ["three.png"]


def test_sparse_members_are_refused_by_name(tmp_path: Path, hiera: Command) -> None:
    """Their holes are left out of the tar file, so they cannot be read in place."""
    sparse = tarfile.TarInfo("sparse.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000001000\0" + b"00000001000\0"  # one block of data, at offset 512
    header[483:495] = b"00000002000\0"  # the size with the hole
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(SAMPLES / "three.png", "three.png")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(512) + whole)
    code, out, _ = hiera("predict", tmp_path / "a.tar", "-m", "hiera_nano_32", "-f", "jsonl")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [record["status"] for record in records] == ["error", "ok"]
    assert "sparse" in records[0]["error"]["message"]
    with pytest.raises(UsageError, match=r"sparse\.png is stored as a sparse file"):
        datasets.open_dataset(tmp_path / "a.tar", labelled=False)


def test_labels_that_are_links_to_nothing_are_missing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(SAMPLES / "three.png", "three.png")
        entry = tarfile.TarInfo("three.cls")
        entry.type, entry.linkname = tarfile.SYMTYPE, "three.cls"
        archive.addfile(entry)
    with pytest.raises(UsageError, match="has no label"):
        datasets.open_dataset(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..99999999}.tar", "stands for more than 100000 files"),
        ("{0..999}/{0..999}.tar", "stands for more than 100000 files"),
        ("a-{9..0}.tar", "counts down"),
    ],
)
def test_braces_that_stand_for_too_many_files(pattern: str, message: str, hiera: Command) -> None:
    code, _, err = hiera("predict", pattern, "-m", "hiera_nano_32")
    assert code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(UsageError, match=message):
        datasets.open_dataset(pattern)
    (source,) = expand([pattern])
    with pytest.raises(InputError, match=message):
        source.content()


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]
    assert expand_braces("{0..0}" * 2000 + ".tar") == ["0" * 2000 + ".tar"]


def test_a_size_below_zero_is_an_error_and_not_endless(tmp_path: Path) -> None:
    """A size of -512 leads from the end of a header to its beginning."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    content = bytearray(file.getvalue())
    content[512 + 124 : 512 + 136] = b"\xff" * 10 + (-512).to_bytes(2, "big", signed=True)
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 156] = b"%06o\0 " % sum(content[512:1024])
    (tmp_path / "a.tar").write_bytes(content)
    found = [source for source, _ in zip(expand([str(tmp_path / "a.tar")]), range(9), strict=False)]
    assert len(found) < 4 and found[-1].error is not None
    with pytest.raises(UsageError, match="cannot be read"):
        datasets.open_dataset(tmp_path / "a.tar", labelled=False)
