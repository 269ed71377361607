"""Tests of size limits: every format is refused by its header, and each call has its own limit."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import hiera_core
from hiera_core.data.image_reader import MAX_PIXELS, open_image
from hiera_core.errors import InputError

# It prints by how many kB the peak memory of a process grows. getrusage would not do: the peak that
# it reports includes that of the process which started this one.
PEAK = """
import re, sys
from hiera_core.data.image_reader import open_image
from hiera_core.errors import InputError

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

open_image(sys.argv[1])  # import what Pillow imports late
before = peak()
try:
    open_image(sys.argv[2])
except InputError as error:
    print(peak() - before, error.message)
"""


def gif_with_a_large_area() -> bytes:
    """The second frame would be drawn over a cleared area that is larger than memory."""
    control = b"\x21\xf9\x04\x08\0\0\0\0"  # disposal: clear the area of the frame
    frame = b"," + struct.pack("<4HB", 0, 0, 65535, 65535, 0)
    return (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + control + frame + b"\2\2L\1\0;"
    )


def gif_with_a_frame_beyond_its_canvas() -> bytes:
    return gif_with_a_large_area().replace(b"\xff\xff\xff\xff", b"\x08\0\x08\0", 1)


def icon_around(content: bytes) -> bytes:
    """An icon whose directory declares 16x16 pixels, whatever the content is."""
    entry = struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<3H", 0, 1, 1) + entry + content


def png(width: int, height: int) -> bytes:
    """A PNG of black pixels, compressed well."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def png_with_two_headers() -> bytes:
    """The second header, which counts, declares a larger image than the first."""
    small, large = png(8, 8), png(20000, 20000)
    return large[:8] + small[8:33] + large[8:]


def bitmap() -> bytes:
    """The bitmap of an icon: the header declares twice the height."""
    return struct.pack("<I2i2H6I", 40, 20000, 40000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(64)


def webp() -> bytes:
    """A large canvas that one small frame does not fill."""
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        small, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    data = bytearray(small.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (16000 - 1).to_bytes(3, "little") * 2
    return bytes(data)


def tiff_with_a_large_tile() -> bytes:
    """An image of 16x16 pixels in one tile of 40,000x40,000."""
    pixels = zlib.compress(bytes(40_000), 9)
    tags = [
        (256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, 40_000), (323, 4, 1, 40_000),
        (324, 4, 1, 8 + 2 + 10 * 12 + 4), (325, 4, 1, len(pixels)),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack("<HHI", tag, kind, count) + struct.pack("<H2x" if kind == 3 else "<I", value)
        for tag, kind, count, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


HOSTILE: dict[str, Callable[[], bytes]] = {
    "gif area": gif_with_a_large_area,
    "gif frame": gif_with_a_frame_beyond_its_canvas,
    "icon of png": lambda: icon_around(png(20000, 20000)),
    "icon of bmp": lambda: icon_around(bitmap()),
    "icon of png with two headers": lambda: icon_around(png_with_two_headers()),
    "png": lambda: png(20000, 20000),
    "png with two headers": png_with_two_headers,
    "webp": webp,
    "tiff tile": tiff_with_a_large_tile,
    "bmp": lambda: b"BM" + struct.pack("<3I", 999, 0, 54) + bitmap(),
    "ppm": lambda: b"P5 60000 60000 255\n" + bytes(99),
    "qoi": lambda: b"qoif" + struct.pack(">2I2B", 60000, 60000, 3, 0) + b"\xfd" * 99,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_small_files_need_little_memory(tmp_path: Path, name: str) -> None:
    """They are refused before they are decoded, whatever their parts declare."""
    content = HOSTILE[name]()
    assert len(content) < 200_000
    (tmp_path / "valid.png").write_bytes(png(8, 8))
    (tmp_path / "hostile").write_bytes(content)
    command = [sys.executable, "-c", PEAK, tmp_path / "valid.png", tmp_path / "hostile"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    kilobytes, _, message = found.partition(" ")
    assert int(kilobytes) < 100_000, found
    assert "pixels are more than" in message or "more pixels than" in message


ALL_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM ICO QOI AVIF".split()


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_each_call_has_its_own_limit(format: str) -> None:
    """Calls in two threads at once do not see each other's, and Pillow's own limit is not used."""
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, format)
    outcomes: dict[int, list[str]] = {100: [], MAX_PIXELS: []}

    def read(max_pixels: int) -> None:
        for _ in range(20):
            try:
                open_image(file.getvalue(), max_pixels)
                outcomes[max_pixels].append("ok")
            except InputError as error:
                outcomes[max_pixels].append(error.message)

    threads = [threading.Thread(target=read, args=[limit]) for limit in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    width, height = (48, 36) if format == "ICO" else (64, 48)
    assert outcomes[MAX_PIXELS] == ["ok"] * 20
    assert outcomes[100] == [f"{width}x{height} pixels are more than 100"] * 20


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "WEBP", "JPEG"])
def test_a_larger_limit_than_that_of_pillow_is_possible(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's warning and its error do not apply, and its limit stays as it is."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(
        file, format, **({"compression": "tiff_lzw"} if format == "TIFF" else {})
    )
    if format == "WEBP":  # Pillow applies its own limit, which is an error here
        with pytest.raises(InputError, match="convert it to PNG"):
            open_image(file.getvalue())
    else:
        assert open_image(file.getvalue())[0].size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_limit_of_pillow_stays_on(small_folder: Path, tmp_path: Path) -> None:
    """Also while a generator of records is suspended."""
    (tmp_path / "x.png").write_bytes(png(8, 8))
    limit = Image.MAX_IMAGE_PIXELS
    predictor = hiera_core.Predictor(str(small_folder))
    records = predictor(hiera_core.data.sources.expand([str(tmp_path / "x.png")] * 2))
    assert next(iter(records)).status == "ok"
    assert Image.MAX_IMAGE_PIXELS == limit is not None


def test_many_pages_are_not_all_counted() -> None:
    """The time to find a page grows with the number of pages before it."""
    page = struct.pack("<H", 6) + b"".join(
        struct.pack("<HHIH2x", tag, 3, 1, value)
        for tag, value in [(256, 1), (257, 1), (258, 8), (262, 1), (273, 8), (279, 1)]
    )
    pages = 20_000
    size = len(page) + 4
    links = [16 + (i + 1) * size for i in range(pages - 1)] + [0]
    data = b"II*\0" + struct.pack("<I", 16) + bytes(8)
    data += b"".join(page + struct.pack("<I", link) for link in links)
    image, notes = open_image(data)
    assert image.size == (1, 1) and notes == ["first of more than 1000 frames"]


def test_valid_icons_give_the_pixels_of_pillow() -> None:
    for options in ({}, {"bitmap_format": "bmp"}):
        file = io.BytesIO()
        picture = Image.effect_mandelbrot((48, 48), (-2, -1, 1, 1), 50).convert("RGB")
        picture.save(file, "ICO", **options)
        image, _ = open_image(file.getvalue())
        assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_jpeg_2000_is_refused() -> None:
    """A file of 145 bytes can make its decoder take 2 GB for 8000x8000 pixels."""
    for options in ({}, {"no_jp2": True}):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG2000", **options)
        with pytest.raises(InputError, match="JPEG 2000 is not supported; convert it to PNG"):
            open_image(file.getvalue())


def test_photos_of_phones_are_read_with_pillow_heif(tmp_path: Path, pictures: Path) -> None:
    """Without it, the error names it, and a folder counts the file among its inputs."""
    import pillow_heif

    with Image.open(pictures / "rocket.png") as picture:
        expected = np.array(picture.convert("RGB"))
    pillow_heif.from_pillow(Image.fromarray(expected)).save(tmp_path / "IMG_0001.HEIC", quality=95)
    image, _ = open_image(tmp_path / "IMG_0001.HEIC")
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.array(image).astype(int) - expected).mean() < 4
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from hiera_cli.app import run\n"
        f"sys.exit(run(['predict', {str(tmp_path)!r}, '-m', 'hiera_nano_32', '-f', 'jsonl']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert "HEIC needs pillow-heif; pip install 'hiera-toolkit[heif]'" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("photos.zip", b"PK\x03\x04\x14\0", "extract it, or make it an uncompressed .tar"),
        ("00000.tar.gz", b"\x1f\x8b\x08\0", "extract it, or make it an uncompressed .tar"),
        ("scan.pdf", b"%PDF-1.7\n", "save its pages as PNG"),
        ("rows.parquet", b"PAR1\x15\x04", "--manifest FILE takes a table of paths"),
        ("logo.svg", b'<?xml version="1.0"?>\n<svg xmlns="', "convert it to PNG"),
        ("photo.jpg", b"<!DOCTYPE html><title>404", "download the file again"),
        ("list.csv", b"a.jpg,cat\n", "put @ before its name"),
        ("list.json", b'["a.jpg"]', "for a list of paths, put @ before its name"),
        ("pixels.npy", b"\x93NUMPY\1\0v\0{'descr'", "in Python, give numpy.load(FILE)"),
        ("IM000001", bytes(128) + b"DICM\2\0\0\0UL", "it is a DICOM file"),
        ("light.exr", b"v/1\1\2\0\0\0", "convert it to TIFF or PNG"),
        ("light.hdr", b"#?RADIANCE\n", "convert it to TIFF or PNG"),
        ("photo.pam", b"P7\nWIDTH 3\n", "convert it to TIFF or PNG"),
        ("photo.jpg", b"damaged, one way or another", "damaged, or not an image"),
    ],
)
def test_what_is_not_an_image_is_told_what_to_do(
    tmp_path: Path, name: str, content: bytes, hint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not a picture in a supported format") as error:
        open_image(tmp_path / name)
    assert hint in error.value.hint
