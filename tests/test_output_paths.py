"""Tests of the paths of output files: what is due to one input does not end the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiera_core.errors import InputError, OutputError
from hiera_core.viz.output_paths import output_path


def test_a_path_that_is_too_long_fails_its_own_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name too long"):
        output_path(tmp_path, "/".join(["x" * 200] * 30) + ".jpg", ".png")


def test_a_result_in_the_place_of_a_folder_fails_its_own_input(tmp_path: Path) -> None:
    output_path(tmp_path, "http://host/a.png", ".png").touch()
    with pytest.raises(InputError, match="cannot be written"):
        output_path(tmp_path, "http://host/a.png/b.png", ".png")


def test_a_folder_that_cannot_be_made_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OutputError, match="No space left"):
        output_path(tmp_path, "a/x.jpg", ".png")


def test_a_folder_that_is_a_link_fails_its_own_input(tmp_path: Path) -> None:
    """A folder of results that somebody has sent may hold links to other folders."""
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "out/a/photos").symlink_to(tmp_path / "home")
    for name in ("a/photos/x.jpg", "a/photos/2026/x.jpg"):
        with pytest.raises(InputError, match="photos is a link"):
            output_path(tmp_path / "out", name, ".png")
    assert list((tmp_path / "home").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "out")  # the folder of all results may be one
    assert output_path(tmp_path / "link", "a/x.jpg", ".png").parent == tmp_path / "link/a"
