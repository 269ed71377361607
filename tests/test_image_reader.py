"""Tests of images: the reference's preprocessing, modes and formats, damaged files."""

from __future__ import annotations

import io
import os
import resource
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from hiera_core import zoo
from hiera_core.data import image_reader
from hiera_core.data.image_reader import open_image
from hiera_core.data.transforms import ImageTransform
from hiera_core.errors import InputError

from .conftest import PICTURES

TRANSFORM = ImageTransform.from_preprocessing(None, (224, 224))
GRADIENT = np.tile(np.linspace(0, 1, 64), (48, 1))  # dark left, bright right, 64 wide


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return an image as a file in a format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.astronaut()).resize(size)


@pytest.mark.parametrize("name", PICTURES)
def test_preprocessing_matches_the_reference(pictures: Path, name: str) -> None:
    """The reference's evaluation uses the transforms of torchvision."""
    from torchvision import transforms

    recipe = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = recipe(Image.open(pictures / f"{name}.png").convert("RGB"))
    image, notes = open_image(pictures / f"{name}.png")
    x = TRANSFORM.normalise(torch.from_numpy(TRANSFORM.crop(image)[None]))[0]
    assert notes == [] and x.shape == (3, 224, 224)
    assert (x - expected).abs().max() < 1e-6


def test_only_the_crop_of_a_long_picture_is_resampled() -> None:
    """The pixels are those of resizing the whole picture, up to rounding."""
    from torchvision.transforms import functional

    long = photo((400, 60)).resize((2000, 300))
    whole = functional.center_crop(functional.resize(long, 256, 3), 224)  # 3 = bicubic
    difference = np.abs(TRANSFORM.crop(long).astype(int) - np.asarray(whole))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_resize_scales_with_the_input_size() -> None:
    card = zoo.get("hiera_base_224").preprocessing
    assert ImageTransform.from_preprocessing(card, (448, 448)).resize == 512
    wide = ImageTransform.from_preprocessing(card, (224, 448))
    assert wide.crop(photo((640, 480))).shape == (224, 448, 3)
    assert wide.crop(photo((100, 900))).shape == (224, 448, 3)


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (3, 4000), (223, 225)])
def test_extreme_shapes_need_little_memory(size: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = TRANSFORM.crop(Image.new("RGB", size, (200, 100, 50)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert pixels.shape == (224, 224, 3)
    assert (pixels == [200, 100, 50]).all()
    assert grown < 100_000, "peak memory grew by 100 MB or more"


@pytest.mark.parametrize("scale", ["uint8", "uint16", "int32", "float"])
def test_pictures_of_more_than_8_bits_keep_their_greys(scale: str) -> None:
    """Pillow's own conversion turns a 16-bit gradient white."""
    factor = {"uint8": 255, "uint16": 65535, "int32": 2**31 - 1, "float": 1.0}[scale]
    dtype = {"float": "float32"}.get(scale, scale)
    data = encoded(Image.fromarray((GRADIENT * factor).astype(dtype)), "TIFF")
    image, notes = open_image(data)
    grey = np.asarray(image)[..., 0] / 255
    assert np.abs(grey - GRADIENT).max() < 0.01
    assert bool(notes) == (scale != "uint8")


def test_16_bit_png_files_keep_their_greys() -> None:
    data = encoded(Image.fromarray((GRADIENT * 65535).astype("uint16")), "PNG")
    assert np.abs(np.asarray(open_image(data)[0])[..., 1] / 255 - GRADIENT).max() < 0.01


MODES = {"1": "PNG", "L": "PNG", "P": "PNG", "CMYK": "TIFF", "YCbCr": "JPEG"}


@pytest.mark.parametrize(("mode", "format"), MODES.items())
def test_colour_modes_are_converted_to_rgb(mode: str, format: str) -> None:
    image, _ = open_image(encoded(photo().convert(mode), format))
    assert image.mode == "RGB" and image.size == (64, 48)
    if mode not in ("1", "L"):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(photo())).mean() < 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 20, 40))
    image, notes = open_image(encoded(picture.convert(mode), "PNG"))
    assert image.getpixel((30, 20)) == (255, 255, 255)
    assert image.getpixel((10, 20)) == (0, 0, 0)
    assert notes == ["transparency composited on white"]


@pytest.mark.skipif(
    all("La" not in modes for modes in TiffImagePlugin.OPEN_INFO.values()),
    reason="this version of Pillow does not read premultiplied grey",
)
def test_premultiplied_grey_is_read() -> None:
    """Pillow converts this mode to no other than LA."""
    straight = encoded(Image.new("LA", (8, 8), (100, 128)), "TIFF")
    extra = struct.pack("<HHIH", 338, 3, 1, 2)  # the tag ExtraSamples; 1 means premultiplied
    assert extra in straight
    image, notes = open_image(straight.replace(extra, extra[:-2] + b"\1\0"))
    grey = image.getpixel((4, 4))
    assert isinstance(grey, tuple) and abs(grey[0] - 227) <= 1, "100 and half of white"
    assert notes == ["transparency composited on white"]


def test_exif_orientation_is_applied() -> None:
    upright = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise for display
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    image, notes = open_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert image.size == upright.size and notes == []
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 6
    broken = encoded(stored, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_image(broken)[0].size == stored.size


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (30, 30), c) for c in ("red", "green", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image, notes = open_image(data)
    assert image.getpixel((5, 5)) == (255, 0, 0)
    assert notes == ["first of 3 frames"]


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(photo(), "PNG"))
    assert open_image(path)[0].size == (64, 48)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(InputError, match="not a picture"):
        open_image(path)  # a PostScript file is a program


def test_decompression_bombs_are_refused_by_their_header() -> None:
    bomb = encoded(Image.new("1", (15000, 15000)), "PNG")
    with pytest.raises(InputError, match="15000x15000 pixels are more"):
        open_image(bomb)
    image, _ = open_image(encoded(Image.new("1", (11000, 11000)), "PNG"))
    assert image.size == (11000, 11000), "below the limit, without Pillow's warning"
    with pytest.raises(InputError, match="max-pixels"):
        open_image(encoded(photo(), "PNG"), max_pixels=100)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncation_is_never_silent(format: str) -> None:
    """A truncated file gives an error or the whole picture, never a picture that is partly grey."""
    options = {"lossless": True} if format == "WEBP" else {}
    whole = encoded(photo(), format, **options)
    expected = np.asarray(open_image(whole)[0])
    errors = 0
    for size in np.linspace(0, len(whole) - 1, 64).astype(int):
        try:
            image, _ = open_image(whole[:size])
        except InputError as error:
            errors += 1
            assert error.message and error.hint
        else:
            assert np.array_equal(np.asarray(image), expected), f"cut to {size}"
    assert errors > 50


def test_flipped_bytes_give_a_picture_or_an_input_error() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(photo(), format), np.uint8)
        for flips in (1, 3, 30, 300):
            data = whole.copy()
            data[rng.integers(0, len(data), flips)] ^= rng.integers(1, 255, flips, np.uint8)
            try:
                assert open_image(data.tobytes())[0].mode == "RGB"
            except InputError as error:
                assert error.message


def test_missing_and_unreadable_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="directory"):
        open_image(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match="empty file"):
        open_image(tmp_path / "empty.jpg")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(photo(), "JPEG"))
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root may read anything
        with pytest.raises(InputError, match="permission denied"):
            open_image(secret)


@pytest.mark.parametrize(("limit", "at_once"), [(1000, 1), (10_000, 2)], ids=["large", "small"])
def test_large_images_are_decoded_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, limit: int, at_once: int
) -> None:
    """A thread in the decoder waits for a second one, which comes only if images are small."""
    monkeypatch.setattr(image_reader, "LARGE_PIXELS", limit)
    content, met = encoded(photo(), "PNG"), threading.Barrier(at_once)
    decode = PngImagePlugin.PngImageFile.load
    running: list[int] = []

    def load(image: PngImagePlugin.PngImageFile) -> Any:
        if "astronaut" not in image.info:  # Pillow loads an image more than once
            image.info["astronaut"] = True
            running.append(1)
            met.wait(10)
            time.sleep(0.01)
            assert len(running) <= at_once
            running.pop()
        return decode(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with ThreadPoolExecutor(2) as pool:
        assert [image.size for image, _ in pool.map(open_image, [content] * 4)] == [(64, 48)] * 4


@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_jpeg_decodes_less_and_changes_pixels_a_little(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo((2000, 1500)), "JPEG", quality=90, exif=exif)
    transform = ImageTransform.from_preprocessing(None, (224, 160))
    whole, _ = open_image(data)
    fast, notes = open_image(data, enough_pixels=transform.enough_pixels)
    assert max(fast.size) == 1000 and max(whole.size) == 2000
    assert (fast.width < fast.height) is (orientation == 6)
    difference = np.abs(transform.crop(whole).astype(int) - transform.crop(fast))
    assert 0 < difference.mean() < 1 and difference.max() < 10
    assert notes == open_image(data)[1]


@pytest.mark.parametrize(
    ("size", "format"), [((640, 480), "JPEG"), ((4000, 300), "JPEG"), ((2000, 1500), "PNG")]
)
def test_fast_jpeg_leaves_other_pictures_as_they_are(size: tuple[int, int], format: str) -> None:
    """Among them are JPEG files that are small already, or long."""
    data = encoded(photo(size), format)
    whole = np.asarray(open_image(data)[0])
    fast = open_image(data, enough_pixels=TRANSFORM.enough_pixels)[0]
    assert np.array_equal(whole, np.asarray(fast))


def test_fast_jpeg_reads_grey_and_cmyk_and_refuses_damaged_files() -> None:
    for mode in ("L", "CMYK"):
        data = encoded(photo((2000, 1500)).convert(mode), "JPEG")
        fast = open_image(data, enough_pixels=TRANSFORM.enough_pixels)[0]
        assert (fast.mode, fast.size) == ("RGB", (1000, 750))
    data = encoded(photo((2000, 1500)), "JPEG")
    with pytest.raises(InputError, match="truncated"):
        open_image(data[: len(data) // 2], enough_pixels=TRANSFORM.enough_pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_a_truncated_file_says_so_without_numbers(format: str) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, format)
    with pytest.raises(InputError) as error:
        open_image(file.getvalue()[: len(file.getvalue()) * 2 // 3])
    assert "bytes" not in str(error.value)
    if "truncated" in error.value.message.lower():
        assert error.value.hint == "the file is incomplete; download or copy it again"
    assert format != "JPEG" or "truncated" in error.value.message
