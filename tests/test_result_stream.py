"""Tests of streams of results: what is resumed, what is refused, and what errors leave."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hiera_core

from .conftest import draw_weights
from .fork_server import ForkServer
from .test_reconstruct import SAMPLES

Command = Callable[..., tuple[int, str, str]]
DIGITS = [SAMPLES / f"{name}.png" for name in ("three", "five", "eight")]
NANO = ["-m", "hiera_nano_32", "--dtype", "fp32"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stable(text: str) -> list[Any]:
    """Return records without the last digits, which depend on how inputs fall into batches."""
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        record["topk"] = [(guess["id"], round(guess["prob"], 4)) for guess in record["topk"]]
    return records


@pytest.fixture
def interrupted(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a function that runs `predict` with some options until a signal comes after two
    records, and returns the output file."""
    from hiera_cli.exit_codes import Interrupted
    from hiera_cli.result_stream import ResultStream

    def run(*options: object) -> Path:
        path = tmp_path / "out.jsonl"
        real = ResultStream.record

        def record(self: ResultStream, value: Any) -> None:
            if value.index == 2:
                raise Interrupted(2)
            real(self, value)

        with monkeypatch.context() as patch:
            patch.setattr(ResultStream, "record", record)
            code, _, err = hiera("predict", *DIGITS, *NANO, "-o", path, *options)
        assert code == 130
        assert err == f"hiera: interrupted; 2 inputs are in {path}.partial; --resume continues\n"
        assert names_in(tmp_path) == ["out.jsonl.partial", "out.jsonl.partial.json"]
        return path

    return run


# Resuming -----------------------------------------------------------------------------------------


def test_resume_completes_the_file(
    hiera: Command, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    path = interrupted()
    code, _, _ = hiera("predict", *DIGITS, *NANO, "-o", path, "--resume")
    assert code == 0 and names_in(tmp_path) == ["out.jsonl"]
    assert stable(path.read_text()) == stable(hiera("predict", *DIGITS, *NANO)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "3"], "topk 5, not 3"),
        (["--dtype", "bf16"], "dtype fp32, not bf16"),
        (["--labels", "names.txt"], "class names"),
        (["--clips", "2"], "clips none, not 2"),
        (["--checkpoint", "other.safetensors"], "weights"),
    ],
)
def test_resume_refuses_what_would_mix(
    hiera: Command,
    interrupted: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    folder = tmp_path_factory.mktemp("options")
    monkeypatch.chdir(folder)
    (folder / "names.txt").write_text("\n".join("abcdefghij"))
    model = draw_weights(hiera_core.create_model("hiera_nano_32", pretrained=True))
    hiera_core.weights.files.write_safetensors(folder / "other.safetensors", model.state_dict())
    path = interrupted()
    partial = path.with_name("out.jsonl.partial")
    before = partial.read_text()
    code, _, err = hiera("predict", *DIGITS, *NANO, "-o", path, "--resume", *options)
    assert code == 2 and "was made with" in err and message in err
    assert len(err.splitlines()) == 1 and partial.read_text() == before


def test_a_model_that_the_kind_of_input_chooses_is_compared_when_it_is_loaded(
    hiera: Command, interrupted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted("-m", "hiera_nano_32")
    facts = path.with_name("out.jsonl.partial.json")
    known = json.loads(facts.read_text())
    known["image"]["weights"] = "0" * 16
    facts.write_text(json.dumps(known))
    monkeypatch.setitem(
        hiera_core.inference.predict.Predictor.default_models, "image", "hiera_nano_32"
    )
    code, _, err = hiera("predict", *DIGITS, "--dtype", "fp32", "-o", path, "--resume")
    assert code == 2 and "was made with weights" in err
    assert len(path.with_name("out.jsonl.partial").read_text().splitlines()) == 2


def test_results_without_their_settings_are_continued_with_a_warning(
    hiera: Command, interrupted: Callable[..., Path]
) -> None:
    path = interrupted()
    path.with_name("out.jsonl.partial.json").unlink()
    code, _, err = hiera("predict", *DIGITS, *NANO, "-o", path, "--resume")
    assert code == 0 and "it is not checked" in err and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', "[" * 30_000])
def test_damaged_settings_are_one_line(
    hiera: Command, interrupted: Callable[..., Path], text: str
) -> None:
    path = interrupted()
    path.with_name("out.jsonl.partial.json").write_text(text)
    code, _, err = hiera("predict", *DIGITS, *NANO, "-o", path, "--resume")
    assert code == 2 and "is damaged" in err and len(err.splitlines()) == 1


def test_a_finished_file_says_so(hiera: Command, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run = ["predict", *NANO, "-o", path, "--resume"]
    assert hiera(*run, *DIGITS)[0] == 0
    before = path.read_text()
    code, out, err = hiera(*run, *DIGITS)
    assert (code, out) == (0, "") and err == f"hiera: {path} is finished: 3 ok, 0 failed\n"
    code, _, err = hiera(*run, *DIGITS, SAMPLES / "cat.jpg")
    assert code == 2 and "is finished, without" in err and "cat.jpg" in err
    code, _, err = hiera(*run, *DIGITS[:2])
    assert code == 2 and "is nothing now" in err
    assert path.read_text() == before and names_in(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "hiera_tiny_224"], "model hiera_nano_32, not hiera_tiny_224"),
        ([], "model hiera_nano_32, not hiera_base_224"),
        (["-m", "hiera_nano_32", "-k", "3"], "topk 5, not 3"),
        (["-m", "hiera_nano_32", "-k", "7"], "topk 5, not 7"),
    ],
)
def test_a_finished_file_of_another_model_is_refused(
    hiera: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    path = tmp_path / "out.jsonl"
    inputs = ["predict", *DIGITS, tmp_path / "missing.png"]
    assert hiera(*inputs, *NANO, "-o", path)[0] == 1
    before = path.read_text()
    code, out, err = hiera(*inputs, "-o", path, "--resume", *options)
    assert (code, out) == (2, "") and f"was made with {message}" in err
    assert len(err.splitlines()) == 1 and path.read_text() == before
    assert hiera(*inputs, *NANO, "-o", path, "--resume")[0] == 1
    weights = SAMPLES.parent / "hiera_nano_32.safetensors"
    code, _, err = hiera(*inputs, "--checkpoint", weights, "-o", path, "--resume")
    assert code == 1 and "the weights are not compared" in err


def test_all_classes_are_as_many_as_the_model_has(hiera: Command, tmp_path: Path) -> None:
    run = ["predict", *DIGITS, *NANO, "-o", tmp_path / "out.jsonl", "-k", "20"]
    assert hiera(*run)[0] == 0 and hiera(*run, "--resume")[0] == 0


def test_a_file_that_was_finished_when_its_run_was_killed_is_tidied_up(
    hiera: Command, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    run = ["predict", *DIGITS, *NANO, "-o", path, "--resume"]
    assert hiera(*run)[0] == 0
    (tmp_path / "out.jsonl.partial.json").write_text("{}")
    code, _, err = hiera(*run)
    assert code == 0 and "is finished" in err and names_in(tmp_path) == ["out.jsonl"]
    assert "; random weights are not compared" in hiera(*run, "--random-init")[2]


def test_overwriting_that_is_killed_early_mixes_no_models(
    hiera: Command, interrupted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when it has stored its own model, and before its first result."""
    from hiera_cli.exit_codes import Interrupted
    from hiera_cli.result_stream import ResultStream

    path = interrupted()
    partial = path.with_name("out.jsonl.partial")
    partial.write_text(partial.read_text().replace("hiera_nano_32", "another_model"))
    run = ["predict", *DIGITS, *NANO, "-o", path]

    def killed(*_: object) -> None:
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStream, "__enter__", killed)
        assert hiera(*run, "--overwrite")[0] == 130
    assert hiera(*run, "--resume")[0] == 0
    assert stable(path.read_text()) == stable(hiera("predict", *DIGITS, *NANO)[1])


@pytest.mark.parametrize("options", [["--overwrite"], ["--resume"], []])
@pytest.mark.parametrize("exists", [True, False])
def test_a_partial_file_that_is_a_link_is_refused(
    hiera: Command, tmp_path: Path, options: list[str], exists: bool
) -> None:
    precious = tmp_path / "precious"
    if exists:
        precious.write_text("one\nno newline at the end")
    (tmp_path / "out.jsonl.partial").symlink_to(precious)
    code, _, err = hiera("predict", *DIGITS, *NANO, "-o", tmp_path / "out.jsonl", *options)
    assert code == 2 and len(err.splitlines()) == 1 and "out.jsonl.partial" in err
    assert precious.exists() == exists
    assert not exists or precious.read_text() == "one\nno newline at the end"


def test_no_inputs_leave_no_file(hiera: Command, tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    for ending in ("jsonl", "csv", "json"):
        target = tmp_path / f"out.{ending}"
        code, _, err = hiera("predict", f"@{tmp_path}/list.txt", *NANO, "-o", target)
        assert code == 2 and "no inputs" in err and names_in(tmp_path) == ["list.txt"]


# Errors of the system -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_system_call_that_fails_is_one_line(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    """Whichever call fails, the exit code is 5, and --resume completes the file."""
    _, whole, _ = hiera("predict", *DIGITS, *NANO)
    real = getattr(os, name)
    for number in range(1, 20):
        path, calls = tmp_path / f"{number}/out.jsonl", 0
        path.parent.mkdir()

        def fail(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023
                raise OSError(error, os.strerror(error))
            return real(*arguments)

        monkeypatch.setattr(os, name, fail)
        code, _, err = hiera("predict", *DIGITS, *NANO, "-o", path)
        monkeypatch.undo()
        if calls < number:
            assert code == 0
            break
        lines = [line for line in err.splitlines() if "ok, 0 failed" not in line]
        if code:  # a folder that cannot be synced for EACCES is no error
            assert code == 5 and len(lines) == 1 and "cannot be written" in lines[0], err
            if not path.exists():
                assert hiera("predict", *DIGITS, *NANO, "-o", path, "--resume")[0] == 0
        assert stable(path.read_text()) == stable(whole)
        assert names_in(path.parent) == ["out.jsonl"]
    else:
        pytest.fail("there is no end to these calls")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("format", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("command", ["predict", "models"])
def test_a_full_standard_output_is_one_line(
    fork_server: ForkServer, tmp_path: Path, command: str, format: str
) -> None:
    arguments = [*map(str, DIGITS), *NANO] if command == "predict" else []
    process = fork_server.start(tmp_path, command, *arguments, "-f", format, stdout="/dev/full")
    assert process.wait() == 5
    assert (
        process.text("err")
        == "hiera: standard output cannot be written (No space left on device)\n"
    )


# Two at once, and odd paths -----------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["predict", DIGITS[0], *NANO, "-o", "out.jsonl"], "out.jsonl"),
        (["predict", DIGITS[0], *NANO, "--save-images", "out"], "out/"),
        (["features", DIGITS[0], *NANO, "-o", "out.npz"], "out.npz"),
        (["features", DIGITS[0], *NANO, "-o", "out"], "out/"),
        (["features", DIGITS[0], *NANO, "--visualize", "out"], "out/"),
        (["mae", DIGITS[0], "-m", "mae_hiera_nano_32", "-o", "out"], "out/"),
        (["eval", "digits", *NANO, "-o", "out.json"], "out.json"),
        (["bench", "hiera_nano_32", "-o", "out.json"], "out.json"),
        (["bench", "hiera_nano_32", "--export", "out.md"], "out.md"),
        (["bench", "hiera_nano_32", "--plot", "out.png"], "out.png"),
        (["convert", "hiera_nano_32", "out", "--to", "hub"], "out"),
        (["convert", "hiera_nano_32", "out.pth", "--to", "pth"], "out.pth"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_command_on_one_output_is_refused(
    hiera: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    output: str,
    overwrite: bool,
) -> None:
    from hiera_core.atomic.lock import exclusive

    monkeypatch.chdir(tmp_path)
    if output.endswith("/"):
        Path(output).mkdir()
        (tmp_path / output / "result.of.the.first").touch()
    with exclusive(Path(output)):
        code, out, err = hiera(*arguments, *(["--overwrite"] if overwrite else []))
    assert (code, out) == (2, "")
    assert f"another process is writing to {output.rstrip('/')!r} (process {os.getpid()}" in err
    assert len(err.splitlines()) == 1 or arguments[0] == "bench"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the path is empty"),
        (".", "is a folder"),
        ("/", "is a folder"),
        ("..", "is a folder"),
        ("/dev/null", "not a regular file"),
        ("/dev/full", "not a regular file"),
        ("fifo", "not a regular file"),
        ("file/out.jsonl", "is a file, not a folder"),
        ("x" * 300 + ".jsonl", "name too long"),
        ("é" * 124 + ".jsonl", "name too long"),
        ("x/" * 3000 + "out.jsonl", "name too long"),
        ("a\0b.jsonl", "null"),
        ("dangling/out.jsonl", "no folder"),
        ("out.xls", "end it in .jsonl"),
        ("out", "end it in .jsonl"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["predict", DIGITS[0], *NANO], ["eval", "digits", *NANO], ["bench", "hiera_nano_32"]],
    ids=["predict", "eval", "bench"],
)
def test_odd_output_files_are_refused(
    hiera: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[object],
    path: str,
    message: str,
    overwrite: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("file").touch()
    Path("dangling").symlink_to("nothing")
    before = names_in(tmp_path)
    code, out, err = hiera(*command, "-o", path, *(["--overwrite"] if overwrite else []))
    assert (code, out) == (2, "") and message in err.lower(), err
    assert len(err.splitlines()) == 1 and names_in(tmp_path) == before


def test_a_link_stands_for_the_file_that_it_names(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    Path("out.jsonl").symlink_to("disk/results.jsonl")
    assert hiera("predict", DIGITS[0], *NANO, "-o", "out.jsonl")[0] == 0
    assert Path("out.jsonl").is_symlink() and names_in(tmp_path / "disk") == ["results.jsonl"]
    code, _, err = hiera("predict", DIGITS[0], *NANO, "-o", "out.jsonl")
    assert code == 2 and "exists" in err
    assert hiera("predict", DIGITS[0], *NANO, "-o", "out.jsonl", "--overwrite")[0] == 0
    assert Path("out.jsonl").is_symlink() and json.loads(Path("out.jsonl").read_text())


def test_names_cannot_drive_the_terminal_and_images_are_no_outputs(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    picture = tmp_path / "\x1b[31mred\nline.png"
    shutil.copy(SAMPLES / "three.png", picture)
    code, out, _ = hiera("predict", picture, "-m", "hiera_nano_32", "-f", "table")
    assert code == 0 and "\x1b" not in out and "\\x1b[31mred\\nline.png" in out.splitlines()[0]
    code, _, err = hiera("predict", picture, "-f", "table", "-o", picture, "--overwrite")
    assert code == 2 and "named like an image" in err
    assert picture.read_bytes() == (SAMPLES / "three.png").read_bytes()


def test_labels_and_paths_cannot_drive_the_terminal_either(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    picture = tmp_path / "\x1b[31mred\nline.png"
    shutil.copy(SAMPLES / "three.png", picture)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"\x1b[1m{number}" for number in range(10)) + "\n")
    options = ["--labels", labels, "--save-images", tmp_path / "drawn", "-k", 1]
    code, out, _ = hiera("predict", picture, *NANO, *options, "-f", "table")
    assert code == 0 and "\x1b" not in out
    _, best, drawn = out.splitlines()
    assert "\\x1b[1m3" in best and drawn.endswith("\\x1b[31mred\\nline.png")


@pytest.mark.parametrize("name", ["a\u202egnp.exe.png", "a\u2066b.png", "a\x9bb.png"])
def test_names_cannot_change_the_order_of_what_is_read(
    name: str, tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    shutil.copy(SAMPLES / "three.png", tmp_path / name)
    code, out, err = hiera("predict", tmp_path / name, tmp_path / f"no{name}", *NANO, "-f", "table")
    assert code == 1 and name not in out and name not in err
    assert ascii(name)[1:-1] in out and f"/no{ascii(name)[1:-1]}: no such file" in err


@pytest.mark.parametrize("name", ["a\rb.png", "a\nb.png", 'a",\r\n.png', "\r.png"])
def test_rows_of_csv_hold_any_name(
    name: str, tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    for file in (name, "z.png"):
        shutil.copy(SAMPLES / "three.png", tmp_path / file)
    given = ["predict", tmp_path / name, tmp_path / "z.png", *NANO, "-o", tmp_path / "out.csv"]
    assert hiera(*given)[0] == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [str(tmp_path / name), str(tmp_path / "z.png")]
