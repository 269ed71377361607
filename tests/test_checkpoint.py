"""Tests of checkpoints: no code runs, damage is detected, and every failed write leaves the last
checkpoint as it is."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hiera_core.data import toy_datasets
from hiera_core.errors import CheckpointError, HieraError, OutputError
from hiera_core.training.checkpoints import checkpoint, checkpoint_file, checkpoint_meta
from hiera_core.weights.download_record import sha256_of
from tests.test_trainer import NARROW, digits, losses, recipe_of, run

pytestmark = pytest.mark.usefixtures("quick_curves")

RECIPE = """
extends: hiera_nano_32
model: {config: {embed_dim: 8, stages: [1, 1, 1]}}
batch_size: 8
save_every: 0.5
schedule: {epochs: 1, warmup_epochs: 0}
"""


class Gadget:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def plant(folder: Path, marker: Path, name: str) -> None:
    """Write a file with a gadget, as a plain pickle, and in torch's zip format for odd names."""
    file = io.BytesIO()
    torch.save({"x": Gadget(marker)}, file)
    zipped = name.endswith((".distcp", ".pth"))
    (folder / name).write_bytes(file.getvalue() if zipped else pickle.dumps(Gadget(marker)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with checkpoints after 4 and 8 steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe_of("hiera_nano_32", schedule__epochs=2), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 32 digits in two class folders: 4 steps of RECIPE."""
    source, folder = toy_datasets.Digits(), tmp_path_factory.mktemp("pictures")
    for i in range(32):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        content = source[i].content()
        assert isinstance(content, bytes)
        path.write_bytes(content)
    return folder


@pytest.fixture
def sent(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to change."""
    shutil.copytree(finished, tmp_path / "sent")
    return tmp_path / "sent"


def resume(folder: Path, where: str = "auto") -> Any:
    return run(recipe_of("hiera_nano_32", schedule__epochs=2), folder, resume=where)


# Files that somebody sent ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.pkl", "model.pth", "X.PT"])
def test_no_pickle_is_read(
    tmp_path: Path, pictures: Path, hiera: Callable[..., tuple[int, str, str]], name: str
) -> None:
    marker, folder, recipe = tmp_path / "marker", tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    train = ("train", recipe, pictures, "-j", "0", "-q")
    assert hiera(*train, "-o", folder)[0] == 0
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    pickle.loads(pickle.dumps(Gadget(marker)))
    assert marker.exists(), "the gadget works"
    marker.unlink()
    plant(newest, marker, name)
    plant(folder, marker, name)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for where, output in (("auto", folder), (newest, folder), (folder, tmp_path / "new")):
        code, _, err = hiera(*train, "-o", output, "--resume", where)
        assert code == 3, err
        assert name in err and "pickle" in err and err.count("\n") == 1
    assert not marker.exists()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_torch_is_refused(sent: Path, tmp_path: Path) -> None:
    """As versions before this format wrote it: meta.json, .metadata, and a file for each rank."""
    newest = sent / "checkpoints/step_00000008"
    shutil.rmtree(newest)
    newest.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        plant(newest, tmp_path / "marker", name)
    for where in ("auto", str(newest)):
        (newest / "meta.json").write_text('{"step": 8}')
        with pytest.raises(CheckpointError, match=r"nothing of .* was read"):
            resume(sent, where)
    (newest / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        resume(tmp_path / "new", str(newest))
    assert not (tmp_path / "marker").exists()


ODD_VALUES: list[tuple[str, Any]] = [
    ("format", 2),
    ("format", "1"),
    ("step", -1),
    ("step", 9),
    ("step", 10**30),
    ("step", "8"),
    ("step", True),
    ("step", 8.0),
    ("recipe", None),
    ("recipe", [1]),
    ("card", []),
    ("card", {"preprocessing": 3}),
    ("card", {"preprocessing": {"mean": 3}}),
    ("card", {"preprocessing": {"mean": [1]}}),
    ("card", {"preprocessing": {"size": []}}),
    ("card", {"preprocessing": {"resize": float("inf")}}),
    ("card", {"preprocessing": {"interpolation": {}}}),
    ("card", {"classes": "abc"}),
    ("card", {"classes": [1]}),
    ("data", 3),
    ("seen", 1.5),
    ("unread", None),
    ("rows", 3),
    ("rows", [[1, 2, 3]]),
    ("rows", [["1", 2, 3, 4]]),
    ("rows", [[1, 2, 3, 4]] * 1000),  # more than the steps
    ("sha256", 3),
    ("sha256", "0" * 64),
    ("scaler", 1),
    ("scaler", {"scale": "x"}),
    ("loss", {}),
    ("loss", "0.5"),
    ("val", "x"),
    ("val", {"loss": "x"}),
    ("val", {"top1": 10**400}),
    ("epoch", []),
]


@pytest.mark.parametrize(("key", "value"), ODD_VALUES)
def test_odd_values_in_meta_json_are_refused(sent: Path, key: str, value: Any) -> None:
    path = sent / "checkpoints/step_00000008/meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, key: value}))
    with pytest.raises(CheckpointError):
        resume(sent)
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
    if key in checkpoint_meta.REQUIRED:
        with pytest.raises(CheckpointError):
            resume(sent)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\xff"])
def test_odd_meta_json_is_refused(sent: Path, text: str) -> None:
    path = sent / "checkpoints/step_00000008/meta.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        resume(sent)


def test_a_huge_meta_json_is_not_read(sent: Path) -> None:
    with (sent / "checkpoints/step_00000008/meta.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="too large"):
        resume(sent)


def damaged_files(content: bytes) -> Iterator[bytes | None]:
    """Yield damaged versions of a state file; None stands for no file."""
    yield None
    yield b""
    yield content[:100]
    yield content[:-1]
    yield content + b"\0"
    for position in (0, 9, len(content) // 2, len(content) - 1):
        yield content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_damage_of_the_tensors_is_detected(sent: Path) -> None:
    newest, previous = (sent / f"checkpoints/step_{n:08}" for n in (8, 4))
    path = newest / "state.safetensors"
    model = (sent / "model.safetensors").read_bytes()
    for content in damaged_files(path.read_bytes()):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be loaded") as error:
            resume(sent)
        assert error.value.hint == f"--resume {previous}"
        path.touch()
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        resume(sent)
    assert (sent / "model.safetensors").read_bytes() == model
    resume(sent, str(previous))
    assert (sent / "model.safetensors").read_bytes() == model


def test_tensors_that_do_not_fit_are_refused(sent: Path) -> None:
    """Even if the file is whole. Nothing is loaded then."""
    folder = sent / "checkpoints/step_00000008"
    path, meta = folder / "state.safetensors", json.loads((folder / "meta.json").read_text())
    tensors = safetensors.torch.load_file(path)
    name = "optimizer.exp_avg.norm.weight"
    others = {
        "no tensor": {k: v for k, v in tensors.items() if k != name},
        "unknown tensor": {**tensors, "model.extra": torch.zeros(3)},
        "not F32": {**tensors, name: tensors[name].double()},
        "is F32": {**tensors, name: tensors[name][:-1].clone()},
    }
    for message, changed in others.items():
        safetensors.torch.save_file(changed, path)
        sha256 = sha256_of(path)
        (folder / "meta.json").write_text(json.dumps({**meta, "sha256": sha256}))
        with pytest.raises(CheckpointError, match=message):
            resume(sent)


# Writing and reading --------------------------------------------------------------------------


def test_the_file_of_tensors_is_one_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "a scalar": torch.tensor(3.5),
        "transposed": torch.randn(4, 6).T,
        "brain": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "numbers": torch.arange(5),
        "exact": torch.randn(2).double(),
    }
    path = tmp_path / "x.safetensors"
    assert checkpoint_file.write_tensors(path, tensors) == sha256_of(path)
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    targets = {name: torch.zeros_like(value) for name, value in tensors.items()}
    checkpoint_file.read_tensors(path, targets)
    assert all(torch.equal(targets[name], value) for name, value in tensors.items())
    assert checkpoint_file.write_tensors(None, tensors) == ""


def test_resuming_with_a_loss_scale_is_bit_exact(tmp_path: Path) -> None:
    """In fp16, the state of the loss scaler is part of a checkpoint. With drop path and mixup."""
    config = {**NARROW, "drop_path_rate": 0.3}
    settings: dict[str, Any] = {"precision": "fp16", "augment__mixup": 0.8, "model__config": config}
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, **settings)
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000008")
    run(recipe, tmp_path / "cut", resume="auto")
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    meta = checkpoint.read_meta(tmp_path / "cut/checkpoints/step_00000008")
    assert meta["scaler"]["scale"] > 0


def test_folders_are_not_flushed_where_they_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no O_DIRECTORY, and opening a folder fails there."""
    opened = os.open

    def open_file(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments, **options)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", open_file)
    run(recipe_of("hiera_nano_32", schedule__epochs=1), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step_00000004/meta.json").exists()


# Failures while a run saves -------------------------------------------------------------------

CALLS = {
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "mkdir": (os, "mkdir"),
    "open": (io, "open"),
    "create": (os, "open"),
}


class FailingCall:
    """A function of the system that fails at its Nth call."""

    def __init__(self, original: Callable[..., Any], number: int, error: BaseException) -> None:
        self.original, self.number, self.error, self.count = original, number, error, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self.number:
            raise self.error
        return self.original(*arguments, **options)


def check_failures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: BaseException,
    check: Callable[[BaseException], None],
    step: int = 1,
) -> int:
    """Let every Nth call fail; each time, check the error, the files and that the run resumes.

    Returns:
        Number of failures.
    """
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, batch_size=8)
    splits = digits(8, 8)  # two steps, each with a validation and a checkpoint
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing curves takes most of the time
    run(recipe, tmp_path / "whole", splits)
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    module, name = CALLS[call]
    for number in range(1, 1000, step):
        folder = tmp_path / f"run{number}"
        failing = FailingCall(getattr(module, name), number, error)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            try:
                run(recipe, folder, splits)
            except BaseException as raised:
                check(raised)
            else:
                if failing.count < number:
                    return number // step
        for path in folder.glob("checkpoints/step_????????"):
            meta = checkpoint.read_meta(path)
            assert sha256_of(path / "state.safetensors") == meta["sha256"]
        if (folder / "model.safetensors").exists():
            assert (folder / "model.safetensors").read_bytes() == expected
        run(recipe, folder, splits, resume="auto")
        assert (folder / "model.safetensors").read_bytes() == expected
        assert losses(folder) == losses(tmp_path / "whole")
        assert not list(folder.rglob("*.unfinished"))
    raise AssertionError("the run never ends")


def is_output_error(error: BaseException) -> None:
    assert isinstance(error, OutputError), repr(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_failed_write_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert check_failures(tmp_path, monkeypatch, call, error, is_output_error) > 1


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", sorted(CALLS))
def test_every_failed_call_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    error = OSError(code, os.strerror(code))

    def check(raised: BaseException) -> None:
        assert isinstance(raised, HieraError), repr(raised)

    check_failures(tmp_path, monkeypatch, call, error, check)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_interrupt_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def check(raised: BaseException) -> None:
        assert type(raised) is KeyboardInterrupt

    check_failures(tmp_path, monkeypatch, call, KeyboardInterrupt(), check)


@pytest.mark.parametrize(
    ("kind", "expected"), [("interrupt", 130), ("terminate", 143), ("disk", 5)]
)
def test_exit_codes_of_failures_while_saving(
    tmp_path: Path,
    pictures: Path,
    hiera: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    expected: int,
) -> None:
    from hiera_cli.exit_codes import Interrupted

    errors = {
        "interrupt": Interrupted(signal.SIGINT),
        "terminate": Interrupted(signal.SIGTERM),
        "disk": OSError(errno.EIO, "Input/output error"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    train = ("train", recipe, pictures, "-j", "0", "-q", "-o", tmp_path / "run")
    with monkeypatch.context() as patch:
        # The second call writes the tensors of the second checkpoint.
        original = checkpoint_file._write
        failing = FailingCall(original, 2, errors[kind])
        patch.setattr(checkpoint_file, "_write", failing)
        code, _, err = hiera(*train)
    assert code == expected, err
    assert err.count("hiera:") <= 1 and err.count("\n") <= 1  # typer is silent after an interrupt
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]
    assert hiera(*train, "--resume", "auto")[0] == 0


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of("hiera_nano_32", schedule__epochs=3, keep=1)

    def fail(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoint, "_remove", fail)
    assert run(recipe, tmp_path / "run")["step"] == 12
    assert "cannot be removed (Directory not empty)" in caplog.text


def test_incomplete_checkpoints_are_removed_at_the_next_save(sent: Path) -> None:
    folder = sent / "checkpoints"
    (folder / "step_00000002").mkdir()  # as if killed while it was removed
    (folder / "step_00000002/state.safetensors").touch()
    (folder / "step_00000007.unfinished").mkdir()  # as if killed while it was saved
    shutil.rmtree(folder / "step_00000008")
    resume(sent)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["latest", "step_00000004", "step_00000008"]


def test_a_link_among_the_checkpoints_is_removed_and_its_target_kept(tmp_path: Path) -> None:
    target = tmp_path / "other/step_00000004"
    target.mkdir(parents=True)
    (target / "meta.json").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000004").symlink_to(target)
    checkpoint.remove_all(tmp_path / "checkpoints")
    assert (target / "meta.json").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []
