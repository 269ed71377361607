"""Models with one input channel get grey values; other numbers of channels are refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.data.transforms import transform_for

from .conftest import SMALL, draw_weights

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def grey_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grey")
    draw_weights(hiera_core.Hiera(**SMALL, in_chans=1)).save_pretrained(folder)
    return folder


def test_colours_become_grey_as_in_pillow(grey_folder: Path, pictures: Path) -> None:
    transform = transform_for(hiera_core.create_model(str(grey_folder)))
    pixels = transform.crop(Image.open(pictures / "chelsea.png"))
    grey = np.array(Image.fromarray(pixels).convert("L"), np.float32)
    x = transform.normalise(torch.from_numpy(pixels)[None])
    assert x.shape == (1, 1, 64, 64)
    shown = transform.denormalise(x)
    assert shown.shape == (1, 3, 64, 64)
    assert (shown[0, 0] * 255 - torch.from_numpy(grey)).abs().max() <= 1


def test_every_command_takes_a_grey_model(
    grey_folder: Path, pictures: Path, tmp_path: Path, hiera: Command
) -> None:
    photo = pictures / "chelsea.png"
    code, out, err = hiera("predict", photo, "-m", grey_folder, "-f", "jsonl")
    assert code == 0 and len(json.loads(out)["topk"]) == 5, err
    code, out, err = hiera("features", photo, "-m", grey_folder, "-f", "jsonl")
    assert code == 0, err
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.open(photo).resize((40, 40)).save(tmp_path / "data" / name / f"{i}.png")
    settings = {
        "model.config.in_chans": 1,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "batch_size": 4,
        "augment.randaugment": 9,
        "augment.erasing": 0.25,
    }
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    code, _, err = hiera(
        "train", "hiera_nano_32", tmp_path / "data", "-o", tmp_path / "run", "-j", 0, *options
    )
    assert code == 0, err
    code, out, err = hiera("eval", tmp_path / "data", "-m", tmp_path / "run", "-f", "json")
    assert code == 0 and json.loads(out)["samples"] == 6, err
    code, _, err = hiera(
        "train", "mae_hiera_nano_32", tmp_path / "data", "-o", tmp_path / "mae", "-j", 0, *options
    )
    assert code == 0, err
    code, _, err = hiera("mae", photo, "-m", tmp_path / "mae", "-o", tmp_path / "pictures")
    assert code == 0, err
    with Image.open(next((tmp_path / "pictures").rglob("*.png"))) as written:
        assert written.mode == "RGB"


def test_other_numbers_of_channels_are_refused_before_any_work(
    tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    draw_weights(hiera_core.Hiera(**SMALL, in_chans=4)).save_pretrained(tmp_path / "four")
    for command in ("predict", "features"):
        code, _, err = hiera(command, pictures / "chelsea.png", "-m", tmp_path / "four")
        assert code == 2 and "takes 4 channels, and images have 3" in err
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / name / "0.png")
    run = ("train", "hiera_nano_32", tmp_path / "data", "-o", tmp_path / "run", "-j", 0)
    code, _, err = hiera(*run, "--set", "model.config.in_chans=4", "--set", "batch_size=2")
    assert code == 2 and "takes 4 channels" in err
    assert not (tmp_path / "run").exists()
