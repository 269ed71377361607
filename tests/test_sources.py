"""Tests of sources: files, folders, globs, lists, standard input and URLs."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiera_core.data import url_content
from hiera_core.data.datasets import is_url, open_dataset
from hiera_core.data.media_types import kind_of
from hiera_core.data.sources import Source, check_inputs, expand, names_one
from hiera_core.errors import InputError, UsageError

from .conftest import Hub


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of empty files and subfolders. It is the current folder."""
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/c.jpg", "deep/er/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs: str, stdin: bytes = b"", recursive: bool = False) -> list[str]:
    return [s.name for s in expand(inputs, recursive=recursive, stdin=io.BytesIO(stdin))]


def test_files_of_folders_are_in_name_order(tree: Path) -> None:
    assert names(".") == ["a.PNG", "b.jpg"]
    assert names(".", recursive=True) == ["a.PNG", "b.jpg", "deep/c.jpg", "deep/er/d.webp"]
    (tree / "none").mkdir()
    (failing,) = expand(["none"])
    with pytest.raises(InputError, match="holds no pictures"):
        failing.content()
    with pytest.raises(UsageError, match="holds no pictures"):
        check_inputs(["a.PNG", "none"])  # before anything is decoded


def test_files_and_globs(tree: Path) -> None:
    assert names("notes.txt", "gone.jpg") == ["notes.txt", "gone.jpg"], (
        "a file that is named needs no known ending"
    )
    assert names("*.jpg") == ["b.jpg"]
    assert names("**/*.jpg") == ["b.jpg", "deep/c.jpg"]
    assert names("de*") == ["deep/c.jpg"], "if only folders match, their files are used"
    (tree / "odd[1].jpg").touch()
    assert names("odd[1].jpg") == ["odd[1].jpg"], "a file of that name has precedence"
    with pytest.raises(UsageError, match="nothing matches"):
        check_inputs(["*.tiff"])
    check_inputs(["*.jpg", "gone.jpg", "-"])


def test_lists_have_an_input_on_each_line(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"b.jpg\r\n\nhttp://x/y.jpg\nlast.png")
    assert names("@list.txt") == ["b.jpg", "http://x/y.jpg", "last.png"]
    (tree / "nul.txt").write_bytes(b"a\nb.jpg\0c.jpg\0")
    assert names("@nul.txt") == ["a\nb.jpg", "c.jpg"]
    with pytest.raises(UsageError, match=r"no list 'gone\.txt'"):
        check_inputs(["@gone.txt"])


def test_standard_input_is_a_list_or_a_picture(tree: Path) -> None:
    assert names("-", stdin=b"b.jpg\nc d.jpg\n") == ["b.jpg", "c d.jpg"]
    assert names("-", stdin=b"") == []
    picture = b"\x89PNG\r\n\x1a\n" + b"x" * 100
    (source,) = expand(["-"], stdin=io.BytesIO(picture))
    assert source.name == "-" and source.content() == picture


@pytest.mark.parametrize("first", ["BMW.jpg", "RIFFs/a.jpg", "GIF8.png", "qoif.jpg", "P6.jpg"])
def test_names_may_begin_like_the_content_of_a_picture(first: str) -> None:
    assert names("-", stdin=f"{first}\nb.jpg\n".encode()) == [first, "b.jpg"]


def test_a_slow_producer_streams() -> None:
    """The first source is available before the producer sends the second name."""
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as stdin, os.fdopen(send, "wb", buffering=0) as producer:
        sources = expand(["-"], stdin=stdin)
        producer.write(b"a.jpg\n")
        assert next(sources).name == "a.jpg"
        producer.write(b"b.jpg\n")
        assert next(sources).name == "b.jpg"


def test_the_content_decides_the_kind(tmp_path: Path, pictures: Path) -> None:
    image = (pictures / "coffee.png").read_bytes()
    assert kind_of(image, "x.mp4") == "image", "the content decides"
    assert kind_of(b"\0\0\0 ftypisom" + bytes(300), "x.jpg") == "video"
    assert kind_of(b"\0\0\0 ftypavif" + bytes(300), "x") == "image"
    assert kind_of(b"\x1a\x45\xdf\xa3" + bytes(300), "x") == "video"
    assert kind_of(b"RIFF\0\0\0\0AVI ", "x") == "video"
    assert kind_of(b"\x47" + bytes(187) + b"\x47", "x") == "video"
    assert (kind_of(b"?", "x.mkv"), kind_of(b"?", "x.jpg"), kind_of(b"?", "x")) == (
        "video",
        "image",
        "image",
    )
    with pytest.raises(InputError, match="empty"):
        kind_of(b"", "x.jpg")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, message in [
        (tmp_path / "pipe.jpg", "not a regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "gone.jpg", "no such file"),
        (Path("nul\0.jpg"), "null byte"),
    ]:
        with pytest.raises(InputError, match=message):
            Source(str(path), path=path).content()


@pytest.mark.parametrize(
    ("made", "hint"),
    [
        ([], "the folder is empty"),
        ([".git/"], "the folder is empty"),
        (["a/"], "--recursive looks into folders within it"),
        (["x.txt"], "it holds 1 .txt"),
        (["x.txt", "a/"], "it holds 1 .txt; --recursive looks into folders within it"),
    ],
)
def test_a_folder_without_pictures_says_what_it_holds(
    tmp_path: Path, made: list[str], hint: str
) -> None:
    for name in made:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    (source,) = expand([str(tmp_path)])
    with pytest.raises(InputError) as error:
        source.content()
    assert str(error.value) == f"the folder holds no pictures or videos; {hint}"


def test_a_missing_list_keeps_its_place(tree: Path) -> None:
    """Sources after a list that disappears are still read."""
    sources = list(expand(["b.jpg", "@gone.txt", "a.PNG"]))
    assert [s.name for s in sources] == ["b.jpg", "@gone.txt", "a.PNG"]
    with pytest.raises(InputError, match="no such file"):
        sources[1].content()


def test_file_names_need_not_be_utf8(tree: Path) -> None:
    raw = b"caf\xe9.jpg"
    (Path(os.fsdecode(raw))).touch()
    (tree / "list.txt").write_bytes(raw + b"\n")
    for listed in (names("@list.txt"), names("*.jpg")[-1:]):
        assert [os.fsencode(name) for name in listed] == [raw]


def test_long_lists_are_streamed(tree: Path) -> None:
    stream = io.BytesIO(b"".join(b"folder/picture_%06d.jpg\n" % i for i in range(100_000)))
    sources = expand(["-"], stdin=stream)
    assert next(sources).name == "folder/picture_000000.jpg"
    assert stream.tell() < 100_000, "few bytes are read before the first source"
    assert sum(1 for _ in sources) == 99_999


def test_urls_are_fetched(hub: Hub) -> None:
    hub.plain["/x.jpg"] = b"bytes of a picture"
    good, bad, unreachable = expand(
        [f"{hub.url}/x.jpg", f"{hub.url}/y.jpg", "http://127.0.0.1:9/z"]
    )
    assert good.content() == b"bytes of a picture"
    for source in (bad, unreachable):
        with pytest.raises(InputError, match="cannot be fetched"):
            source.content()


def test_the_scheme_of_a_url_may_be_in_capitals(hub: Hub, tree: Path) -> None:
    hub.plain["/x.jpg"] = b"bytes of a picture"
    url = f"HTTP{hub.url[4:]}/x.jpg"
    Path("list.txt").write_text(f"{url}\n")
    check_inputs([url, f"{url}?size=[1]*"])
    assert names_one(f"{url}?size=[1]")
    for source in (*expand([url]), *expand(["@list.txt"])):
        assert source.url == url and source.content() == b"bytes of a picture"
    (literal,) = expand([url], literally=True)
    assert literal.error is not None and "expand=True" in literal.error.hint
    assert is_url(url)
    for name in (f"{url}/*.tar", f"{url}/*.parquet"):
        with pytest.raises(UsageError, match="files of a web server cannot be listed"):
            open_dataset(name)


def test_urls_may_look_like_globs(hub: Hub) -> None:
    check_inputs([f"{hub.url}/x.jpg?size=[1]", "https://[::1"])


def test_large_downloads_go_to_a_file_that_goes_with_them(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Linux the file has no name at all; elsewhere it is in the temporary folder."""
    monkeypatch.setattr(url_content, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hub.plain["/x.mp4"] = content = os.urandom(5000)
    for open_files in (url_content.OPEN_FILES, Path("no such folder")):
        monkeypatch.setattr(url_content, "OPEN_FILES", open_files)
        found = Source("x", url=f"{hub.url}/x.mp4").content()
        assert isinstance(found, Path)
        assert found.read_bytes() == content and found.read_bytes() == content
        name = str(found)
        del found
        gc.collect()
        assert not Path(name).exists() and list(tmp_path.iterdir()) == []
    assert Source("x", url=f"{hub.url}/x.mp4").content()
    monkeypatch.setattr(url_content, "MAX_DOWNLOAD_BYTES", 4000)
    with pytest.raises(InputError, match="larger than"):
        Source("x", url=f"{hub.url}/x.mp4").content()


def test_members_of_tar_files_are_kept_like_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(5000)
    (tmp_path / "x.tar").write_bytes(b"header" + content)
    member = Source("x", path=tmp_path / "x.tar", span=(6, 5000))
    assert member.content() == content
    monkeypatch.setattr(url_content, "IN_MEMORY_BYTES", 1000)
    path = member.content()
    assert isinstance(path, Path) and path.read_bytes() == content
    with pytest.raises(InputError, match="ends within this file"):
        Source("x", path=tmp_path / "x.tar", span=(6, 5001)).content()
    with pytest.raises(InputError, match="larger than 512 MiB"):
        Source("x", path=tmp_path / "x.tar", span=(6, 513 << 20)).content()


def test_a_download_that_is_cut_is_an_error(hub: Hub) -> None:
    hub.plain["/x.jpg"], hub.cut = b"bytes of a picture", 5
    with pytest.raises(InputError, match="5 of 18 bytes arrived"):
        Source("x", url=f"{hub.url}/x.jpg").content()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "y/" * 3000, "@" + "x" * 300])
def test_names_that_the_system_refuses_fail_alone(tree: Path, name: str) -> None:
    """The other inputs of the batch are not affected."""
    before, failing, after = expand(["b.jpg", name, "b.jpg"])
    assert (before.name, after.name) == ("b.jpg", "b.jpg")
    with pytest.raises(InputError):
        failing.content()
    names_one(name)
    with contextlib.suppress(UsageError):  # a pattern that matches nothing
        check_inputs([name])


def test_folders_that_cannot_be_entered_fail_alone(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake, because root may enter every folder."""
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    inputs = ["secret/a.jpg", "secret/*.jpg", "@secret/list", "b.jpg"]
    first, *_, last = expand(inputs)
    assert last.content() == Path("b.jpg")
    with pytest.raises(InputError, match="permission denied"):
        first.content()


def test_links_to_themselves_are_inputs_that_fail(tree: Path) -> None:
    (tree / "loop.jpg").symlink_to("loop.jpg")
    found = {source.name: source for source in expand(["."])}
    with pytest.raises(InputError):
        found["loop.jpg"].content()


@pytest.mark.parametrize(
    "name", ["a b.jpg", "caf\u00e9.jpg", os.fsdecode(b"caf\xe9.jpg"), "a%20b.jpg"]
)
def test_urls_may_have_spaces_and_letters_of_all_languages(hub: Hub, name: str) -> None:
    encoded = {"a b.jpg": "a%20b.jpg", "caf\u00e9.jpg": "caf%C3%A9.jpg", "a%20b.jpg": "a%20b.jpg"}
    hub.plain[f"/{encoded.get(name, 'caf%E9.jpg')}"] = b"bytes of a picture"
    assert Source(name, url=f"{hub.url}/{name}").content() == b"bytes of a picture"


@pytest.mark.parametrize("url", ["https://[::1", "http://", "http://h:port/x.jpg", "https://[x]/"])
def test_urls_that_are_not_valid_are_records(
    url: str, hiera: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for arguments in (
        ["predict", url, "-m", "hiera_nano_32"],
        ["predict", url, "-m", "hiera_nano_32", "--save-images", tmp_path / "images"],
        ["mae", url, "-m", "mae_hiera_nano_32", "-o", tmp_path / "mae"],
        ["features", url, "-m", "hiera_nano_32", "-o", tmp_path / "features"],
    ):
        code, out, err = hiera(*arguments, "-f", "jsonl")
        assert code == 1 and '"status": "error"' in out and "unexpected" not in err, (
            arguments,
            err,
        )


def test_lists_of_windows_and_names_with_brackets(tmp_path: Path) -> None:
    """A byte order mark is no part of the first name; a missing `photo[1].jpg` is one error."""
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    names = [source.name for source in expand([f"@{tmp_path}/list.txt"])]
    assert names == ["a.png", "b.png"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # PowerShell, iconv
        (tmp_path / "wide.txt").write_bytes("ä.png\r\nb c.png\r\n".encode(encoding))
        with (tmp_path / "wide.txt").open("rb") as stream:
            for found in (expand([f"@{tmp_path}/wide.txt"]), expand(["-"], stdin=stream)):
                assert [source.name for source in found] == ["ä.png", "b c.png"]
    (tmp_path / "wide.txt").write_bytes("a.png\n".encode("utf-16")[:-1])
    *_, source = expand([f"@{tmp_path}/wide.txt"])
    assert source.error is not None and "UTF-16" in source.error.message
    separated = io.BytesIO(b"a\0b\0c\0")  # names of one character each
    assert len([*expand(["-"], stdin=separated)]) == 3
    missing = [str(tmp_path / "photo[1].jpg"), str(tmp_path / "list.txt")]
    check_inputs(missing)
    assert [source.name for source in expand(missing)] == missing


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"PAR1\x15\x04", "--manifest FILE"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "one path per line")],
)
def test_a_list_is_text(tmp_path: Path, content: bytes, hint: str) -> None:
    (tmp_path / "list").write_bytes(content)
    (source,) = expand([f"@{tmp_path / 'list'}"])
    with pytest.raises(InputError, match=f"not a text file; .*{hint}"):
        source.content()


@pytest.mark.parametrize("name", [b"a\x07b.png", b"a\x01\xc3\xa4.png", b"\xff.png"])
def test_a_list_may_hold_odd_names(tmp_path: Path, name: bytes) -> None:
    """Also one whose first block ends within a character."""
    for content in (name + b"\n", b"x\n" * (1 << 15) + name[:-4] + "\xe4".encode()[:1]):
        (tmp_path / "list").write_bytes(content)
        *_, source = expand([f"@{tmp_path / 'list'}"])
        assert source.name == os.fsdecode(content.rpartition(b"x\n")[2].strip())


def test_a_missing_line_of_a_list_says_what_a_list_holds(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("path,label\n")
    (line,) = expand([f"@{tmp_path / 'list.txt'}"])
    with pytest.raises(InputError, match="one path per line, relative to the current folder"):
        line.content()
    (missing,) = expand([str(tmp_path / "missing.png")])
    with pytest.raises(InputError, match="check the path"):
        missing.content()
