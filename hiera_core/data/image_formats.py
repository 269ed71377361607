"""Open image files with Pillow's readers, and check their size before anything is decoded.

`Image.open` checks sizes too, but by a limit that all threads of a process share. Here the limit
belongs to the call, and Pillow's own limit is neither used nor changed.

Three of Pillow's readers allocate pixels while they open a file. Their files are checked first, or
the reader is replaced by one that allocates nothing.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from PIL import BmpImagePlugin, GifImagePlugin, IcoImagePlugin, Image, ImageFile, PngImagePlugin
from PIL import TiffImagePlugin as Tiff

from ..errors import InputError
from .deep_grey import SCALED, samples_to_8_bits
from .image_files.tiff_samples import WHITE_IS_ZERO, Layout
from .media_types import JSON_ENDINGS, SIGNATURE_BYTES

# Only these formats are opened, whatever the file extension is. Pillow's other readers are old,
# call external programs, or take any bytes for an image (TGA). The decoder of JPEG 2000 needs up to
# 30 bytes for each pixel and channel of a file that has no data at all.
FORMATS = [
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "ICO",
    "QOI",
    "HEIF",  # photos of phones; the reader is pillow-heif's, if that is installed
]
HEIF_SIGNATURE = re.compile(
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|hevm|hevs|mif1|msf1)", re.DOTALL
)
JPEG_2000_SIGNATURES = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
# Files that people take for inputs, and what to do with them.
_OTHER_FILES = [
    (
        re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
        "it is an archive; extract it, or make it an uncompressed .tar",
    ),
    (re.compile(rb"PAR1"), "it is a Parquet file; --manifest FILE takes a table of paths"),
    (re.compile(rb"%PDF-"), "it is a PDF file; save its pages as PNG"),
    (re.compile(rb"(<\?xml[^>]*>)?\s*<svg"), "it is an SVG file; convert it to PNG"),
    (re.compile(rb"8BPS"), "it is a Photoshop file; convert it to PNG or TIFF"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "it is JPEG XL; convert it to PNG or TIFF"),
    (re.compile(rb"\x93NUMPY"), "it is a NumPy array; in Python, give numpy.load(FILE)"),
    (re.compile(rb".{128}DICM", re.DOTALL), "it is a DICOM file; save its images as TIFF or PNG"),
    (re.compile(rb"v/1\x01|#\?RADIANCE|P7\n"), "convert it to TIFF or PNG"),
    (
        re.compile(rb"\s*<(!doctype +)?html", re.IGNORECASE),
        "it is a web page; download the file again",
    ),
]
LIST_ENDINGS = (".csv", ".lst", ".tsv", ".txt")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
Size = tuple[int, int]


def open_header(
    file: IO[bytes], name: str, max_pixels: int, *, animated: bool = False
) -> ImageFile.ImageFile:
    """Return an image of which only the header has been read.

    Args:
        file: The file, open at its start.
        name: Its path, or "" if it is in memory.
        max_pixels: An image with more pixels is refused.
        animated: Whether frames after the first will be read. Each is checked when it is reached.

    Raises:
        InputError: The image is too large, or in no supported format.
        Exception: Pillow raises many types for damaged files.
    """
    prefix = file.read(SIGNATURE_BYTES)
    for format in _formats():
        reader, accepts = Image.OPEN[format]
        accepted = accepts is None or accepts(prefix[:16])
        if isinstance(accepted, str) or not accepted:  # a str says why not
            continue
        try:
            file.seek(0)
            for size in _SIZES_BEFORE_OPENING.get(format, _no_sizes)(file):
                _check_size(size, max_pixels)
            file.seek(0)
            image = _make_reader(format, reader, max_pixels if animated else None)(file, name)
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # not a file of this format after all
        for size in (image.size, _tile_size(image)):
            _check_size(size, max_pixels)
        return image
    if prefix.startswith(JPEG_2000_SIGNATURES):
        raise InputError("JPEG 2000 is not supported", "convert it to PNG or TIFF")
    if HEIF_SIGNATURE.match(prefix) and "HEIF" not in Image.OPEN:
        raise InputError("HEIC needs pillow-heif", "pip install 'hiera-toolkit[heif]'")
    raise InputError("not a picture in a supported format", _hint(prefix, name))


def _hint(prefix: bytes, name: str) -> str:
    """Return what to do with a file that is not an image, by its first bytes or its extension."""
    for signature, hint in _OTHER_FILES:
        if signature.match(prefix):
            return hint
    if Path(name).suffix.lower() in LIST_ENDINGS:
        return "for a file with one path per line, put @ before its name"
    if Path(name).suffix.lower() in JSON_ENDINGS:
        return "for a list of paths, put @ before its name"
    return "the file is damaged, or not an image"


@functools.cache
def _formats() -> list[str]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(size: Size, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InputError(
            f"{width}x{height} pixels are more than {max_pixels}",
            "raise --max-pixels if you trust it",
        )


# Readers ----------------------------------------------------------------------------------------


class _StillGif(GifImagePlugin.GifImageFile):
    """Reader of the first frame of a GIF.

    Pillow prepares the area that the second frame shows while it opens the file, and the file may
    declare an area of any size. Without a disposal method there is no such area.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, value: int) -> None:
        pass


class _Tiff(Tiff.TiffImageFile):
    """TIFF reader that allocates the pixels without asking for Pillow's own limit again, and reads
    the samples itself where Pillow does not."""

    _layout: Layout | None = None  # of samples that are read here

    def _setup(self) -> None:
        self._layout = None
        try:
            layout = Layout(self.tag_v2)
        except (KeyError, TypeError, ValueError):
            super()._setup()
            return
        if not layout.is_misread:
            try:
                super()._setup()
                return
            except SyntaxError:  # samples that it does not read
                if layout.width < 1 or layout.height < 1:
                    raise
        self._layout = layout
        self._size = self._tile_size = (layout.width, layout.height)
        self._mode = "RGB"

    def load(self) -> Any:
        if (layout := self._layout) is not None:
            layout.check()
            assert self.fp is not None
            samples = layout.read(self.fp, self.tag_v2.prefix)
            # A sample that is no alpha is left out.
            samples = samples[..., : Image.getmodebands(layout.mode)]
            pixels, self.info[SCALED] = samples_to_8_bits(self, samples, layout.has_alpha)
            if layout.photometric == WHITE_IS_ZERO:
                pixels[..., 0] = 255 - pixels[..., 0]
            image = Image.frombuffer(layout.mode, self.size, pixels, "raw", layout.mode, 0, 1)
            self.im, self._mode, self.tile, self._layout = image.im, image.mode, [], None
        return super().load()

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size).im
        super().load_prepare()


class _AnimatedGif(GifImagePlugin.GifImageFile):
    """Reader of all frames of a GIF, which checks the area of each before it is allocated."""

    max_pixels = 0

    @property
    def dispose_extent(self) -> tuple[int, int, int, int] | None:
        return self._extent

    @dispose_extent.setter
    def dispose_extent(self, value: tuple[int, int, int, int] | None) -> None:
        if value is not None:
            _check_size((value[2], value[3]), self.max_pixels)
        self._extent = value


Reader = Callable[..., ImageFile.ImageFile]
_READERS: dict[str, Reader] = {"GIF": _StillGif, "TIFF": _Tiff}


def _make_reader(format: str, default: Reader, frame_pixels: int | None) -> Reader:
    """Return the reader of a format.

    Args:
        format: Pillow's name of the format.
        default: Pillow's reader.
        frame_pixels: Limit for each frame of an animation; None to read the first frame only.
    """
    if frame_pixels is None or format != "GIF":
        return _READERS.get(format, default)
    return type("_BoundedGif", (_AnimatedGif,), {"max_pixels": frame_pixels})


def _tile_size(image: ImageFile.ImageFile) -> Size:
    """Return the size of a tile of a TIFF file, which may exceed the image; (0, 0) without."""
    tags = getattr(image, "tag_v2", {})
    size = tags.get(Tiff.TILEWIDTH, 0), tags.get(Tiff.TILELENGTH, 0)
    return size if all(isinstance(side, int) for side in size) else (0, 0)


# Sizes in headers -------------------------------------------------------------------------------


def _no_sizes(file: IO[bytes]) -> list[Size]:
    return []


def _webp_sizes(file: IO[bytes]) -> list[Size]:
    """Return the size of the canvas, which the decoder allocates when it opens a file."""
    head = file.read(30)
    chunk = head[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    return [(width, height)]


def _icon_sizes(file: IO[bytes]) -> list[Size]:
    """Return the size of the image that Pillow decodes when it opens an icon.

    It is a PNG or BMP file within the icon, and may be larger than the icon's directory says.
    """
    icon = IcoImagePlugin.IcoFile(file)
    file.seek(icon.entry[0].offset)
    is_png = file.read(8) == PNG_SIGNATURE
    file.seek(icon.entry[0].offset)
    reader: Any = PngImagePlugin.PngImageFile if is_png else BmpImagePlugin.DibImageFile
    return [reader(file).size]


# What each format declares, for readers that allocate pixels before they return.
_SIZES_BEFORE_OPENING: dict[str, Callable[[IO[bytes]], list[Size]]] = {
    "WEBP": _webp_sizes,
    "ICO": _icon_sizes,
}
