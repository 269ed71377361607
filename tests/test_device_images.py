"""Tests of images and clips that lie on the model's device: nothing of them is copied to the host.

The device is a stand-in: tensors of the host are taken for tensors of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.data import memory
from hiera_core.data.decoders.device_images import crop_on_device
from hiera_core.data.memory import as_pixels, device_pixels
from hiera_core.data.transforms import ImageTransform
from hiera_core.inference.features import FeatureExtractor
from hiera_core.inference.one_call import run_pipeline
from hiera_core.inference.predict import Predictor
from hiera_core.inference.reconstruct import Reconstructor
from hiera_core.inference.transfer import Uploads

from .conftest import SMALL, draw_weights
from .test_transfer import CPU, FakeCuda


class RecordingCuda(FakeCuda):
    """Also notes that a thread waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def finish(self, device: torch.device) -> None:
        self.waits += 1


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every tensor for one that lies on a device, and fail if it comes to the host."""
    monkeypatch.setattr(memory, "lies_on_device", lambda item: isinstance(item, torch.Tensor))

    def refuse(tensor: Any) -> Any:
        pytest.fail("pixels were copied to the host")

    real = memory.as_pixels
    monkeypatch.setattr(
        memory,
        "as_pixels",
        lambda item: refuse(item) if isinstance(item, torch.Tensor) else real(item),
    )


def photo_of(pictures: Path, name: str = "chelsea") -> np.ndarray:
    return np.array(Image.open(pictures / f"{name}.png").convert("RGB"))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (96, 160)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_a_crop_is_that_of_pillow(
    pictures: Path, interpolation: str, size: tuple[int, int], crop_mode: str
) -> None:
    pixels = photo_of(pictures)
    transform = ImageTransform(
        size, max(size), (0.5,) * 3, (0.5,) * 3, interpolation, crop_mode=crop_mode
    )
    found = crop_on_device(transform, torch.from_numpy(pixels))
    assert found is not None and found.dtype is torch.uint8
    expected = transform.crop(Image.fromarray(pixels))
    difference = np.abs(found.numpy().astype(int) - expected)
    assert found.shape == expected.shape and difference.max() <= 3 and difference.mean() < 0.5


def test_an_image_of_the_right_size_is_not_changed(pictures: Path) -> None:
    pixels = photo_of(pictures)[:64, :64]
    transform = ImageTransform((64, 64), 64, (0.5,) * 3, (0.5,) * 3)
    found = crop_on_device(transform, torch.from_numpy(pixels))
    assert found is not None and np.array_equal(found.numpy(), pixels)


def test_a_very_long_image_is_left_to_pillow() -> None:
    transform = ImageTransform((32, 32), 32, (0.5,) * 3, (0.5,) * 3)
    assert crop_on_device(transform, torch.zeros(4, 2000, 3, dtype=torch.uint8)) is None


FORMS = {
    "uint8": lambda x: x,
    "float": lambda x: x / 255,
    "half": lambda x: (x / 255).to(torch.bfloat16),
    "channels first": lambda x: x.movedim(-1, -3),
    "int64": lambda x: x.long(),
    "grey": lambda x: x[..., :1],
    "two dimensions": lambda x: x[..., 0],
    "bool": lambda x: x > 127,
}


@pytest.mark.parametrize("form", FORMS)
def test_pixels_are_those_of_the_host(pictures: Path, form: str) -> None:
    tensor = FORMS[form](torch.from_numpy(photo_of(pictures)))
    found = device_pixels(tensor)
    assert found is not None and np.array_equal(found.numpy(), as_pixels(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, 8, 4, dtype=torch.uint8),  # with alpha
        torch.zeros(8, 8, 2, dtype=torch.uint8),
        torch.full((8, 8, 3), torch.nan),
        torch.full((8, 8, 3), 2.0),
        torch.full((8, 8, 3), -1),
        torch.zeros(8, 0, 3),
    ],
)
def test_what_needs_pillow_or_is_wrong_is_left_to_the_host(tensor: torch.Tensor) -> None:
    assert device_pixels(tensor) is None


@pytest.mark.usefixtures("on_device")
def test_images_are_not_copied_to_the_host_and_back(pictures: Path) -> None:
    """No page-locked memory, no copy, and the classes of the host's images."""
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    photos = [photo_of(pictures, name) for name in ("chelsea", "coffee", "rocket")]
    expected = run_pipeline(Predictor(model), photos)
    predictor = Predictor(model, batch_size=2)
    classifier, cuda = predictor.classifier("image"), RecordingCuda()
    classifier.uploads = Uploads(CPU, cuda)
    found = run_pipeline(predictor, [torch.from_numpy(photo) for photo in photos])
    assert isinstance(found, list) and isinstance(expected, list)
    assert cuda.copies == [] and cuda.waits == 3
    downloaded = 3 * 10 * 4  # probabilities, on their way back
    assert cuda.pinned_bytes == downloaded
    for one, other in zip(found, expected, strict=True):
        assert one.status == "ok"
        assert one.topk[0].id == other.topk[0].id
        assert one.topk[0].prob == pytest.approx(other.topk[0].prob, abs=0.02)


@pytest.mark.usefixtures("on_device")
def test_images_of_both_places_share_a_batch(pictures: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    photo = photo_of(pictures)
    predictor = Predictor(model, batch_size=2)
    predictor.classifier("image").uploads = Uploads(CPU, RecordingCuda())
    mixed: list[Any] = [torch.from_numpy(photo), pictures / "chelsea.png"]
    first, second = run_pipeline(predictor, mixed)  # type: ignore[misc]
    assert first.topk[0].id == second.topk[0].id
    plain = Predictor(model, batch_size=2)  # on a device without streams of its own
    third, fourth = run_pipeline(plain, mixed)  # type: ignore[misc]
    assert third.topk[0].prob == pytest.approx(fourth.topk[0].prob, abs=0.02)


@pytest.mark.usefixtures("on_device")
def test_clips_are_not_copied_to_the_host_and_back() -> None:
    """Frames stay where they are; only the numbers of the frames of a clip travel."""
    config: Any = {**SMALL, "input_size": (4, 64, 64), "patch_kernel": (3, 7, 7)}
    config |= {"patch_stride": (2, 4, 4), "patch_padding": (1, 3, 3), "q_stride": (1, 2, 2)}
    config |= {"mask_unit_size": (1, 8, 8)}
    model = draw_weights(hiera_core.Hiera(**config)).eval()
    generator = np.random.default_rng(0)
    clip = generator.integers(0, 256, (20, 72, 96, 3), dtype=np.uint8)
    expected = run_pipeline(Predictor(model), clip)
    predictor = Predictor(model)
    cuda = RecordingCuda()
    predictor.classifier("video").uploads = Uploads(CPU, cuda)
    found = run_pipeline(predictor, torch.from_numpy(clip))
    assert not isinstance(found, list) and not isinstance(expected, list)
    assert found.status == expected.status == "ok" and found.video == expected.video
    assert [p.id for p in found.topk] == [p.id for p in expected.topk]
    assert found.topk[0].prob == pytest.approx(expected.topk[0].prob, abs=1e-5)
    assert cuda.pinned_bytes < clip[0].nbytes


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("task", ["features", "reconstruct"])
def test_other_tasks_leave_images_where_they_are(pictures: Path, task: str) -> None:
    pipeline: Any
    if task == "features":
        pipeline = FeatureExtractor(draw_weights(hiera_core.Hiera(**SMALL)).eval())
    else:
        model = hiera_core.MaskedAutoencoderHiera(**SMALL, decoder_embed_dim=16, decoder_depth=1)
        pipeline = Reconstructor(draw_weights(model).eval())
    record = run_pipeline(pipeline, torch.from_numpy(photo_of(pictures)))
    assert not isinstance(record, list) and record.status == "ok" and record.result is not None


@pytest.mark.usefixtures("on_device")
def test_thumbnails_are_made_on_the_host(pictures: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    record = run_pipeline(
        Predictor(model, keep_thumbnails=True), torch.from_numpy(photo_of(pictures))
    )
    assert not isinstance(record, list) and len(record.thumbnails) == 1


@pytest.mark.usefixtures("on_device")
def test_the_transform_of_a_model_stays_on_the_device(pictures: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    photo = photo_of(pictures)
    found, expected = model.transform(torch.from_numpy(photo)), model.transform(photo)
    assert found.shape == expected.shape and (found - expected).abs().mean() < 0.02


def test_the_caller_s_stream_is_waited_for() -> None:
    memory.wait_for_tensors([torch.zeros(1), "x.jpg", np.zeros(1)])  # nothing to wait for


@pytest.mark.cuda
def test_a_gpu_keeps_images_and_clips(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval().cuda()
    photo = photo_of(pictures)
    expected = hiera_core.predict(photo, model, dtype="fp32")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.from_numpy(photo).cuda(non_blocking=True)
        monkeypatch.setattr(memory, "as_pixels", lambda item: pytest.fail("copied to the host"))
        found = hiera_core.predict(tensor, model, dtype="fp32")
    assert isinstance(found, dict) and isinstance(expected, dict)
    assert found["topk"][0]["id"] == expected["topk"][0]["id"]
