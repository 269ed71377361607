"""Images and clips in memory: PIL images, arrays, tensors, bytes and open files as sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ..errors import InputError, UsageError, first_line
from ..records import Kind
from .image_reader import to_upright_rgb
from .sources import Source
from .transforms import InMemory as InMemory
from .transforms import MediaInput as MediaInput
from .video_files.video_reader import DecodedFrame

SINGLE = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha
MAX_FILE_BYTES = 512 << 20
FRAME_RATE = 30.0  # of a clip in memory, which has no rate of its own


def is_single(source: object) -> bool:
    """Return whether this is one input, not several."""
    return isinstance(source, SINGLE) or hasattr(source, "read")


def is_batch(source: object, kind: Kind | None) -> bool:
    """Return whether this is a batch of inputs: a tensor [b, channels, height, width] of images, or
    5 dimensions of clips.

    Args:
        source: What a user gives.
        kind: What the model takes; None if the input decides. A model of videos takes 4 dimensions
            for a clip.
    """
    if not isinstance(source, np.ndarray | torch.Tensor):
        return False
    if source.ndim == 5:
        return kind != "image"
    is_clip = isinstance(source, np.ndarray) or source.ndim != 4 or kind == "video"
    return not is_clip and source.shape[1] in CHANNELS and source.shape[-1] not in CHANNELS


def as_source(item: Any, index: int) -> Source:
    """Return the source of an image or video in memory. It is named by its type and its position
    among the inputs: `ndarray 3`.

    If it cannot be read, the source has an error.

    Raises:
        UsageError: It is of another type; see `MediaInput`.
    """
    name = f"{type(item).__name__} {index}"
    try:
        if isinstance(item, bytes | bytearray | memoryview):
            return Source(name, data=bytes(item))
        if hasattr(item, "read"):
            return Source(str(getattr(item, "name", name)), data=_read(item))
        return Source(name, pixels=_where_they_lie(item))
    except InputError as error:
        return Source(name, error=error)
    except UsageError:
        raise
    except Exception as error:  # a PIL image is decoded now, which raises many types
        return Source(name, error=InputError(first_line(error), "the image is damaged"))


def lies_on_device(item: object) -> bool:
    """Return whether this is a tensor on a device that is not the host."""
    return isinstance(item, torch.Tensor) and not item.is_cpu and not item.is_meta


def wait_for_tensors(given: Sequence[object]) -> None:
    """Wait until the work that makes tensors on devices is done. Threads that read them know
    nothing of the stream that the caller has chosen."""
    devices = {item.device for item in given if isinstance(item, torch.Tensor)}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        elif device.type in ("xpu", "mps"):
            torch.accelerator.synchronize(device)


def _where_they_lie(item: Any) -> np.ndarray | torch.Tensor:
    """Return the pixels of a tensor on its device if they need no work of Pillow; otherwise see
    `as_pixels`."""
    found = device_pixels(item) if lies_on_device(item) else None
    return as_pixels(item) if found is None else found


def device_pixels(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the pixels of an image, [height, width, 3], or of a clip, [frames, height, width, 3],
    as uint8 RGB on the device of the tensor.

    Args:
        tensor: See `as_pixels`.

    Returns:
        None if the tensor is no image or clip, or sparse, its values are out of range, or its
        pixels have alpha.
    """
    if tensor.layout != torch.strided:
        return None
    pixels = _channels_last(tensor.detach())
    pixels = pixels[..., None] if pixels.dim() == 2 else pixels
    if pixels.dim() not in (3, 4) or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        return None
    if pixels.dtype is torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    elif pixels.dtype is not torch.uint8:
        if pixels.is_complex() or pixels.dtype is torch.uint16:
            return None
        low, high = (float(value) for value in pixels.aminmax())  # two numbers travel
        if pixels.is_floating_point() and low >= -1e-3 and high <= 1 + 1e-3:
            pixels = pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8)
        elif not pixels.is_floating_point() and low >= 0 and high <= 255:
            pixels = pixels.to(torch.uint8)
        else:
            return None
    return pixels.expand(*pixels.shape[:-1], 3).contiguous()


def as_pixels(item: Any) -> np.ndarray:
    """Return the pixels of an image, [height, width, 3], or of a clip, [frames, height, width, 3],
    as uint8 RGB.

    Args:
        item: A PIL image; a NumPy array [height, width], [height, width, channels] or
            [frames, height, width, channels]; or a tensor of these forms or [channels, height,
            width], [frames, channels, height, width], [channels, frames, height, width]. Channels
            are grey, RGB, or RGB with alpha.
            Values are uint8 in 0..255, or floats in 0..1. Wider integers hold 0..255 if no value of
            the array or clip is above 255, and uint16 otherwise 0..65535. So 16-bit values that are
            all below 256, which are black, have to be scaled by the caller.

    Raises:
        InputError: The shape or the values are others.
        UsageError: It is of another type.
    """
    if isinstance(item, Image.Image):
        return np.array(to_upright_rgb(item, [])).copy()
    if isinstance(item, torch.Tensor):
        tensor = _channels_last(_plain(item.detach()).cpu())
        # NumPy has no bfloat16.
        array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    elif isinstance(item, np.ndarray):
        array = item
    else:
        raise UsageError(
            f"an input is of type {type(item).__name__}",
            "give a path, bytes, an open file, a PIL image, an array or a tensor",
        )
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim not in (3, 4) or array.shape[-1] not in CHANNELS or 0 in array.shape:
        hint = (
            "arrays are [height, width, channels], tensors [channels, height, width], and clips "
            "[frames, height, width, channels]"
        )
        if array is item and array.ndim in (3, 4) and array.shape[-3] in CHANNELS:
            hint = "channels are the last axis of an array: numpy.moveaxis(array, -3, -1)"
        raise InputError(f"an array of shape {tuple(item.shape)} is no image or clip", hint)
    pixels = _as_uint8(array)
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 4:
        frames = pixels.reshape(-1, *pixels.shape[-3:])
        opaque = [np.array(to_upright_rgb(Image.fromarray(frame, "RGBA"), [])) for frame in frames]
        return np.stack(opaque).reshape(*pixels.shape[:-1], 3)
    return np.ascontiguousarray(pixels)


class FrameArray:
    """A clip in memory, with the interface of `Video`.

    Args:
        pixels: uint8 [frames, height, width, 3]; a tensor if they lie on a device.
        fps: Frame rate.
    """

    def __init__(self, pixels: np.ndarray | torch.Tensor, fps: float = FRAME_RATE) -> None:
        self.pixels, self.fps, self.frames = pixels, fps, len(pixels)
        self.duration, self.declares_length = self.frames / fps, True
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield frames by index."""
        for index in indices:
            frame = self.pixels[index]
            on_host = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame
            yield DecodedFrame(index, on_host, True)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """[c, h, w] -> [h, w, c], and [t, c, h, w] or [c, t, h, w] -> [t, h, w, c]. Clips that end with
    channels stay as they are."""
    if tensor.dim() == 4 and tensor.shape[-1] not in CHANNELS:
        channels = 1 if tensor.shape[1] in CHANNELS else 0
        return tensor.movedim(channels, -1) if tensor.shape[channels] in CHANNELS else tensor
    if tensor.dim() != 3 or tensor.shape[0] not in CHANNELS:
        return tensor
    return tensor.movedim(0, -1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that NumPy can take: dense, and not a lazy conjugate or negative.

    Raises:
        InputError: It has no values.
    """
    if tensor.is_meta:
        raise InputError("a tensor on the device meta has no values", "give pixels")
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.resolve_conj().resolve_neg()


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Return pixels in 0..255.

    Raises:
        InputError: Values are outside the range of their type: see `as_pixels`.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16 and array.max() > 255:
        return (array >> 8).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise InputError(f"pixels of type {array.dtype}", "give uint8 in 0..255, or floats in 0..1")
    low, high = float(array.min()), float(array.max())  # NaN if any value is
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating) and low >= -1e-3 and high <= 1 + 1e-3:
        scaled = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255)
        return scaled.astype(np.uint8)
    raise InputError(
        f"{array.dtype} pixels lie in {low:g}..{high:g}",
        "give uint8 in 0..255, or floats in 0..1 that are not normalised",
    )


def _read(file: Any) -> bytes:
    """Read an open file.

    Raises:
        InputError: It cannot be read, is a text file, or is too large.
    """
    try:
        content = file.read(MAX_FILE_BYTES + 1)
    except UnicodeError as error:
        raise InputError("a text file", "open it with mode 'rb'") from error
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise InputError(str(error).lower() or type(error).__name__, "open it again") from error
    if not isinstance(content, bytes):
        raise InputError("a text file", "open it with mode 'rb'")
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"larger than {MAX_FILE_BYTES >> 20} MiB", "give its path")
    return content
