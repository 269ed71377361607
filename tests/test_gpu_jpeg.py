"""Tests of `--decoder nvjpeg`: torchvision's decoder of the host stands in for that of a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import hiera_core
from hiera_core.data import sources
from hiera_core.data.clip_sampling import Sampling
from hiera_core.data.decoders import gpu_jpeg, image_decoder
from hiera_core.data.decoders.gpu_jpeg import decode_jpeg, upright
from hiera_core.data.decoders.image_decoder import check_decoder
from hiera_core.data.image_reader import open_image
from hiera_core.errors import DeviceError, InputError, UsageError
from hiera_core.inference.predict import Predictor

from .conftest import SMALL, draw_weights

Hiera = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
LIMIT = 10_000_000


def jpeg_of(pictures: Path, mode: str = "RGB", **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.open(pictures / "chelsea.png").convert(mode)
    image.save(content, "JPEG", quality=95, subsampling=0, **options)
    return content.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int, pictures: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = jpeg_of(pictures, exif=exif)
    found = decode_jpeg(content, CPU, LIMIT)
    expected = np.asarray(open_image(content)[0])
    assert found is not None and found.shape == expected.shape
    assert np.abs(found.numpy().astype(int) - expected).mean() < 2


def test_an_orientation_that_does_not_exist_is_ignored() -> None:
    planes = torch.arange(6).view(1, 2, 3)
    assert torch.equal(upright(planes, 0), planes) and torch.equal(upright(planes, 9), planes)


def test_grey_files_have_three_channels(pictures: Path) -> None:
    found = decode_jpeg(jpeg_of(pictures, "L"), CPU, LIMIT)
    assert found is not None and found.shape[-1] == 3


def test_a_very_large_file_is_not_read_whole(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A small picture may be followed by gigabytes."""
    content = jpeg_of(pictures)
    (tmp_path / "a.jpg").write_bytes(content)
    for limit, is_read in ((len(content), True), (len(content) - 1, False)):
        monkeypatch.setattr(gpu_jpeg, "MAX_BYTES", limit)
        assert (decode_jpeg(tmp_path / "a.jpg", CPU, LIMIT) is not None) is is_read


@pytest.mark.parametrize("what", ["png", "cmyk", "truncated", "text", "mpo"])
def test_pillow_decodes_what_the_gpu_does_not(what: str, pictures: Path) -> None:
    whole = jpeg_of(pictures)
    multi = io.BytesIO()
    image = Image.open(pictures / "chelsea.png").convert("RGB")
    image.save(multi, "MPO", save_all=True, append_images=[image])
    content = {
        "png": (pictures / "chelsea.png").read_bytes(),
        "cmyk": jpeg_of(pictures, "CMYK"),
        "truncated": whole[: len(whole) // 2],
        "text": b"no image at all",
        "mpo": multi.getvalue(),
    }[what]
    assert decode_jpeg(content, CPU, LIMIT) is None


def test_size_and_path_are_checked_before_anything_is_decoded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_jpeg, "_decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match="pixels"):
        decode_jpeg(jpeg_of(pictures), CPU, 1000)
    with pytest.raises(InputError, match="no such file"):
        decode_jpeg(tmp_path / "none.jpg", CPU, LIMIT)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match="empty"):
        decode_jpeg(tmp_path / "empty.jpg", CPU, LIMIT)


def test_a_decoder_that_fails_leaves_the_file_to_pillow(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("nvjpegDecode failed")

    monkeypatch.setattr(gpu_jpeg, "_decode", fail)
    assert decode_jpeg(jpeg_of(pictures), CPU, LIMIT) is None


def test_a_folder_is_classified_as_by_pillow(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEG, PNG and a damaged file, decoded on a device that is the host."""
    (tmp_path / "a.jpg").write_bytes(jpeg_of(pictures))
    (tmp_path / "b.png").write_bytes((pictures / "coffee.png").read_bytes())
    (tmp_path / "c.jpg").write_bytes(jpeg_of(pictures)[:5000])
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    expected = list(Predictor(model)(sources.expand([str(tmp_path)])))
    monkeypatch.setattr(image_decoder, "_check_nvjpeg", lambda device: None)
    decoded: list[int] = []
    real = gpu_jpeg._decode
    monkeypatch.setattr(
        gpu_jpeg, "_decode", lambda data, device: decoded.append(len(data)) or real(data, device)
    )
    predictor = Predictor(model, sampling=Sampling(decoder="nvjpeg"))
    found = list(predictor(sources.expand([str(tmp_path)])))
    assert decoded == [len(jpeg_of(pictures))]
    for one, other in zip(found, expected, strict=True):
        assert (one.status, one.notes) == (other.status, other.notes)
        assert [p.id for p in one.topk[:1]] == [p.id for p in other.topk[:1]]


def test_without_cuda_a_message_says_so(
    hiera: Hiera, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = pictures / "chelsea.png"
    for command in (
        ("predict", path, "-m", "hiera_nano_32"),
        ("features", path, "-m", "hiera_nano_32"),
        ("mae", path, "-m", "mae_hiera_nano_32", "-o", tmp_path / "out"),
        ("eval", "digits", "-m", "hiera_nano_32"),
    ):
        code, out, err = hiera(*command, "--decoder", "nvjpeg")
        assert (code, out) == (5, ""), command
        assert "decoder nvjpeg needs CUDA, which is not available here" in err
        assert len(err.splitlines()) <= 2


def test_the_device_of_the_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check_decoder("nvjpeg", torch.device("cuda", 1))
    with pytest.raises(DeviceError, match="the model runs on cpu"):
        check_decoder("nvjpeg", CPU)


def test_decoders_are_checked(hiera: Hiera, pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown decoder 'nvjpg'; did you mean nvjpeg"):
        Sampling(decoder="nvjpg")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choose one"):
        Sampling(decoder="nvjpeg", fast_jpeg=True)
    code, _, err = hiera("predict", pictures / "chelsea.png", "--decoder", "dali")
    assert code == 2 and "dali" in err


@pytest.mark.cuda
def test_a_gpu_decodes_jpeg_files(pictures: Path) -> None:
    content = jpeg_of(pictures)
    found = decode_jpeg(content, torch.device("cuda"), LIMIT)
    assert found is not None and found.is_cuda
    expected = np.asarray(open_image(content)[0])
    assert np.abs(found.cpu().numpy().astype(int) - expected).mean() < 2
