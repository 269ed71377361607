"""JPEG files decoded by a GPU, with nvJPEG through torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import ExifTags, JpegImagePlugin

from ..image_formats import open_header
from ..image_reader import as_input_errors, open_file

SIGNATURE, END = b"\xff\xd8\xff", b"\xff\xd9"
MAX_BYTES = 256 << 20  # of a file; Pillow does not read larger ones whole
TRAILING_BYTES = 64  # that may follow the end of a whole file
MODES = ("RGB", "L")  # Pillow converts others


def decode_jpeg(
    content: Path | bytes, device: torch.device, max_pixels: int
) -> torch.Tensor | None:
    """Return the pixels of a JPEG file, upright; None if Pillow has to decode it.

    That is the case for other formats, for CMYK, for very large files, and for files that seem to
    be damaged or cut off: Pillow says what is wrong with them.

    Args:
        content: A path, or the bytes of the file.
        device: Where it is decoded.
        max_pixels: An image with more pixels is refused.

    Returns:
        uint8 [y, x, 3] on the device. Values may differ from Pillow's by a few levels of 255.

    Raises:
        InputError: The file is missing or too large.
    """
    with as_input_errors():
        with open_file(content) as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return None
            file.seek(0)
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES or END not in data[-TRAILING_BYTES:]:
            return None
        with open_file(data) as file, open_header(file, "", max_pixels) as image:
            if type(image) is not JpegImagePlugin.JpegImageFile or image.mode not in MODES:
                return None
            try:
                orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
            except Exception:  # Pillow's reader notes that the block is damaged
                return None
    try:
        planes = _decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)
    except RuntimeError:
        return None
    return upright(planes, orientation).permute(1, 2, 0).contiguous()


def has_gpu_decoder() -> bool:
    """Return whether torchvision decodes JPEG files, which later versions leave to torchcodec."""
    import torchvision.io

    return hasattr(torchvision.io, "decode_jpeg")


def upright(planes: torch.Tensor, orientation: int) -> torch.Tensor:
    """Return an image as its EXIF orientation says. [c, y, x] -> [c, y, x]"""
    if orientation in (5, 6, 7, 8):
        planes = planes.transpose(1, 2)
    # Of the transposed image, where it is transposed.
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
    return planes.flip(flips[orientation]) if orientation in flips else planes


def _decode(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the planes of a JPEG file. uint8 [n] on the host -> uint8 [3, y, x] on the device"""
    from torchvision.io import ImageReadMode, decode_jpeg

    planes: torch.Tensor = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
    return planes
