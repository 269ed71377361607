"""Tests of options with odd values: every command ends, with one line and a documented code.

The options and arguments are those that the commands declare, so a new one is tested, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from typer.main import get_command

import hiera_core
from hiera_cli.app import app
from hiera_core.device import select_device
from hiera_core.errors import DeviceError, UsageError

from .test_reconstruct import SAMPLES

Command = Callable[..., tuple[int, str, str]]
CODES = {0, 1, 2, 3, 4, 5}
SECONDS = 120  # a command that takes longer hangs

# A quick command line of each command, to which an option is added.
COMMANDS: dict[str, list[str]] = {
    "predict": [str(SAMPLES / "three.png"), "-m", "hiera_nano_32"],
    "mae": [str(SAMPLES / "three.png"), "-m", "mae_hiera_nano_32", "-o", "out"],
    "features": [str(SAMPLES / "three.png"), "-m", "hiera_nano_32"],
    "eval": ["list.txt", "-m", "hiera_nano_32"],
    "convert": ["hiera_nano_32", "out", "--to", "hub"],
    "bench": ["hiera_nano_32", "--seconds", "0.01", "-b", "1", "--attention", "fused"],
    "models": [],
    "train": ["hiera_nano_32", "digits", "--print-recipe"],
}
NUMBERS = [
    "0", "-1", "1", "²", "３", "1_000", " 5 ", "1e3", "nan", "inf", "-inf", "1e308", "1e-320",
    str(2**31), str(2**63), str(10**11), "9" * 400, "9" * 5000,
]  # fmt: skip
TEXTS = [
    "", " ", "auto", "none", ",", "1,,2", "é", "\U0001f600", "\udcff", "x" * 5000, "a\0b", "%", "=",
]  # fmt: skip
PATHS = [".", "..", "/", "/dev/null", "/dev/full", "file", "folder", "dangling", "gone/x",
         "binary", "brackets.yaml", "x" * 300]  # fmt: skip
VALUES = NUMBERS + TEXTS + PATHS
QUICK = ["²", "nan", "", "\udcff", "9" * 5000, "/dev/full", "brackets.yaml"]


LONG = {("--seconds", "1e3"), ("--seconds", "1_000")}  # right, and as long as they say
UPLOADS = {("convert", "--push-to-hub")}  # needs a hub, see test_conversion.py


def options() -> Iterator[tuple[str, str]]:
    """Yield the name of a command and of one of its options that take a value."""
    root: Any = get_command(app)
    for name, command in root.commands.items():
        for parameter in command.params:
            takes_value = parameter.param_type_name == "option" and not parameter.is_flag
            option = max(parameter.opts, key=len)
            if takes_value and (name, option) not in UPLOADS:
                yield name, option


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with odd files, which no command changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("some text\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "folder").mkdir()
    (tmp_path / "brackets.yaml").write_text("[" * 30_000)
    (tmp_path / "list.txt").write_text(f"{SAMPLES / 'three.png'} three\n")
    (tmp_path / "dangling").symlink_to("nothing")
    return tmp_path


def check(hiera: Command, arguments: list[str]) -> None:
    code, _, err = hiera(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("hiera: ")]
    shown = [argument[:60] for argument in arguments]
    assert code in CODES, (shown, code, err)
    assert "Traceback" not in err and "unexpected error" not in err, (shown, err)
    assert "[Errno" not in err, (shown, err)
    if code == 2:
        assert len(lines) == 1 and len(err.splitlines()) == 1, (shown, err)
    if code:
        assert lines, (shown, err)


@pytest.mark.parametrize(("command", "option"), list(options()))
def test_odd_values(
    hiera: Command, forked_workers: None, places: Path, command: str, option: str
) -> None:
    """Some odd values. `test_many_odd_values` tries all of them."""
    try_values(hiera, command, option, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), list(options()))
def test_many_odd_values(hiera: Command, places: Path, command: str, option: str) -> None:
    try_values(hiera, command, option, [value for value in VALUES if value not in QUICK])


def try_values(hiera: Command, command: str, option: str, values: list[str]) -> None:
    for number, value in enumerate(values):
        if (option, value) in LONG:
            continue
        given = [command, *COMMANDS[command]]
        if option == "--output" and command == "mae":
            given = given[:-2]
        # Some values are right, and write to these places.
        given = [f"out{number}" if argument == "out" else argument for argument in given]
        end = threading.Timer(SECONDS, os._exit, [70])
        end.start()
        check(hiera, [*given, option, value])
        end.cancel()


# Single faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "topk: ²", "topk: .nan", "topk: .inf", "topk: [1, 2]", "topk: {a: 1}", "topk: 2020-99-99",
        f"topk: {'9' * 5000}", "model: ''", "output: ''", "recursive: maybe", "device: cuda:x",
        "a: &a [*a]", "? [1, 2]\n: 3", "topk: &t [1]\nclips: *t", "- 1", "3", "x", "\x01",
        "format: yes", "batch-size: 2.5", "config: other.yaml",
    ],
)  # fmt: skip
def test_odd_config_files(hiera: Command, places: Path, text: str) -> None:
    (places / "odd.yaml").write_text(text)
    code, out, err = hiera("predict", *COMMANDS["predict"][:1], "--config", "odd.yaml")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert "unexpected" not in err


def test_config_values_mean_what_they_mean_on_the_command_line(
    hiera: Command, places: Path
) -> None:
    (places / "good.yaml").write_text(
        "model: hiera_nano_32\ntopk: 2\nrecursive: true\nquiet: false\nformat: jsonl\n"
        "batch_size: 4\nworkers: auto\nlabels:\n"
    )
    code, out, _ = hiera("predict", SAMPLES / "three.png", "--config", "good.yaml")
    assert code == 0 and out.count('"prob"') == 2


def test_huge_batches_and_many_workers_cost_nothing(hiera: Command) -> None:
    arguments = ["predict", SAMPLES / "three.png", "-m", "hiera_nano_32"]
    assert hiera(*arguments, "-b", "1000000", "-j", "4096")[0] == 0
    for option, value in [("-b", 10**11), ("-b", 2**31), ("-j", 10**11), ("-j", 2**31)]:
        code, _, err = hiera(*arguments, option, value)
        assert code == 2 and "too large; give a number of at most" in err
    with pytest.raises(UsageError, match="at most"):
        hiera_core.predict(SAMPLES / "three.png", "hiera_nano_32", batch_size=2**31)
    record = hiera_core.predict(SAMPLES / "three.png", "hiera_nano_32", workers=10**11)
    assert record["status"] == "ok"


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "cuda:-1", "cuda:²", "cpu:0", "gpu", "CUDA"])
def test_devices_that_do_not_exist(hiera: Command, name: str) -> None:
    code, _, err = hiera(*["predict", *COMMANDS["predict"]], "--device", name)
    assert code == 2 and "cuda:N" in err


def test_the_number_of_a_gpu_counts(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, places: Path
) -> None:
    """On a machine with two GPUs, `cuda:1` is the second, and `cuda:2` does not exist."""
    from hiera_core.benchmarking import machine, runner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="not available here"):
        select_device("cuda:2")
    header, _ = machine.settings("cuda:1", "auto", "infer", None)
    assert (header.device, header.machine) == ("cuda:1", "GPU 1")
    jobs = []
    monkeypatch.setattr(runner, "measure", lambda group, *_: jobs.extend(group) or [])
    hiera("bench", "hiera_nano_32", "--device", "cuda:1")
    assert [(job.device, job.batch) for job in jobs] == [("cuda:1", 64)]


@pytest.mark.parametrize("name", ["out.xls", "out.jsonl", "out.tar.gz", "run.v2"])
def test_features_do_not_guess_what_an_ending_means(
    hiera: Command, places: Path, name: str
) -> None:
    run = ["features", SAMPLES / "three.png", "-m", "hiera_nano_32", "-o", name]
    code, _, err = hiera(*run)
    assert code == 2 and "end it in .safetensors, .npz, .parquet" in err
    assert not Path(name).exists()
    assert hiera(*run, "--save-as", "npz")[0] == 0 and Path(name).is_dir()


@pytest.mark.parametrize("name", ["out.NPZ", "out.SafeTensors"])
def test_endings_may_be_capitals(hiera: Command, places: Path, name: str) -> None:
    assert hiera("features", *COMMANDS["features"], "-o", name)[0] == 0
    assert Path(name).is_file()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("predict", "--batch-size", "0"),
        ("predict", "--batch-size", "x"),
        ("predict", "--workers", "0"),
        ("features", "--workers", "5000"),
        ("eval", "--batch-size", "-1"),
        ("bench", "--batch-sizes", "1,0"),
        ("bench", "--fail-over", "x"),
        ("train", "--workers", "x"),
        ("mae", "--seed", "-1"),
    ],
)
def test_a_message_names_its_option(
    hiera: Command, places: Path, command: str, option: str, value: str
) -> None:
    given = [word for word in COMMANDS[command] if word != "--print-recipe"]
    code, out, err = hiera(command, *given, f"{option}={value}")
    assert (code, out) == (2, "") and f"Invalid value for {option}" in err.replace("'", "")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_dash_is_standard_output(hiera: Command, places: Path, name: str) -> None:
    before = sorted(places.iterdir())
    for command in ("predict", "eval"):
        expected = hiera(command, *COMMANDS[command], "-f", "csv")[1]
        code, out, _ = hiera(command, *COMMANDS[command], "-f", "csv", "-o", name)
        assert code == 0 and out.splitlines()[0] == expected.splitlines()[0]
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["features", *COMMANDS["features"], "-o", "-"],
        ["features", *COMMANDS["features"], "--visualize", "-"],
        ["predict", *COMMANDS["predict"], "--save-images", "-"],
        ["predict", *COMMANDS["predict"], "--config", "-"],
        ["mae", *COMMANDS["mae"][:-2], "-o", "-"],
        ["bench", *COMMANDS["bench"], "--export", "-"],
        ["bench", *COMMANDS["bench"], "--plot", "-"],
        ["convert", "hiera_nano_32", "-", "--to", "hub"],
        ["train", "hiera_nano_32", "digits", "-o", "-"],
    ],
)
def test_a_dash_is_no_file(hiera: Command, places: Path, arguments: list[str]) -> None:
    before = sorted(places.iterdir())
    code, out, err = hiera(*arguments)
    assert (code, out) == (2, "") and "'-' is no file" in err and "./-" in err
    assert "'-' is no file or folder" in err
    assert sorted(places.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="no /dev")
def test_an_open_file_of_the_process_is_no_output(hiera: Command, places: Path) -> None:
    read, write = os.pipe()
    code, _, err = hiera("predict", *COMMANDS["predict"], "-f", "csv", "-o", f"/dev/fd/{write}")
    os.close(read), os.close(write)
    assert code == 2 and "is not a regular file; leave out this option" in err


@pytest.mark.parametrize("name", ["-dash.png", "-.jpg", "--two.mp4", "-5.png", "-dash"])
def test_a_file_that_begins_with_a_dash(hiera: Command, places: Path, name: str) -> None:
    Path(name).write_bytes((SAMPLES / "three.png").read_bytes())
    nano = ["-m", "hiera_nano_32"]
    code, out, err = hiera("predict", name, *nano)
    assert (code, out) == (2, "") and f"write ./{name}, or put -- before" in err
    assert hiera("predict", *nano, f"./{name}")[0] == 0
    assert hiera("predict", *nano, "--", name)[0] == 0
    _, _, err = hiera("predict", "x.png", *nano, "--no-such-option")
    assert "No such option" in err and "put --" not in err
