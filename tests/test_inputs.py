"""Files, folders, globs, lists, stdin and URLs to a stream of sources."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from hiera_core.errors import InputError, UsageError
from hiera_core.inputs import check, expand

from .conftest import Hub


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/c.jpg", "deep/er/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs: str, stdin: bytes = b"", recursive: bool = False) -> list[str]:
    return [s.name for s in expand(inputs, recursive=recursive, stdin=io.BytesIO(stdin))]


def test_folders_in_name_order(tree: Path) -> None:
    assert names(".") == ["a.PNG", "b.jpg"]
    assert names(".", recursive=True) == ["a.PNG", "b.jpg", "deep/c.jpg", "deep/er/d.webp"]
    (tree / "none").mkdir()
    with pytest.raises(UsageError, match="holds no pictures"):
        names("none")
    with pytest.raises(UsageError, match="holds no pictures"):
        check(["a.PNG", "none"])  # before anything is decoded


def test_files_and_globs(tree: Path) -> None:
    assert names("notes.txt", "gone.jpg") == ["notes.txt", "gone.jpg"], "as named"
    assert names("*.jpg") == ["b.jpg"]
    assert names("**/*.jpg") == ["b.jpg", "deep/c.jpg"]
    (tree / "odd[1].jpg").touch()
    assert names("odd[1].jpg") == ["odd[1].jpg"], "a file of that name comes first"
    with pytest.raises(UsageError, match="nothing matches"):
        check(["*.tiff"])
    check(["*.jpg", "gone.jpg", "-"])


def test_lists(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"b.jpg\r\n\nhttp://x/y.jpg\nlast.png")
    assert names("@list.txt") == ["b.jpg", "http://x/y.jpg", "last.png"]
    (tree / "nul.txt").write_bytes(b"a\nb.jpg\0c.jpg\0")
    assert names("@nul.txt") == ["a\nb.jpg", "c.jpg"]
    with pytest.raises(UsageError, match=r"no list 'gone\.txt'"):
        check(["@gone.txt"])


def test_standard_input(tree: Path) -> None:
    assert names("-", stdin=b"b.jpg\nc d.jpg\n") == ["b.jpg", "c d.jpg"]
    assert names("-", stdin=b"") == []
    picture = b"\x89PNG\r\n\x1a\n" + b"x" * 100
    (source,) = expand(["-"], stdin=io.BytesIO(picture))
    assert source.name == "-" and source.content() == picture


def test_names_need_not_be_utf8(tree: Path) -> None:
    raw = b"caf\xe9.jpg"
    (Path(os.fsdecode(raw))).touch()
    (tree / "list.txt").write_bytes(raw + b"\n")
    for listed in (names("@list.txt"), names("*.jpg")[-1:]):
        assert [os.fsencode(name) for name in listed] == [raw]


def test_a_hundred_thousand_lines_stream(tree: Path) -> None:
    stream = io.BytesIO(b"".join(b"folder/picture_%06d.jpg\n" % i for i in range(100_000)))
    sources = expand(["-"], stdin=stream)
    assert next(sources).name == "folder/picture_000000.jpg"
    assert stream.tell() < 100_000, "bytes read for the first of them"
    assert sum(1 for _ in sources) == 99_999


def test_urls(hub: Hub) -> None:
    hub.plain["/x.jpg"] = b"bytes of a picture"
    good, bad, nowhere = expand([f"{hub.url}/x.jpg", f"{hub.url}/y.jpg", "http://127.0.0.1:9/z"])
    assert good.content() == b"bytes of a picture"
    for source in (bad, nowhere):
        with pytest.raises(InputError, match="cannot be fetched"):
            source.content()
