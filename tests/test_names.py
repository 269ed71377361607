"""Tests of what the name of a model means: the same in every command and function."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hiera_core
from hiera_core.errors import CheckpointError, UsageError
from hiera_core.weights import load, names

Command = Callable[..., tuple[int, str, str]]
NANO = "hiera_nano_32"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is named like a model in the zoo, in the current folder.

    Its weights are other ones: the bias of its head is 7.
    """
    monkeypatch.chdir(tmp_path)
    model = hiera_core.create_model(NANO, pretrained=True)
    torch.nn.init.constant_(model.head.projection.bias, 7.0)
    model.save_pretrained(tmp_path / NANO)
    return tmp_path / NANO


def is_folders(model: torch.nn.Module) -> bool:
    return bool((model.get_parameter("head.projection.bias") == 7).all())


def test_the_zoo_comes_first_in_python(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    factory = hiera_core.models.factory
    with caplog.at_level(logging.WARNING, "hiera"):
        for name, expected in [(NANO, False), (f"./{NANO}", True), (str(folder), True)]:
            for build in (
                lambda name: hiera_core.create_model(name, pretrained=True),
                lambda name: hiera_core.create_model(NANO, checkpoint=name),
                lambda name: hiera_core.Hiera.from_pretrained(name),
                lambda name: factory.create_classifier(name),
                lambda name: factory.create_classifier(None, name),
                lambda name: factory.create_encoder(name),
                lambda name: factory.create_encoder(NANO, name),
            ):
                assert is_folders(build(name)) is expected, name
            assert is_folders(hiera_core.Predictor(name).runner("image").model) is expected
    assert f"write ./{NANO}" in caplog.text
    assert is_folders(hiera_core.Hiera.from_pretrained(Path(NANO))), "a Path is a location"
    assert is_folders(hiera_core.create_model(NANO, checkpoint=Path(NANO)))


def test_the_zoo_comes_first_on_the_command_line(folder: Path, hiera: Command) -> None:
    for name, expected in [(NANO, False), (f"./{NANO}", True), (f"{NANO}/", True)]:
        for arguments in (["-m", name], ["--checkpoint", name], ["-m", NANO, "--checkpoint", name]):
            code, _, err = hiera("features", "-f", "json", *arguments)
            assert code == 0, err
        dest = folder.parent / "converted.pth"
        code, _, err = hiera("convert", name, dest, "--to", "pth", "--overwrite")
        assert code == 0, err
        state = load.read_checkpoint(dest).state
        assert bool((state["head.projection.bias"] == 7).all()) is expected, name


def test_training_starts_from_the_zoo(folder: Path) -> None:
    from hiera_core.data import datasets
    from hiera_core.training import build, recipe_reader

    recipe, samples = recipe_reader.read_recipe(NANO, {}), datasets.open_splits("digits").train
    for name, expected in [(NANO, False), (f"./{NANO}", True)]:
        model, card = build._build_model(recipe, samples, name, public_only=False)
        assert is_folders(model) is expected and name in card["source"]


def test_a_folder_with_the_name_of_no_model_needs_no_prefix(folder: Path, hiera: Command) -> None:
    shutil.move(folder, folder.with_name("mine"))
    assert is_folders(hiera_core.create_model("mine"))
    assert is_folders(hiera_core.Hiera.from_pretrained("mine"))
    shutil.move("mine", f"{NANO}.mine")
    assert is_folders(hiera_core.create_model(f"{NANO}.mine")), "it is not a tag of the model"


def test_from_pretrained_takes_names_of_the_zoo() -> None:
    model = hiera_core.Hiera.from_pretrained(NANO)
    tagged = hiera_core.Hiera.from_pretrained(f"{NANO}.mae_digits_ft_digits")
    assert torch.equal(model.pos_embed, tagged.pos_embed)
    autoencoder = hiera_core.MaskedAutoencoderHiera.from_pretrained("mae_hiera_nano_32")
    assert hasattr(autoencoder, "decoder_pos_embed")
    with pytest.raises(UsageError, match="unknown model"):
        hiera_core.Hiera.from_pretrained("hiera_nan_32")


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_names_are_refused(
    empty: str, small_folder: Path, tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with weights, "" would be that folder."""
    monkeypatch.chdir(small_folder)
    for arguments in (
        ["predict", "x.jpg", "-m", empty],
        ["predict", "x.jpg", "--checkpoint", empty],
        ["predict", "x.jpg", "-m", NANO, "--checkpoint", empty],
        ["predict", "x.jpg", "-m", empty, "--random-init"],
        ["mae", "x.jpg", "-m", empty, "-o", tmp_path / "out"],
        ["features", "-m", empty],
        ["eval", "digits", "-m", empty],
        ["train", NANO, "digits", "--init-from", empty, "-o", tmp_path / "run"],
        ["convert", empty, tmp_path / "x.pth", "--to", "pth"],
    ):
        code, _, err = hiera(*arguments)
        assert code == 2 and "is empty" in err and err.count("\n") == 1, (arguments, err)
    for call in (hiera_core.create_model, hiera_core.Hiera.from_pretrained, load.read_checkpoint):
        with pytest.raises(UsageError, match="is empty"):
            call(empty)


@pytest.mark.parametrize("name", ["x" * 5000, "y/" + "x" * 300, "a\0b", "./" + "x" * 300 + ".pth"])
def test_names_that_the_system_does_not_allow(name: str, hiera: Command) -> None:
    assert not names.exists(name)
    for arguments in (["-m", name], ["--checkpoint", name], ["-m", NANO, "--checkpoint", name]):
        code, _, err = hiera("predict", "x.jpg", *arguments, "-q")
        assert code in (2, 3, 4) and err.count("\n") == 1 and "unexpected" not in err, err


def test_a_missing_location_is_named() -> None:
    with pytest.raises(CheckpointError, match="no file, folder or hub repository"):
        load.read_weights("./none")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_models_shows_what_is_cached(
    name: str, tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--facebook--hiera_tiny_224.mae_in1k" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)

    def cached() -> list[str]:
        _, out, _ = hiera("models", "hiera_tiny_224", "-f", "json")
        found: list[str] = json.loads(out)[0]["cached"]
        return found

    (snapshot / name).symlink_to("gone")
    assert "mae_in1k" not in cached()
    (snapshot / name).unlink()
    (snapshot / name).write_bytes(b"")
    assert "mae_in1k" in cached()
