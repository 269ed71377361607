"""TIFF files of any depth and layout show the values that they hold, or are refused by name."""

from __future__ import annotations

import io
import itertools
import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from hiera_core.data.image_formats import open_header
from hiera_core.data.image_reader import open_image
from hiera_core.errors import InputError

SIZE = (48, 37)
SHOWN = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
SHOWN[0, :2] = [[0] * 4, [255] * 4]  # the whole range


def samples(dtype: str, channels: int) -> np.ndarray:
    """Return samples of a type that show as `SHOWN`."""
    shown = SHOWN[..., :channels].astype(np.float64) / 255
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return shown.astype(dtype)
    limits = np.iinfo(kind)
    return np.rint(shown * (float(limits.max) - limits.min) + limits.min).astype(dtype)


def encode(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    options = {"photometric": "rgb" if array.ndim == 3 else "minisblack", **options}
    if options.get("planarconfig") == "separate":
        array = np.moveaxis(array, -1, 0)
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


DTYPES = ("int8", "uint16", "int16", "float16", "float32", "float64", "uint32")
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"rowsperstrip": 7},
    "planes": {"planarconfig": "separate", "rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "tiles of planes": {"tile": (16, 32), "planarconfig": "separate"},
    "big endian": {"byteorder": ">"},
    "compressed": {"compression": "zlib", "rowsperstrip": 9},
    "compressed planes": {"compression": "zlib", "planarconfig": "separate"},
    "compressed big endian": {"compression": "zlib", "byteorder": ">"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_colours_of_any_depth_are_read(dtype: str, layout: str) -> None:
    image, notes = open_image(encode(samples(dtype, 3), **LAYOUTS[layout]))
    difference = np.asarray(image).astype(int) - SHOWN[..., :3]
    assert np.abs(difference).max() <= 1, (dtype, layout)
    if (dtype, "planes" in layout) != ("uint16", False):  # Pillow reads these
        assert len(notes) == 1 and "scaled to 8 bits" in notes[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grey_of_any_depth_is_read(dtype: str) -> None:
    names = ("rows", "tiles", "big endian", "compressed", "compressed big endian")
    for photometric, layout in itertools.product(("minisblack", "miniswhite"), names):
        content = encode(samples(dtype, 1)[..., 0], photometric=photometric, **LAYOUTS[layout])
        image, _ = open_image(content)
        expected = SHOWN[..., 0].astype(int)
        is_white = photometric == "miniswhite"
        difference = np.asarray(image)[..., 0] - (255 - expected if is_white else expected)
        assert np.abs(difference).max() <= 1, (dtype, photometric, layout)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzma"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_first_of_several_grey_planes_is_shown(
    dtype: str, compression: str | None, photometric: str
) -> None:
    """As satellites have them. Pillow reads them, in any compression."""
    options = {"planarconfig": "separate", "photometric": photometric}
    whole = encode(samples(dtype, 2), compression=compression, **options)
    expected = SHOWN[..., 0].astype(int)
    expected = 255 - expected if photometric == "miniswhite" else expected
    pixels = np.asarray(open_image(whole)[0])[..., 0]
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "int8", "int16"])
def test_alpha_is_composited_on_white(dtype: str) -> None:
    whole = samples(dtype, 4)
    whole[..., 3] = 1 if dtype == "float32" else np.iinfo(dtype).max
    whole[:10, :, 3] = 0
    image, notes = open_image(encode(whole, extrasamples=["unassalpha"]))
    pixels = np.asarray(image).astype(int)
    assert (pixels[:10] == 255).all()
    assert np.abs(pixels[10:] - SHOWN[10:, :, :3]).max() <= 1
    assert "transparency composited on white" in notes


@pytest.mark.parametrize("channels", [2, 4])
def test_premultiplied_colours_are_divided_by_alpha(channels: int) -> None:
    whole = samples("float32", channels)
    whole[..., -1] = np.linspace(0.5, 1, SIZE[1])
    colours = "rgb" if channels == 4 else "minisblack"
    options = {"photometric": colours, "planarconfig": "contig"}
    straight = encode(whole, extrasamples=["unassalpha"], **options)
    whole[..., :-1] *= whole[..., -1:]
    premultiplied = encode(whole, extrasamples=["assocalpha"], **options)
    expected, image = open_image(straight)[0], open_image(premultiplied)[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 3


def test_alpha_that_is_no_number_is_refused() -> None:
    whole = samples("float32", 4)
    whole[3, 3, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        open_image(encode(whole, extrasamples=["unassalpha"]))


def with_tags(content: bytes, **values: list[int]) -> bytes:
    """Return a TIFF file with other values of some tags."""
    file = io.BytesIO(content)
    for name, value in values.items():
        file.seek(0)
        with tifffile.TiffFile(file, mode="r+b") as opened:
            opened.pages[0].tags[name].overwrite(value, dtype=4)
    return file.getvalue()


def test_a_tile_does_not_expand_to_more_than_an_image() -> None:
    """A few kilobytes of zeros become many megabytes, and a tile may be larger than the image."""
    content = encode(samples("float64", 1)[..., 0], compression="zlib", tile=(64, 48))
    bomb = zlib.compress(bytes(1 << 28))
    content = with_tags(content, TileWidth=[1 << 16], TileLength=[2700], TileByteCounts=[len(bomb)])
    content = with_tags(content, TileOffsets=[len(content)])
    tracemalloc.start()
    with pytest.raises(InputError, match="tiles of 65536x2700 pixels are not read") as error:
        open_image(content + bomb, max_pixels=1 << 28)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 26, error.value


class CountingFile(io.BytesIO):
    """A file that counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content


@pytest.mark.parametrize("layout", ["rows", "compressed"])
def test_strips_that_declare_too_many_bytes_are_not_read_whole(layout: str) -> None:
    content = encode(samples("float16", 3), **{**LAYOUTS[layout], "rowsperstrip": 1})
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        count = len(file.pages[0].dataoffsets)
    content = with_tags(content, StripByteCounts=[1 << 24] * count)
    file = CountingFile(content + bytes(1 << 24))
    with open_header(file, "", 1 << 20) as image:
        image.load()
        assert np.abs(np.asarray(image).astype(int) - SHOWN[..., :3]).max() <= 1
    assert file.count < 1 << 20


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16"])
def test_predictors_are_undone(dtype: str) -> None:
    """Programs of geographers write differences, which compress better."""
    whole = samples(dtype, 3)
    count, rows = whole.dtype.itemsize, []
    for row in whole:
        if whole.dtype.kind == "f":
            order = row.astype(f">f{count}").view(np.uint8).reshape(-1, count).T
            flat = order.reshape(-1, 3)  # of three samples a pixel
            rows.append(np.diff(flat, axis=0, prepend=np.zeros((1, 3), np.uint8)).tobytes())
        else:
            rows.append(np.diff(row, axis=0, prepend=np.zeros((1, 3), row.dtype)).tobytes())
    plain = encode(whole, rowsperstrip=SIZE[0], planarconfig="contig", predictor=False)
    with tifffile.TiffFile(io.BytesIO(plain)) as file:
        offset = file.pages[0].dataoffsets[0]
        # tifffile writes the tag itself with an optional package only.
    extra = [(65000, 3, 1, 3 if whole.dtype.kind == "f" else 2, True)]
    content = bytearray(encode(whole, rowsperstrip=SIZE[0], extratags=extra))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        offset, tag = file.pages[0].dataoffsets[0], file.pages[0].tags[65000].offset
    content[tag : tag + 2] = (317).to_bytes(2, "little")
    data = b"".join(rows)
    content[offset : offset + len(data)] = data
    pixels = np.asarray(open_image(bytes(content))[0]).astype(int)
    assert np.abs(pixels - SHOWN[..., :3]).max() <= 1


def test_the_orientation_is_applied() -> None:
    content = encode(samples("float32", 3), extratags=[(274, 3, 1, 6, True)])
    image, _ = open_image(content)
    assert image.size == SIZE
    upright = np.rot90(SHOWN[..., :3], -1)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 1


def test_pages_are_counted() -> None:
    image, notes = open_image(encode(np.stack([samples("float32", 3)] * 3), photometric="rgb"))
    assert "first of 3 frames" in notes and image.size == SIZE[::-1]


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((8, 8, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"},
         "5 channels with 8 bits, and pictures have 1 .grey., 3 .RGB. or 4"),
        (np.zeros((8, 8, 12), np.uint16), {"photometric": "minisblack", "planarconfig": "contig"},
         "12 channels with 16 bits, and"),
        (np.zeros((8, 8), np.complex64), {}, r"64 bits \(complex\) is not read"),
        (np.full((8, 8, 3), np.nan, np.float32), {}, "NaN or infinity"),
    ],
)  # fmt: skip
def test_other_samples_are_refused_by_name(
    array: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_image(encode(array, **options))
    assert "damaged" not in str(error.value.hint)


def compressed(content: bytes, name: str) -> bytes:
    """Return a TIFF file whose strips or tiles are compressed by libtiff."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        kind = "Tile" if page.is_tiled else "Strip"
    offsets, counts, code = [], [], 0
    for offset, count in places:
        part, packed = np.frombuffer(content[offset : offset + count], np.uint8), io.BytesIO()
        Image.fromarray(part.reshape(1, -1)).save(packed, "TIFF", compression=name)
        packed.seek(0)
        with tifffile.TiffFile(packed) as file:
            page = file.pages[0]
            code, (start,), (size,) = page.compression, page.dataoffsets, page.databytecounts
        offsets.append(len(content))
        counts.append(size)
        content += packed.getvalue()[start : start + size]
    places_and_sizes = {f"{kind}Offsets": offsets, f"{kind}ByteCounts": counts}
    return with_tags(content, Compression=[code], **places_and_sizes)


@pytest.mark.parametrize("name", ["tiff_lzw", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64", "uint16", "int16"])
def test_byte_codes_are_read_by_libtiff(dtype: str, name: str) -> None:
    """LZW is what most programs write."""
    for channels in (1, 3):
        whole = samples(dtype, channels)
        whole = whole[..., 0] if channels == 1 else whole
        for layout in ("rows", "tiles", "planes", "big endian"):
            if channels == 1 and layout == "planes":
                continue
            content = compressed(encode(whole, **LAYOUTS[layout]), name)
            pixels = np.asarray(open_image(content)[0]).astype(int)
            expected = SHOWN[..., :1] if channels == 1 else SHOWN[..., :3]
            assert np.abs(pixels - expected).max() <= 1, (channels, layout)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_differences_of_the_bits_of_floats_are_undone(dtype: str) -> None:
    """GDAL writes them with PREDICTOR=2."""
    whole, extra = samples(dtype, 3), [(65000, 3, 1, 2, True)]
    bits = whole.view(f"u{whole.dtype.itemsize}")
    differences = np.diff(bits, axis=1, prepend=np.zeros((SIZE[0], 1, 3), bits.dtype))
    content = bytearray(encode(differences.view(dtype), planarconfig="contig", extratags=extra))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tag = file.pages[0].tags[65000].offset
    content[tag : tag + 2] = (317).to_bytes(2, "little")
    for packed in (bytes(content), compressed(bytes(content), "tiff_lzw")):
        pixels = np.asarray(open_image(packed)[0]).astype(int)
        assert np.abs(pixels - SHOWN[..., :3]).max() <= 1


def test_compressed_strips_do_not_expand_to_more_than_an_image() -> None:
    """LZW stores zeros in a thousandth of their size."""
    content = compressed(encode(np.zeros((64, 64), np.float64)), "tiff_lzw")
    content = with_tags(
        content, ImageWidth=[1 << 14], ImageLength=[1 << 14], RowsPerStrip=[1 << 14]
    )
    tracemalloc.start()
    with pytest.raises(InputError, match="takes more than 1 GiB"):
        open_image(content, max_pixels=1 << 29)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_other_compression_is_refused_by_name() -> None:
    content = bytearray(encode(samples("float32", 3)))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = file.pages[0].tags["Compression"].valueoffset
    content[at : at + 2] = (7).to_bytes(2, "little")
    with pytest.raises(InputError, match=r"32 bits \(floats\) and jpeg compression is not read"):
        open_image(bytes(content))


@pytest.mark.parametrize("layout", ["rows", "tiles of planes", "compressed", "tiff_lzw", "zstd"])
def test_truncation_is_never_silent(layout: str) -> None:
    whole = encode(samples("float64", 3), **LAYOUTS.get(layout, {}))
    whole = whole if layout in LAYOUTS else compressed(whole, layout)
    expected, errors = np.asarray(open_image(whole)[0]), 0
    for size in np.linspace(8, len(whole) - 1, 40).astype(int):
        try:
            image, _ = open_image(whole[:size])
        except InputError as error:
            errors += 1
            assert error.message and error.hint
        else:
            assert np.array_equal(np.asarray(image), expected), f"cut to {size}"
    assert errors > 35


def test_flipped_bytes_give_a_picture_or_an_input_error() -> None:
    rng = np.random.default_rng(0)
    files = [encode(samples("float32", 3), **layout) for layout in LAYOUTS.values()]
    files += [compressed(files[0], name) for name in ("tiff_lzw", "packbits", "zstd", "lzma")]
    for content in files:
        whole = np.frombuffer(content, np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[rng.integers(4, 400, 3)] ^= rng.integers(1, 255, 3, np.uint8)
            try:
                assert open_image(data.tobytes())[0].mode == "RGB"
            except InputError as error:
                assert error.message


def test_the_command_line_says_what_it_scaled(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "x.tif").write_bytes(encode(samples("float32", 3)))
    (tmp_path / "y.tif").write_bytes(
        encode(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    )
    code, out, err = hiera("predict", tmp_path, "-m", "hiera_nano_32", "-f", "jsonl")
    first, second = map(json.loads, out.splitlines())
    assert code == 1 and first["notes"] == ["float colour scaled to 8 bits"]
    assert "5 channels" in second["error"]["message"] and "5 channels" in err
