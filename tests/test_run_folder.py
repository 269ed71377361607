"""Tests of the folder of a run: what a run may remove, whose folder it may use, and its lock."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiera_core.data import toy_datasets
from hiera_core.errors import UsageError
from hiera_core.lock import exclusive
from hiera_core.training import build, run_folder, trainer
from hiera_core.training.checkpoints import checkpoint
from tests.test_trainer import CPU, recipe_of, run

Command = Callable[..., tuple[int, str, str]]
SHORT = recipe_of("hiera_nano_32", schedule__epochs=1)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder, by path."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# What a run removes ---------------------------------------------------------------------------


def test_a_finished_model_is_not_deleted(tmp_path: Path) -> None:
    """Its checkpoints are gone, so there is nothing to resume from."""
    folder = tmp_path / "run"
    run(SHORT, folder)
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    other = recipe_of("hiera_nano_32", schedule__epochs=2, seed=7)
    for recipe in (SHORT, other):
        with pytest.raises(UsageError, match="holds a trained model"):
            run(recipe, folder, resume="auto")
    (folder / "recipe.yaml").unlink()  # without it, these are files of somebody else
    before.pop("recipe.yaml")
    with pytest.raises(UsageError, match="not empty"):
        run(other, folder, resume="auto")
    assert contents(folder) == before
    run(other, folder, resume="auto", overwrite=True)
    assert contents(folder)["model.safetensors"] != before["model.safetensors"]


def test_a_run_that_has_saved_nothing_restarts(tmp_path: Path) -> None:
    """As if it was killed before the first checkpoint. With another recipe, it is refused."""
    folder = tmp_path / "run"
    run(SHORT, folder)
    expected = contents(folder)["model.safetensors"]
    shutil.rmtree(folder / "checkpoints")
    for name in ("model.safetensors", "config.json", "hiera.json", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    first, *_ = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text(f"{first}\n")
    with pytest.raises(UsageError, match="begun with seed = 0, not 7"):
        run(recipe_of("hiera_nano_32", schedule__epochs=1, seed=7), folder, resume="auto")
    (folder / "recipe.yaml").write_text("half a rec")
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        run(SHORT, folder, resume="auto")
    (folder / "recipe.yaml").write_text(SHORT.to_yaml())
    run(SHORT, folder, resume="auto")
    assert contents(folder)["model.safetensors"] == expected


@pytest.mark.parametrize("left", ["tensors", "log", "log of another program"])
def test_a_run_that_has_lost_its_checkpoint_is_kept(tmp_path: Path, left: str) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of("hiera_nano_32", schedule__epochs=3)
    run(recipe, folder)
    for name in ("model.safetensors", "config.json", "hiera.json", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    if left == "tensors":
        for path in (folder / "checkpoints").glob("*/meta.json"):
            path.unlink()
        (folder / "log.jsonl").unlink()
    else:
        shutil.rmtree(folder / "checkpoints")
    if left == "log of another program":
        lines = ('{"event": "start", "step": 0}', '{"event": "step", "step": 90000}')
        (folder / "log.jsonl").write_text("\n".join(lines))
    before = contents(folder)
    with pytest.raises(UsageError, match=str(folder)):
        run(recipe, folder, resume="auto")
    assert contents(folder) == before


def test_a_run_that_was_killed_in_its_first_save_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log holds the step of the checkpoint already."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for save_every in (0.01, 1.0):
        recipe = recipe_of("hiera_nano_32", schedule__epochs=1, log_every=1, save_every=save_every)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint.CheckpointManager, "save", fail)
            run(recipe, tmp_path / f"{save_every}")
        assert run(recipe, tmp_path / f"{save_every}", resume="auto")["step"] == 4


@pytest.mark.parametrize("name", ["checkpoints", "pictures", "tensorboard"])
def test_a_folder_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine/checkpoints/step_00000004"
    folder.mkdir()
    mine.mkdir(parents=True)
    (mine / "meta.json").write_text("precious")
    (folder / "recipe.yaml").write_text(SHORT.to_yaml())
    (folder / name).symlink_to(tmp_path / "mine/checkpoints")
    before = contents(tmp_path / "mine")
    for options in ({"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(UsageError, match=f"{name} is a link"):
            run(SHORT, folder, **options)
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize("name", ["config.json", "hiera.json", "curves.png", "log.jsonl"])
def test_files_beside_a_recipe_of_somebody_else_are_kept(tmp_path: Path, name: str) -> None:
    """With `-o .`, the folder may hold a recipe and files that only look like those of a run."""
    (tmp_path / "recipe.yaml").write_text(SHORT.to_yaml())
    (tmp_path / name).write_text('{"event": "mine", "step": 1}')
    before = contents(tmp_path)
    with pytest.raises(UsageError):
        run(SHORT, tmp_path, resume="auto")
    assert contents(tmp_path) == before


def test_what_a_killed_start_leaves_behind_does_not_count(tmp_path: Path) -> None:
    for name in (".lock", ".hiera-x1y2"):
        (tmp_path / name).touch()
    assert run(SHORT, tmp_path)["step"] == 4


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, resume: str | None) -> None:
    for name in ("notes.txt", "model.safetensors", "checkpoints/best.pth", "photos/a.jpg"):
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("precious")
        with pytest.raises(UsageError, match="not empty"):
            run(SHORT, folder, resume=resume)
        assert contents(folder) == {name: b"precious"}


def test_overwrite_removes_only_what_runs_write(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", recipe_of("mae_hiera_nano_32", schedule__epochs=1)
    run(recipe, folder, tensorboard=True)
    kept = {
        name: name.encode()
        for name in (
            "notes.txt",
            "pictures/family.png",
            "pictures/epoch-2/a.png",
            "checkpoints/best.pth",
            "checkpoints/step_1/x",
            "tensorboard/mine.txt",
            "data/a.png",
        )
    }
    for name, content in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    first = set(contents(folder)) - set(kept)
    assert any(name.startswith("tensorboard/events") for name in first)
    run(SHORT, folder, overwrite=True)
    after = contents(folder)
    assert {name: after[name] for name in kept} == kept
    written = set(after) - set(kept)
    assert not any(name.startswith(("tensorboard/", "pictures/")) for name in written)
    assert json.loads(after["config.json"])["num_classes"] == 10


def test_a_recipe_that_was_written_by_hand_is_kept(tmp_path: Path, hiera: Command) -> None:
    """With `-o .`, the recipe of the command may be the folder's recipe.yaml."""
    path, text = tmp_path / "recipe.yaml", f"# mine\n{SHORT.to_yaml()}"
    path.write_text(text)
    code, _, err = hiera("train", path, "digits", "-o", tmp_path, "-j", "0", "-q")
    assert code == 2 and "already holds a run" in err
    run(SHORT, tmp_path, overwrite=True)
    assert path.read_text() == text


def test_weights_to_start_from_are_not_deleted(tmp_path: Path) -> None:
    run(SHORT, tmp_path / "run")
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for start in ("run", "run/model.safetensors", "run/../run", "link"):
        with pytest.raises(UsageError, match="in its folder"):
            run(SHORT, tmp_path / "run", init_from=str(tmp_path / start), overwrite=True)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


# Folders of data ------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of two class folders, with a list of its files beside them."""
    source = toy_datasets.Digits()
    for i in range(64):
        path = tmp_path / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source[i].content())
    lines = [f"photos/{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}" for i in range(64)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path / "photos"


@pytest.mark.parametrize("extra", [(), ("--overwrite",), ("--resume", "auto")])
@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("photos", "photos"),
        ("photos", "photos/"),
        ("photos", "photos/a/.."),
        ("photos", "photos/run"),
        ("photos", "photos/a/run"),
        ("photos", "."),
        ("photos", "link"),
        ("photos", "link/run"),
        ("link", "photos/run"),
        ("list.csv", "."),
    ],
)
def test_a_run_does_not_write_into_its_data(
    photos: Path,
    hiera: Command,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    output: str,
    extra: tuple[str, ...],
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("link").symlink_to("photos")
    before = contents(photos.parent)
    code, _, err = hiera("train", "hiera_nano_32", data, "-o", output, "-j", "0", *extra)
    assert code == 2 and "one is in the other" in err and err.count("\n") == 1
    assert contents(photos.parent) == before
    with pytest.raises(UsageError, match="one is in the other"):
        trainer.train(SHORT, data, output, CPU)


def test_a_run_does_not_write_into_held_out_data(photos: Path, hiera: Command) -> None:
    run_in = photos / "run"
    held_out = ("--set", f"data.val={photos}")
    code, _, err = hiera("train", "hiera_nano_32", "digits", "-o", run_in, *held_out)
    assert code == 2 and "one is in the other" in err
    assert not run_in.exists()


def test_a_run_may_be_beside_its_data(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    recipe = recipe_of("hiera_nano_32", schedule__epochs=0.5)
    options = build.RunOptions(workers=0)
    assert trainer.train(recipe, "photos", "runs/a", CPU, options)["step"] == 1
    assert trainer.train(recipe, "list.csv", "runs/b", CPU, options)["step"] == 1
    photos.rename("train")
    Path("data").mkdir()
    Path("train").rename("data/train")
    assert trainer.train(recipe, "data", "data/runs", CPU, options)["step"] == 1


# The lock and the folder ----------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, hiera: Command) -> None:
    folder, recipe = tmp_path / "run", tmp_path / "short.yaml"
    recipe.write_text(SHORT.to_yaml())
    run(SHORT, folder)
    before = contents(folder)
    train = ("train", recipe, "digits", "-o", folder, "-j", "0")
    with exclusive(folder):
        for extra in ((), ("--resume", "auto"), ("--overwrite",)):
            code, _, err = hiera(*train, *extra)
            assert code == 2 and f"process {os.getpid()}" in err.splitlines()[-1]
    assert contents(folder) == before
    run(SHORT, folder, resume="auto")  # the lock is free again


def test_a_run_holds_its_lock_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    original = trainer.Trainer._train_from

    def train_from(self: Any, last: Any) -> None:
        original(self, last)
        with pytest.raises(UsageError) as error, exclusive(tmp_path / "run"):
            pass
        refused.append(error.value.message)

    monkeypatch.setattr(trainer.Trainer, "_train_from", train_from)
    run(SHORT, tmp_path / "run")
    assert len(refused) == 1
    assert not (tmp_path / "run/.lock").exists()


def test_a_folder_that_was_created_in_vain_is_removed(tmp_path: Path) -> None:
    with run_folder.locked(tmp_path / "a/b/c", CPU):
        assert (tmp_path / "a/b/c/.lock").exists()
    assert not (tmp_path / "a").exists()
    with run_folder.locked(tmp_path / "a/b/c", CPU):
        (tmp_path / "a/b/x").touch()
    assert contents(tmp_path / "a") == {"b/x": b""}


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300, "x" * 300 + "/run", "broken"])
def test_names_that_no_folder_can_have_are_refused(
    tmp_path: Path, hiera: Command, name: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nothing")
    code, _, err = hiera("train", "hiera_nano_32", "digits", "-o", tmp_path / name, "-j", "0")
    assert code == 2 and err.count("\n") == 1 and "unexpected" not in err
