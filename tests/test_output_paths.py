"""Tests of the paths of output files: what is due to one input does not end the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiera_core.errors import InputError, OutputError
from hiera_core.records import Record
from hiera_core.viz.output_paths import output_path, safe_parts, split_ending, split_url


def record(stem: str, name: str = "x.jpg") -> Record:
    return Record(name, 0, "", output_stem=stem)


def test_a_path_that_is_too_long_fails_its_own_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name too long"):
        output_path(tmp_path, record("/".join(["x" * 200] * 30)), ".png")


def test_a_result_in_the_place_of_a_folder_fails_its_own_input(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match="cannot be written"):
        output_path(tmp_path, record("a/b"), ".png")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        output_path(tmp_path, record("c"), ".png")


def test_a_folder_that_cannot_be_made_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OutputError, match="No space left"):
        output_path(tmp_path, record("a/x"), ".png")


def test_a_folder_that_is_a_link_fails_its_own_input(tmp_path: Path) -> None:
    """A folder of results that somebody has sent may hold links to other folders."""
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "out/a/photos").symlink_to(tmp_path / "home")
    for stem in ("a/photos/x", "a/photos/2026/x"):
        with pytest.raises(InputError, match="photos is a link"):
            output_path(tmp_path / "out", record(stem), ".png")
    assert list((tmp_path / "home").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "out")  # the folder of all results may be one
    assert output_path(tmp_path / "link", record("a/x"), ".png").parent == tmp_path / "link/a"


def test_a_result_does_not_replace_its_input(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(InputError, match="would replace the input"):
        output_path(tmp_path, record("x", str(tmp_path / "x.png")), ".png")


def test_records_without_a_stem_are_named_after_their_input(tmp_path: Path) -> None:
    for name, expected in [("/a/x.jpg", "x.png"), ("sample clip", "sample clip.png")]:
        assert output_path(tmp_path, record("", name), ".png") == tmp_path / expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("/a//./b/x.jpg", ("a", "b", "x.jpg")),
        ("..\\..\\x.jpg", ("__", "__", "x.jpg")),
        ("C:\\x.jpg", ("C_", "x.jpg")),
        ("a.png/b.MP4/x.png", ("a.png_", "b.MP4_", "x.png")),
        (".hiera-0123456789abcdef/x\0.jpg", ("_.hiera-0123456789abcdef", "x_.jpg")),
        ("/", ("input",)),
        ("", ("input",)),
    ],
)
def test_parts_are_safe(name: str, parts: tuple[str, ...]) -> None:
    assert safe_parts(name) == parts


def test_endings_of_images_and_videos_are_split() -> None:
    for name, expected in [
        ("x.JPG", ("x", ".JPG")),
        ("x.tar.webm", ("x.tar", ".webm")),
        ("x.v2", ("x.v2", "")),
        (".jpg", (".jpg", "")),
        ("x", ("x", "")),
    ]:
        assert split_ending(name) == expected
    assert split_url("https://host:80/a%20b.jpg?v=1/2") == ("host_80/a b.jpg", "_v=1_2")
    assert split_url("https://host/a.jpg?..\\..\\b")[1] == "_.._.._b"
    assert split_url("https://[::1") == ("https://[::1", "")
