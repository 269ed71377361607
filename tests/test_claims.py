"""Tests of the checks of output files and folders, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiera_cli.exit_codes import _plain
from hiera_cli.output_files.claims import claim_folder, target_of
from hiera_cli.output_files.feature_outputs import FeatureOutputs
from hiera_cli.result_stream import _what_is
from hiera_core.errors import UsageError

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("results", "name", "message"),
    [
        ("features", "image-00000.safetensors", "holds features of an earlier run; --resume"),
        ("features", "video-00012.parquet", "holds features of an earlier run; --resume"),
        ("features", "part-000000000000-0123abcd.parquet", "is not empty; --overwrite writes"),
        ("rows", "part-000000000000-0123abcd.parquet", "holds rows of an earlier run; --resume"),
        ("features", "image-1.png", "is not empty; --overwrite writes into it"),
        (None, "image-00000.safetensors", "is not empty; --overwrite writes into it"),
    ],
)
def test_a_folder_with_results_can_be_resumed(
    tmp_path: Path, results: Any, name: str, message: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    with pytest.raises(UsageError, match=message), claim_folder(tmp_path / "out", False, results):
        pass
    with claim_folder(tmp_path / "out", True, results):
        pass


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.png").touch()
    with pytest.raises(UsageError, match=r"one\.png' is a file, not a folder"):
        target_of(tmp_path / "one.png/x.jsonl")
    with pytest.raises(UsageError, match="there is no folder"):
        target_of(tmp_path / "none/x.jsonl")


def test_formats_that_are_only_printed_have_a_hint() -> None:
    with pytest.raises(UsageError, match=r"or print them: -f jsonl > big\.jsonl$"):
        FeatureOutputs.parse(Path("big.jsonl"), None, None)
    with pytest.raises(UsageError) as error:
        FeatureOutputs.parse(Path("big.h5"), None, None)
    assert "print" not in str(error.value)
    with pytest.raises(UsageError) as error:
        FeatureOutputs.parse(None, None, Path("big.csv"))
    assert "print" not in str(error.value)


def test_the_summary_tells_a_picture_from_a_folder(tmp_path: Path) -> None:
    assert _what_is("x.png") == "the picture is" and _what_is("x.mp4") == "the movie is"
    assert _what_is("shown") == _what_is("v1.2/") == "pictures are in"
    (tmp_path / "x.png").mkdir()
    assert _what_is(str(tmp_path / "x.png")) == "pictures are in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mae", "x.png", "-o", "o", "--mask-ratio", "60%"], "'--mask-ratio': give a number"),
        (["eval", "digits", "--probe", "svm"], "'--probe': 'svm' is not one of 'knn', 'linear'"),
        (["predict", "x.png", "-k", "many"], "'--topk' / '-k': give a whole number"),
        (["features", "x.png", "--segments", "y"], "'--segments': give a number (SECONDS)"),
        (["predict", "x.png", "-k", "0"], "'--topk' / '-k': "),
    ],
)
def test_messages_about_options_have_no_words_of_libraries(
    hiera: Command, arguments: list[str], message: str
) -> None:
    code, _, err = hiera(*arguments)
    assert code == 2 and message in err, err
    for word in ("Input should", "Value error", "parse string"):
        assert word not in err


def test_other_limits_are_put_plainly() -> None:
    assert _plain("Input should be greater than 3") == "give a number greater than 3"


def test_a_cache_that_is_a_file_is_refused_before_work(hiera: Command, tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    code, _, err = hiera(
        "eval", "digits", "-m", "hiera_nano_32", "--probe", "knn", "--cache", tmp_path / "c"
    )
    assert code == 2 and "is a file; name a folder" in err


def test_a_cache_that_cannot_be_made_is_refused_before_work(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiera_cli.output_files.claims.os.access", lambda *_: False)
    command = ("eval", "digits", "-m", "hiera_nano_32", "--probe", "knn")
    code, _, err = hiera(*command, "--cache", tmp_path / "ro/c")
    shown = f"folder '{tmp_path}' is read-only; write to another folder"
    assert code == 2 and err == f"hiera: {shown}\n"
