"""Tests of the options that commands turn into the arguments of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data.clip_sampling import Sampling
from hiera_core.inference.columns import callables
from hiera_core.inference.pipeline import Pipeline

Hiera = Callable[..., tuple[int, str, str]]
SAMPLE = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples" / "three.png"
VIDEO = ("--stride", "2", "--fps", "25")
READING = ("--max-pixels", "1000000", "--decoder", "pillow")
COMPUTING = ("-j", "3", "-b", "5", "--dtype", "fp32", "--device", "cpu", "--compile")
COMMANDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "predict": (
        (SAMPLE, *VIDEO, *READING, "--clips", "2", "--crops", "1", "--fast-jpeg", "--every", "1"),
        {"clips": 2, "crops": 1, "fast_jpeg": True, "every": 1.0},
    ),
    "features": (
        (SAMPLE, *VIDEO, *READING, "--clips", "2", "--crops", "1", "--fast-jpeg", "--every", "1"),
        {"clips": 2, "crops": 1, "fast_jpeg": True, "every": 1.0},
    ),
    "mae": ((SAMPLE, *VIDEO, *READING, "-o", "out"), {"clips": 1, "crops": 1}),
    "eval": (("digits", "--decoder", "pillow", "--clips", "2", "--crops", "1"), {}),
}


class Stop(Exception):
    """Ends a command when its pipeline is made."""


@pytest.mark.parametrize("command", COMMANDS)
def test_options_reach_the_pipeline(
    command: str, hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[dict[str, Any]] = []

    def init(self: Any, model: Any = None, **options: Any) -> None:
        made.append(options)
        raise Stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "__init__", init)
    arguments, changes = COMMANDS[command]
    model = "mae_hiera_nano_32" if command == "mae" else "hiera_nano_32"
    hiera(command, *arguments, "-m", model, *COMPUTING)
    (options,) = made
    expected = {"stride": 2, "fps": 25.0, "max_pixels": 1_000_000, **changes}
    if command == "eval":
        expected = {"clips": 2, "crops": 1}
    assert options["sampling"] == Sampling(**expected)
    assert options["workers"] == 3 and options["batch_size"] == 5 and options["compile"] is True
    assert options["device"] == "cpu" and str(options["dtype"]) == "fp32"


@pytest.mark.parametrize("command", ["predict", "features"])
def test_rows_are_computed_with_the_same_options(
    command: str, hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []
    real = callables.OnColumns.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(options)
        real(self, *arguments, **options)

    monkeypatch.setattr(callables.OnColumns, "__init__", init)
    code, _, err = hiera(
        *(command, SAMPLE, "-m", "hiera_nano_32", "--rows", tmp_path / "rows", "-q"),
        *("--fast-jpeg", "-j", "2", "-b", "3", "--dtype", "fp32", "--clips", "1"),
    )
    assert code == 0, err
    (options,) = made
    assert options["sampling"] == Sampling(
        clips=1, crops=1 if command == "features" else None, fast_jpeg=True
    )
    assert (options["workers"], options["batch_size"], options["compile"]) == (2, 3, False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("option", "value"), [("-b", "many"), ("-j", "0")])
def test_counts_are_checked_first(command: str, option: str, value: str, hiera: Hiera) -> None:
    where = ("-o", "out") if command == "mae" else ()
    code, out, err = hiera(command, "digits", *where, option, value)
    assert (code, out) == (2, "") and value in err
