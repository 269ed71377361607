"""Tests of output names: short, different for every input, and inside the folder."""

from __future__ import annotations

import io
import os
import random
import tarfile
import unicodedata
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiera_core.data.sources import Source, expand
from hiera_core.errors import InputError
from hiera_core.records import Record
from hiera_core.viz.output_names import OutputNames

ENDINGS = (".png", ".mp4")


def named(*names: str) -> list[Source]:
    return [Source(name, path=Path(name)) for name in names]


def stems(*names: str, listed: bool = True) -> list[str]:
    """Return the stems of named files, known ahead or as a stream."""
    found = named(*names)
    names_of_run = OutputNames(Path("out"), (lambda: found) if listed else tuple)
    return [source.output_stem for source in names_of_run.assign(found)]


def of_inputs(*inputs: object, recursive: bool = False, **options: object) -> dict[str, str]:
    """Return the stems of what inputs of the command line stand for, by name."""
    texts = list(map(str, inputs))
    listed = OutputNames(Path("out"), lambda: expand(texts, recursive=recursive, ahead=True))
    found = listed.assign(expand(texts, recursive=recursive, **options))  # type: ignore[arg-type]
    return {source.name: source.output_stem for source in found}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/abs/photo.jpg"], ["photo"]),
        (["a/x.jpg", "b/y.jpg"], ["x", "y"]),
        (["a/x.jpg", "b/x.jpg"], ["a/x", "b/x"]),
        (["/r/a/1/x.jpg", "/r/b/1/x.jpg", "/r/b/2/x.jpg"], ["a/1/x", "b/1/x", "2/x"]),
        (["x.jpg", "a/x.jpg"], ["x", "a/x"]),
        (["a/x.jpg", "a/x.webp"], ["x.jpg", "x.webp"]),
        (["a/x.jpg", "a/x.webp", "b/x.jpg"], ["a/x.jpg", "a/x.webp", "b/x"]),
        (["x.jpg", "x.webp", "x.jpg.webp"], ["x.jpg", "x.webp", "x.jpg.webp"]),
        (["x.mp4", "x.png"], ["x.mp4", "x.png"]),
        (["a/x.jpg", "a/x.jpg"], ["x", "x"]),
        (["a/x.jpg", "./a/x.jpg", "a/../a/x.jpg"], ["x", "x", "x"]),
        (["x.v2", "x.v3"], ["x.v2", "x.v3"]),
    ],
)
def test_names_are_what_a_person_would_choose(names: list[str], expected: list[str]) -> None:
    assert stems(*names) == expected
    assert stems(*names[::-1]) == expected[::-1]


def test_names_that_differ_in_case_or_unicode_form_are_told_apart() -> None:
    for pair in (("x.jpg", "X.jpg"), ("caf\u00e9.jpg", "cafe\u0301.jpg"), ("ﬀ.jpg", "FF.jpg")):
        first, second = stems(*pair)
        assert first.startswith(pair[0][:-4] + "~") and second.startswith(pair[1][:-4] + "~")
    assert stems("a/x.jpg", "B/X.jpg") == ["a/x", "B/X"]


def test_parents_of_links_are_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("far/away").mkdir(parents=True)
    Path("link").symlink_to("far/away")
    assert stems("link/../x.jpg", "x.jpg") == ["far/x", "x"]
    assert stems("far/../x.jpg", "x.jpg") == ["x", "x"]


def test_streams_keep_the_short_name_for_the_first() -> None:
    names = ["a/x.jpg", "b/x.jpg", "a/x.webp", "a/x.jpg", "b/x.jpg"]
    assert stems(*names, listed=False) == ["x", "b/x", "x.webp", "x", "b/x"]
    found = named("c/x.jpg")
    run = OutputNames(Path("out"), lambda: found)
    after = [s.output_stem for s in run.assign([*named("d/x.jpg"), *found])]
    assert after == ["d/x", "x"], "a listed input has its name before a stream begins"


def test_folders_globs_lists_and_tar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p-1/a/x.jpg", "p-1/y.jpg", "p-2/y.jpg", "p-2/z.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    expected = {"p-1/a/x.jpg": "a/x", "p-1/y.jpg": "p-1/y", "p-2/y.jpg": "p-2/y", "p-2/z.jpg": "z"}
    assert of_inputs("p-1", "p-2", recursive=True) == expected
    assert of_inputs("p-*", recursive=True) == expected
    assert of_inputs("p-1", recursive=True) == {"p-1/a/x.jpg": "a/x", "p-1/y.jpg": "y"}
    assert of_inputs(tmp_path / "p-1") == {f"{tmp_path}/p-1/y.jpg": "y"}
    assert of_inputs("../" + tmp_path.name + "/p-2", "p-1") == {
        f"../{tmp_path.name}/p-2/y.jpg": "p-2/y",
        f"../{tmp_path.name}/p-2/z.jpg": "z",
        "p-1/y.jpg": "p-1/y",
    }
    lines = "".join(f"{name}\n" for name in expected)
    Path("list.txt").write_text(lines)
    in_list = {**expected, "p-1/a/x.jpg": "x"}
    assert of_inputs("@list.txt") == in_list == of_inputs("p-*/**/*.jpg")
    streamed = of_inputs("-", stdin=io.BytesIO(lines.encode()))
    assert streamed == {**in_list, "p-1/y.jpg": "y"}, "the first one keeps its short name"
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(shard, "w") as archive:
            for member in ("m.jpg", "d/m.jpg", "../m.jpg", "m.jpg"):
                archive.addfile(tarfile.TarInfo(member))
    found = [*OutputNames(Path("out")).assign(expand(["0.tar", "1.tar"]))]
    names = [source.output_stem for source in found]
    assert names[:4] == ["0/m", "0/d/m", "0/__/m", "0/m.jpg"], "a name may occur twice in a tar"
    assert names[4:] == ["1/m", "1/d/m", "1/__/m", "1/m.jpg"]


def test_urls_standard_input_and_contents_in_memory() -> None:
    urls = ["http://h/a/x.jpg?v=1", "http://h/a/x.jpg?v=2", "http://g/a/y.jpg", "http://h/a/y.jpg"]
    assert list(of_inputs(*urls).values()) == ["x.jpg_v=1", "x.jpg_v=2", "g/a/y", "h/a/y"]
    assert of_inputs("http://host:80/") == {"http://host:80/": "host_80"}
    picture = io.BytesIO(b"\x89PNG\r\n\x1a\n" + bytes(300))
    assert of_inputs("-", stdin=picture) == {"-": "stdin"}
    twice = [Source("x.png", data=b"1"), Source("x.png", data=b"2")]
    assert len({source.output_stem for source in OutputNames(Path("out")).assign(twice)}) == 2


def test_no_result_replaces_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/b.png").touch()
    found = named("b.jpg", "sub/b.png")
    names = OutputNames(Path("sub"), lambda: found)
    (first, _) = names.assign(found)
    with pytest.raises(InputError, match="would replace the input"):
        names.path(Record("b.jpg", 0, "", output_stem=first.output_stem), ".png")
    assert names.path(Record("b.jpg", 0, "", output_stem=first.output_stem), ".mp4")


parts = st.sampled_from(
    ["a", "A", "b", "x.png", "x.mp4", "x.jpg", "x.jpg.png", "x.JPG", "x", "..", ".", "", "a.png",
     "caf\u00e9.jpg", "cafe\u0301.jpg", "C:", "\\", "..\\x", "x~1.png", "é" * 130 + ".jpg", ".jpg"]
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)  # fmt: skip
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
many_paths = st.lists(paths | paths.map("/".__add__), min_size=1, max_size=12)


@given(many_paths, st.booleans(), st.randoms(use_true_random=False))
def test_any_inputs_have_their_own_files_inside_the_folder(
    names: list[str], listed: bool, chance: random.Random
) -> None:
    found = stems(*names, listed=listed)
    files: dict[str, Path] = {}
    folders: set[str] = set()
    for name, stem in zip(names, found, strict=True):
        path = PurePosixPath(stem)
        assert stem and not path.is_absolute() and ".." not in path.parts and "\\" not in stem
        assert all(len(os.fsencode(part)) < 251 for part in path.parts)
        source = Path(name).resolve()
        for ending in ENDINGS:
            assert os.path.normpath(f"out/{stem}{ending}").startswith("out/")
            assert files.setdefault(fold(f"{stem}{ending}"), source) == source
        folders |= {fold(str(parent)) for parent in path.parents}
    assert not folders & set(files), "no file is where a folder must be"
    if listed:
        shuffled = chance.sample(names, len(names))
        expected = dict(zip(names, found, strict=True))
        assert dict(zip(shuffled, stems(*shuffled), strict=True)) == expected
    if len({Path(name).resolve() for name in names}) == 1:
        assert not any("/" in stem for stem in found), "an input alone has its short name"


def fold(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def test_memory_for_many_inputs_is_small() -> None:
    """Hashes are kept, not paths."""
    import tracemalloc

    count = 5000
    deep = "folder_with_a_long_name/" * 8

    def listed() -> list[Source]:
        return named(*(f"{deep}{i}.jpg" for i in range(count)))

    names = OutputNames(Path("out"), listed)
    tracemalloc.start()
    for _ in names.assign(named(f"{deep}0.jpg")):
        kept = sum(t.size for t in tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(True, "*output_names.py")]).traces)  # fmt: skip
    tracemalloc.stop()
    assert kept < 60 * count
