"""Tests of the folder of a run: what a run may remove, whose folder it may use, and its lock."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.atomic.lock import exclusive
from hiera_core.data import toy_datasets
from hiera_core.errors import CheckpointError, UsageError
from hiera_core.training import build, run_folder, trainer
from hiera_core.training.checkpoints import checkpoint, run_recipe
from hiera_core.training.recipe_reader import read_recipe
from tests.test_trainer import CPU, recipe_of, run

pytestmark = pytest.mark.usefixtures("quick_curves")

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
    with pytest.raises(UsageError, match="seed: 0 in the run, 7 on the command line"):
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
        recipe = replace(SHORT, init_from=str(tmp_path / start))
        with pytest.raises(UsageError, match="in its folder"):
            run(recipe, tmp_path / "run", overwrite=True)
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


# The recipe of a run ------------------------------------------------------------------------------

TINY = {"model.config": {"embed_dim": 8, "stages": [1, 1, 1]}, "schedule.epochs": 1}
TINY |= {"schedule.warmup_epochs": 0, "batch_size": 32, "log_every": 1, "save_every": 0.5}


def train(recipe: str | Path | None, data: Any, folder: Path, **options: Any) -> dict[str, Any]:
    settings = options.pop("settings", None)
    choices = build.RunOptions(**{"workers": 0, **options})
    result = trainer.train(recipe, data, folder, CPU, choices, settings=settings)
    return dict(result)


def test_a_recipe_records_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and the weights to start from are in it, so it is enough to repeat the run, also in
    another folder."""
    here = photos.parent
    monkeypatch.chdir(here)
    tiny = hiera_core.hiera_nano_32(**TINY["model.config"], num_classes=2)
    tiny.save_pretrained("start")
    train("hiera_nano_32", "photos", Path("runs/a"), settings=TINY, init_from="start")
    recipe = read_recipe(here / "runs/a/recipe.yaml")
    assert recipe.data.path == str(here / "photos") and recipe.init_from == str(here / "start")
    monkeypatch.chdir("/")
    train(here / "runs/a/recipe.yaml", None, here / "runs/b")
    first, second = (contents(here / f"runs/{name}")["model.safetensors"] for name in "ab")
    assert first == second
    assert (here / "runs/a/recipe.yaml").read_text() == (here / "runs/b/recipe.yaml").read_text()
    first, second = ((here / f"runs/{n}/log.jsonl").read_text() for n in "ab")
    start = json.loads(first.splitlines()[0])
    assert start["weights"] == "from start" and start["classes"] == 2


def test_paths_in_a_recipe_are_absolute_and_names_stay(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also names for which there is a folder: `./digits` is the folder."""
    here, folder = photos.parent, photos.parent / "run"
    monkeypatch.chdir(here)
    for name in ("digits", "hiera_nano_32"):
        (here / name).mkdir()
    for data, init_from, expected in (
        ("digits", "hiera_nano_32", ("digits", "hiera_nano_32")),
        ("./digits", "./hiera_nano_32", (str(here / "digits"), str(here / "hiera_nano_32"))),
        (Path("digits"), "hub/name", (str(here / "digits"), "hub/name")),
        ("photos?label=breed", "hub/name", (f"{photos}?label=breed", "hub/name")),
    ):
        options = build.RunOptions(init_from=init_from)
        found = run_recipe.complete_recipe("hiera_nano_32", data, folder, options)
        assert (found.data.path, found.init_from) == expected
    given = {"data.path": "photos", "data.val": "photos", "init_from": "./hiera_nano_32"}
    found = run_recipe.complete_recipe("hiera_nano_32", None, folder, build.RunOptions(), given)
    assert (found.data.path, found.data.val) == (str(photos), str(photos))
    assert found.init_from == str(here / "hiera_nano_32")


def test_a_run_is_not_in_a_folder_whose_columns_are_named(photos: Path) -> None:
    recipe = read_recipe("hiera_nano_32", {})
    for data, folder in (("?label=breed", photos), ("?label=breed", photos / "run")):
        with pytest.raises(UsageError, match="are the same, or one is in the other"):
            trainer.open_data(recipe, f"{photos}{data}", folder)


@pytest.mark.parametrize("recipe", ["hiera_nano_32", None, "file", "own"])
def test_resuming_needs_no_settings_again(photos: Path, recipe: str | None) -> None:
    """Whatever names the recipe. What is not given is that of the run."""
    folder = photos.parent / "run"
    own = photos.parent / "mine.yaml"
    own.write_text("extends: hiera_nano_32\nbatch_size: 32\n")
    start = own if recipe == "file" else "hiera_nano_32"
    train(start, photos, folder, settings=TINY)
    expected = contents(folder)["model.safetensors"]
    shutil.rmtree(folder / "checkpoints/step_00000002")
    again = {"file": own, "own": folder / "recipe.yaml"}.get(str(recipe), recipe)
    result = train(again, None, folder, resume="auto", settings={"log_every": 2})
    assert result["step"] == 2 and contents(folder)["model.safetensors"] == expected


def test_differences_from_the_run_are_listed(
    photos: Path, hiera: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos.parent / "run"
    train("hiera_nano_32", photos, folder, settings=TINY)
    before = contents(folder)
    capsys.readouterr()  # of that run
    code, _, err = hiera(
        "train", "hiera_nano_32", photos, "-o", folder, "--resume", "auto", "--set", "seed=7",
        "--set", "augment.scale=[0.5, 1]", "--set", "model.config.embed_dim=16",
        "--set", "batch_size=3.2e1", "--set", "save_every=3", "--init-from", "hiera_nano_32",
    )  # fmt: skip
    first, *lines = err.splitlines()
    assert code == 2 and f"hiera train --resume {folder}" in first
    assert sorted(lines) == [
        "hiera: augment.scale: [0.7, 1.0] in the run, [0.5, 1] on the command line",
        "hiera: init_from: none in the run, hiera_nano_32 on the command line",
        "hiera: model.config.embed_dim: 8 in the run, 16 on the command line",
        "hiera: seed: 0 in the run, 7 on the command line",
    ]
    assert "{" not in err
    code, _, err = hiera("train", "mae_hiera_nano_32", "--resume", folder)
    assert code == 2 and "task: classify in the run, mae on the command line" in err
    code, _, err = hiera("train", folder)
    assert code == 2 and f"hiera train --resume {folder}" in err
    assert contents(folder) == before
    assert hiera("train", "--resume", folder, "-q")[0] == 0  # the command of the message works


def test_a_run_of_an_earlier_version_resumes(photos: Path) -> None:
    """Its recipe has neither the data nor the weights to start from."""
    folder = photos.parent / "run"
    train("hiera_nano_32", photos, folder, settings=TINY)
    for meta in folder.glob("checkpoints/*/meta.json"):
        values = json.loads(meta.read_text())
        del values["recipe"]["data"]["path"], values["recipe"]["init_from"]
        meta.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="no data"):
        train("hiera_nano_32", None, folder, resume="auto")
    result = train("hiera_nano_32", photos, folder, resume="auto", init_from="hiera_nano_32")
    assert result["step"] == 2


@pytest.mark.parametrize("recipe", [{"seed": 1}, {"task": "classify", "model": 3}])
def test_a_checkpoint_with_an_odd_recipe_is_refused(photos: Path, recipe: Any) -> None:
    folder = photos.parent / "run"
    train("hiera_nano_32", photos, folder, settings=TINY)
    for meta in folder.glob("checkpoints/*/meta.json"):
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "recipe": recipe}))
    with pytest.raises(CheckpointError, match="its recipe is not usable"):
        train(None, photos, folder, resume="auto")
