"""Samples of TIFF files that Pillow does not read, or reads as others than they are: floats of 16
or 64 bits, colours of more than 8 bits in planes or as floats, signed 8-bit values."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, features
from PIL import TiffImagePlugin as Tiff

from ...errors import InputError, first_line

PREDICTOR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS = 317, 322, 323, 324, 325
RAW, DEFLATE = 1, (8, 32946)  # values of the tag for compression
# Those that Pillow's libtiff decodes, and that know nothing of samples: LZW, PackBits, LZMA, ZSTD.
BY_PILLOW = (5, 32773, 34925, 50000)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # values of the tag for colours
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # values of the tag for the format of samples
KINDS = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}
NAMES = {UNSIGNED: "bits", SIGNED: "signed bits", FLOAT: "bits (floats)"}
MAX_BYTES = 1 << 30  # of the samples of an image
MAX_EXPANSION, SPARE_BYTES = 2, 1024  # a strip or tile that is compressed does not take more
LONG = 4  # type of a value of 32 bits
PREMULTIPLIED, ALPHA = 1, 2  # values of the tag for extra samples; others are no alpha
DAMAGED = "the file is damaged"
SAVE_AS = "save it as grey, RGB or RGBA with 8 or 16 bits"


class Layout:
    """How the samples of a TIFF file are stored.

    Args:
        tags: The tags of the image.

    Attributes:
        width, height: Size in pixels.
        channels: Number of samples of a pixel.
        photometric: What they mean; `BLACK_IS_ZERO`, `RGB` and so on.
    """

    def __init__(self, tags: Tiff.ImageFileDirectory_v2) -> None:
        self._tags = tags
        self.width, self.height = int(tags[Tiff.IMAGEWIDTH]), int(tags[Tiff.IMAGELENGTH])
        bits = _all(tags.get(Tiff.BITSPERSAMPLE, (1,)))
        formats = _all(tags.get(Tiff.SAMPLEFORMAT, (UNSIGNED,)))
        self.channels = int(tags.get(Tiff.SAMPLESPERPIXEL, 1))
        self.photometric = int(tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 0))
        self.bits, self.format = int(bits[0]), int(formats[0])
        self.is_uniform = len(set(bits)) == len(set(formats)) == 1
        self.in_planes = tags.get(Tiff.PLANAR_CONFIGURATION, 1) == 2 and self.channels > 1
        self.compression = int(tags.get(Tiff.COMPRESSION, RAW))
        self._extra = next(iter(_all(tags.get(Tiff.EXTRASAMPLES, ()))), None)
        self._tiled = TILE_OFFSETS in tags
        self._tile_size = int(tags.get(TILE_LENGTH, 0)), int(tags.get(TILE_WIDTH, 0))
        self._rows = int(tags.get(Tiff.ROWSPERSTRIP, self.height))  # of a strip

    @property
    def is_misread(self) -> bool:
        """Whether Pillow takes the samples for others: signed ones for unsigned ones, planes of 16
        bits for planes of 8, or compressed ones for bytes in the other order. Of compressed grey in
        planes it reads the first, as it should."""
        is_signed_byte = self.format == SIGNED and self.bits == 8
        is_grey = self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
        is_read = is_grey and self.compression not in (RAW, *DEFLATE)
        are_planes = self.in_planes and self.bits > 8 and not is_read
        is_word = self.format == UNSIGNED and self.bits == 16
        is_swapped = self._tags.prefix == b"MM" and self.compression != RAW and self.bits > 8
        return is_signed_byte or are_planes or (is_swapped and is_grey and not is_word)

    @property
    def has_alpha(self) -> bool:
        """Whether the sample behind those of the colour is alpha."""
        return self.channels % 2 == 0 and self._extra in (PREMULTIPLIED, ALPHA)

    @property
    def mode(self) -> str:
        """Pillow's mode of the image, once its samples have 8 bits."""
        alpha = ("a" if self._extra == PREMULTIPLIED else "A") if self.has_alpha else ""
        return ("RGB" if self.photometric == RGB else "L") + alpha

    def check(self) -> None:
        """Check that this module reads the samples.

        Raises:
            InputError: It does not. The message says what they are.
        """
        what = f"a TIFF file of {self.channels} channels with {self.bits} "
        what += NAMES.get(self.format, "bits (complex)")
        if self.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            raise InputError(f"{what} in an unusual colour space", SAVE_AS)
        colours = 3 if self.photometric == RGB else 1
        if not colours <= self.channels <= colours + 1:
            raise InputError(f"{what}, and pictures have 1 (grey), 3 (RGB) or 4 (RGBA)", SAVE_AS)
        is_known = self.format in KINDS and self.bits in (8, 16, 32, 64)
        if not is_known or not self.is_uniform or (self.format == FLOAT and self.bits == 8):
            raise InputError(f"{what} is not read", SAVE_AS)
        if self.width * self.height * self.channels * self.bits // 8 > MAX_BYTES:
            raise InputError(f"{what} takes more than {MAX_BYTES >> 30} GiB", SAVE_AS)
        is_byte_code = self.compression in BY_PILLOW and features.check("libtiff")
        if self.compression not in (RAW, *DEFLATE) and not is_byte_code:
            name = Tiff.COMPRESSION_INFO.get(self.compression, str(self.compression))
            raise InputError(f"{what} and {name} compression is not read", SAVE_AS)

    def read(self, file: IO[bytes], prefix: bytes) -> np.ndarray:
        """Return the samples, [height, width, channels].

        Args:
            file: The file.
            prefix: Its first two bytes, which say the order of bytes.

        Raises:
            InputError: The file is truncated or damaged.
        """
        order = "<" if prefix == b"II" else ">"
        dtype = np.dtype(f"{order}{KINDS[self.format]}{self.bits // 8}")
        together = 1 if self.in_planes else self.channels
        found = np.zeros((self.height, self.width, self.channels), dtype.newbyteorder("="))
        for plane, top, left, content in self._segments(file, together * dtype.itemsize):
            height, width = self._segment_size(top)
            pixels = self._decode(content, (height, width, together), dtype)
            part = found[top : top + height, left : left + width]
            shown = pixels[: part.shape[0], : part.shape[1]]
            part[..., plane : plane + together] = shown
        return found

    def _segment_size(self, top: int) -> tuple[int, int]:
        """Return height and width of the segments that begin in row `top`. The last strip may be
        shorter than the others; tiles have one size."""
        if self._tiled:
            return self._tile_size
        return max(1, min(self._rows, self.height - top)), self.width

    def _segments(self, file: IO[bytes], pixel_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield the first channel, the row and the column of each strip or tile, and its bytes."""
        names = (Tiff.STRIPOFFSETS, Tiff.STRIPBYTECOUNTS)
        names = (TILE_OFFSETS, TILE_COUNTS) if self._tiled else names
        offsets, counts = (_all(self._tags.get(name, ())) for name in names)
        height, width = self._segment_size(0)
        if height < 1 or width < 1:
            raise InputError("tiles without pixels", DAMAGED)
        if height * width * pixel_bytes > MAX_BYTES:  # a tile may exceed the image
            raise InputError(f"tiles of {width}x{height} pixels are not read", DAMAGED)
        planes = self.channels if self.in_planes else 1
        down, across = -(-self.height // height), -(-self.width // width)
        if planes * down * across > min(len(offsets), len(counts)):
            raise InputError("a part of the pixels is missing", "the file is damaged or truncated")
        for index in range(planes * down * across):
            plane, place = divmod(index, down * across)
            top, left = place // across * height, place % across * width
            offset, count = offsets[index], counts[index]
            size = self._segment_size(top)[0] * width * pixel_bytes
            # Counts that are too large could have the whole file read for each row.
            most = size if self.compression == RAW else MAX_EXPANSION * size + SPARE_BYTES
            file.seek(int(offset))
            content = file.read(max(0, min(int(count), most)))
            if self.compression in DEFLATE:
                try:
                    content = zlib.decompressobj().decompress(content, size)
                except zlib.error as error:
                    raise InputError(str(error), "the file is damaged or truncated") from error
            elif self.compression != RAW:
                rows = self._segment_size(top)[0]
                content = _decode_bytes(content, self.compression, size // rows, rows)
            if len(content) < size:
                raise InputError("the file is truncated", "download or copy it again")
            yield plane, top, left, content[:size]

    def _decode(self, content: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
        """Return the pixels of a segment, after undoing its predictor."""
        predictor = int(self._tags.get(PREDICTOR, 1))
        if predictor == 3 and self.format == FLOAT:
            # Bytes of all samples of a row, the highest of each first, as differences.
            height, _, channels = shape
            rows = np.frombuffer(content, np.uint8).reshape(height, -1, channels)
            summed = rows.cumsum(axis=1, dtype=np.uint8).reshape(height, dtype.itemsize, -1)
            ordered = np.ascontiguousarray(summed.transpose(0, 2, 1))
            return ordered.view(dtype.newbyteorder(">")).reshape(shape)
        pixels = np.frombuffer(content, dtype).reshape(shape)
        if predictor == 2:  # of floats, the differences are those of their bits
            native, bits = dtype.newbyteorder("="), np.dtype(f"u{dtype.itemsize}")
            return pixels.astype(native).view(bits).cumsum(axis=1, dtype=bits).view(native)
        if predictor != 1:
            raise InputError(f"TIFF predictor {predictor} is not read", SAVE_AS)
        return pixels


class _Bytes(Tiff.TiffImageFile):
    """TIFF reader that allocates the pixels without asking for Pillow's own limit."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self.size).im
        super().load_prepare()


def _decode_bytes(content: bytes, compression: int, width: int, rows: int) -> bytes:
    """Return the bytes of a strip or tile, which Pillow decodes as grey pixels of a file that holds
    nothing else.

    Args:
        content: The compressed bytes.
        compression: Value of the tag.
        width: Bytes of a row.
        rows: Number of rows.

    Raises:
        InputError: They are damaged.
    """
    tags = {
        Tiff.IMAGEWIDTH: width,
        Tiff.IMAGELENGTH: rows,
        Tiff.BITSPERSAMPLE: 8,
        Tiff.COMPRESSION: compression,
        Tiff.PHOTOMETRIC_INTERPRETATION: BLACK_IS_ZERO,
        Tiff.STRIPOFFSETS: 8,
        Tiff.SAMPLESPERPIXEL: 1,
        Tiff.ROWSPERSTRIP: rows,
        Tiff.STRIPBYTECOUNTS: len(content),
    }
    entries = [struct.pack("<HHLL", tag, LONG, 1, value) for tag, value in sorted(tags.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    content += bytes(len(content) % 2)
    file = io.BytesIO(struct.pack("<2sHL", b"II", 42, 8 + len(content)) + content + directory)
    try:
        with _Bytes(file) as image:
            return image.tobytes()
    except (OSError, SyntaxError) as error:
        raise InputError(first_line(error), "the file is damaged or truncated") from error


def _all(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)
