"""Tests of `model.transform` and `model.class_names`."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.errors import HieraError, InputError, UsageError
from hiera_core.models.hiera import HieraEncoder

from .conftest import assert_close
from .test_animation_reader import write_animation

SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"
PICTURE, CLIP = SAMPLES / "cat.jpg", SAMPLES / "moving_right.mp4"


@pytest.fixture(scope="module")
def image_model() -> HieraEncoder:
    return hiera_core.create_model("hiera_nano_32", pretrained=True).eval()


@pytest.fixture(scope="module")
def video_model() -> HieraEncoder:
    return hiera_core.create_model("hiera_nano_8x32", pretrained=True).eval()


def test_an_image_is_what_predict_sees(image_model: HieraEncoder) -> None:
    with torch.inference_mode():
        (found,) = image_model(image_model.transform(PICTURE))
    record = hiera_core.predict(PICTURE, image_model, topk=10)
    assert isinstance(record, dict) and image_model.class_names is not None
    for entry in record["topk"]:
        assert float(found[entry["id"]]) == pytest.approx(entry["prob"], abs=1e-6)
        assert image_model.class_names[entry["id"]] == entry["label"]


def test_a_clip_is_what_predict_sees(video_model: HieraEncoder) -> None:
    with torch.inference_mode():
        (found,) = video_model(video_model.transform(str(CLIP)))
    one_view = hiera_core.Sampling(clips=1, crops=1)
    record = hiera_core.predict(CLIP, video_model, topk=4, sampling=one_view)
    assert isinstance(record, dict)
    for entry in record["topk"]:
        assert float(found[entry["id"]]) == pytest.approx(entry["prob"], abs=1e-6)


def test_an_animation_is_a_clip_for_models_of_videos(
    image_model: HieraEncoder, video_model: HieraEncoder, tmp_path: Path
) -> None:
    path = write_animation(tmp_path / "x.gif")
    assert image_model.transform(path).shape == (1, 3, 32, 32)
    with torch.inference_mode():
        (found,) = video_model(video_model.transform(path))
    sampling = hiera_core.Sampling(clips=1, crops=1)
    record = hiera_core.predict(path, video_model, sampling=sampling, dtype="fp32", topk=1)
    best = record["topk"][0]
    assert int(found.argmax()) == best["id"] and abs(float(found.max()) - best["prob"]) < 1e-5


def test_every_form_of_an_image_is_the_same(image_model: HieraEncoder) -> None:
    expected = image_model.transform(PICTURE)
    assert expected.shape == (1, 3, 32, 32) and expected.dtype == torch.float32
    pixels = np.array(Image.open(PICTURE).convert("RGB"))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = (Image.open(PICTURE), PICTURE.read_bytes(), pixels, tensor, tensor / 255, tensor[None])
    for form in forms:
        assert torch.equal(image_model.transform(form), expected)
    several = image_model.transform([PICTURE, str(PICTURE), pixels])
    assert torch.equal(several, expected.expand(3, -1, -1, -1))
    batch = image_model.transform(torch.stack([tensor] * 2))
    assert torch.equal(batch, expected.expand(2, -1, -1, -1))


def test_shapes_of_clips(video_model: HieraEncoder) -> None:
    frames = np.zeros((8, 40, 50, 3), np.uint8)
    for form, count in (
        (frames, 1),
        (np.zeros((90, 40, 50, 3), np.uint8), 1),
        (torch.from_numpy(frames).permute(0, 3, 1, 2), 1),  # t c y x
        (torch.from_numpy(frames).permute(3, 0, 1, 2), 1),  # c t y x
        ([frames, CLIP], 2),
        (np.stack([frames] * 3), 3),
    ):
        assert video_model.transform(form).shape == (count, 3, 8, 32, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["hiera_nano_32", "mae_hiera_nano_32"])
def test_other_models(name: str) -> None:
    wide = hiera_core.create_model(name, pretrained=True, input_size=(64, 48))
    assert wide.transform(PICTURE).shape == (1, 3, 64, 48)
    assert wide.to(torch.bfloat16).transform(PICTURE).dtype == torch.bfloat16
    assert hiera_core.create_model(name, in_chans=1).transform(PICTURE).shape == (1, 1, 32, 32)
    backbone = hiera_core.create_model(name, pretrained=True, features_only=True)
    maps = backbone(backbone.transform(PICTURE))
    assert maps[0].shape == (1, 24, 16, 16)


def test_names_of_classes(image_model: HieraEncoder, tmp_path: Path) -> None:
    names = image_model.class_names
    assert names is not None and names[3] == "three" and len(names) == 10
    assert hiera_core.create_model("mae_hiera_nano_32").class_names is None
    assert hiera_core.create_model("hiera_nano_32", num_classes=0).class_names is None
    assert hiera_core.create_model("hiera_nano_32", num_classes=3).class_names is None
    large = hiera_core.create_model("hiera_nano_32", num_classes=1000).class_names
    assert large is not None and large[0].startswith("tench")
    image_model.save_pretrained(tmp_path / "saved")
    for again in (
        hiera_core.Hiera.from_pretrained(tmp_path / "saved"),
        hiera_core.create_model(str(tmp_path / "saved")),
        copy.deepcopy(image_model),
        pickle.loads(pickle.dumps(image_model)),
        torch.compile(image_model, backend="eager"),
    ):
        assert again.class_names == names
        assert torch.equal(again.transform(PICTURE), image_model.transform(PICTURE))


def test_preprocessing_of_a_folder_is_used(image_model: HieraEncoder, tmp_path: Path) -> None:
    """Also that of another library; see test_foreign_config.py for their forms."""
    image_model.save_pretrained(tmp_path)
    card = json.loads((tmp_path / "hiera.json").read_text())
    card["preprocessing"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "hiera.json").write_text(json.dumps(card))
    other = hiera_core.Hiera.from_pretrained(tmp_path)
    white = np.full((32, 32, 3), 255, np.uint8)
    assert_close(other.transform(white), torch.full((1, 3, 32, 32), 2.0))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("none.png", InputError, "none.png: no such file"),
        (["none.png"], InputError, "none.png: no such file"),
        (CLIP, InputError, "takes pictures"),
        (b"not a picture", InputError, "not a picture"),
        (3, UsageError, "of type int"),
        (None, UsageError, "of type NoneType"),
        ([], UsageError, "no inputs"),
        (SAMPLES, UsageError, "is a folder"),
    ],
)
def test_what_is_no_image_is_refused(
    source: Any, error: type[HieraError], message: str, image_model: HieraEncoder
) -> None:
    with pytest.raises(error, match=message):
        image_model.transform(source)


def test_an_image_is_no_clip(video_model: HieraEncoder) -> None:
    with pytest.raises(InputError, match="takes video clips"):
        video_model.transform(PICTURE)
    signal = hiera_core.Hiera(
        input_size=(256,), in_chans=1, q_stride=(2,), mask_unit_size=(8,),
        patch_kernel=(7,), patch_stride=(4,), patch_padding=(3,), stages=(1, 1, 1), q_pool=2,
    )  # fmt: skip
    with pytest.raises(UsageError):
        signal.transform(PICTURE)


def test_a_batch_of_images_has_a_result_for_each(image_model: HieraEncoder) -> None:
    pixels = torch.from_numpy(np.array(Image.open(PICTURE).convert("RGB"))).permute(2, 0, 1)
    batch = torch.stack([pixels, pixels.flip(2)])
    for source in (batch, batch / 255):
        records = hiera_core.predict(source, image_model)
        assert [record["status"] for record in records] == ["ok", "ok"]  # type: ignore[index]
        vectors = hiera_core.features(source, image_model)
        assert isinstance(vectors, list) and not torch.equal(
            vectors[0]["embedding"], vectors[1]["embedding"]
        )


CALLS: dict[str, Callable[[Any], object]] = {
    "topk": lambda value: hiera_core.predict(PICTURE, "hiera_nano_32", topk=value),
    "batch_size": lambda value: hiera_core.features(PICTURE, "hiera_nano_32", batch_size=value),
    "workers": lambda value: hiera_core.predict(PICTURE, "hiera_nano_32", workers=value),
    "sampling": lambda value: hiera_core.predict(PICTURE, "hiera_nano_32", sampling=value),
    "stages": lambda value: hiera_core.features(PICTURE, "hiera_nano_32", stages=value),
    "model": lambda value: hiera_core.predict(PICTURE, value),
    "data": lambda value: hiera_core.evaluate(value, "hiera_nano_32"),
    "name": lambda value: hiera_core.create_model(value),
    "clips": lambda value: hiera_core.Sampling(clips=value),
    "x": lambda value: hiera_core.reconstruct(hiera_core.create_model("mae_hiera_nano_32"), value),
    "input": lambda value: hiera_core.create_model("hiera_nano_32")(value),
    "device": lambda value: hiera_core.predict(PICTURE, "hiera_nano_32", device=value),
    "recipe": lambda value: hiera_core.train(value, "digits", "run"),
    "settings": lambda value: hiera_core.train("hiera_nano_32", "d", "run", settings=value),
    "options": lambda value: hiera_core.train("hiera_nano_32", "d", "run", options=value),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [3.5, ["3"], object()], ids=["number", "list", "object"])
def test_arguments_of_other_types_are_usage_errors(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        CALLS[name](value)
