"""Preprocessing for evaluation: resize, crop and normalise images and video frames.

Images are processed as in the reference's evaluation, video clips as in SlowFast's
(spatial_sampling with uniform crops).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from .. import zoo
from ..errors import CheckpointError, UsageError
from ..wrappers import find_inside, no_hiera
from .clip_sampling import crop_offsets

# Largest aspect ratio at which a whole image is resized. For more elongated images, only the crop
# is.
MAX_WHOLE_RESIZE = 4
MAX_RESIZE = 8  # times the size of the crop; more would take any amount of memory
REDUCING_GAP = 2  # see `ImageTransform.enough_pixels`
SAM2_MODEL = "sam2_hiera_tiny"  # its preprocessing is that of all of SAM 2's encoders
CROP_MODES = ("center", "squash")  # timm's names
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601, as in Pillow)
_constants: dict[tuple[tuple[float, ...], torch.device], torch.Tensor] = {}  # see `_constant`


# What the functions of the library take for one image or video, and for several.
InMemory: TypeAlias = bytes | Image.Image | np.ndarray | torch.Tensor | IO[bytes]
MediaInput: TypeAlias = str | Path | InMemory
MediaInputs: TypeAlias = MediaInput | Iterable[MediaInput]


def transform_for(model: nn.Module) -> ImageTransform | VideoTransform:
    """Return the preprocessing of a model: its own (`model.card`), at its input size.

    Args:
        model: A model of this package; it may be compiled, or wrapped by DDP or PEFT.

    Raises:
        UsageError: The model takes one-dimensional signals, or is not a Hiera.
        CheckpointError: The preprocessing that was saved with the model is not usable.
    """
    inner = _unwrap(model)
    size = tuple(inner.config["input_size"])
    saved = getattr(inner, "card", {}).get("preprocessing")
    if saved is None and inner.family == "hieradet":
        saved = zoo.get(SAM2_MODEL).preprocessing
    transform: ImageTransform | VideoTransform
    if inner.input_kind() == "video":
        transform = VideoTransform.from_preprocessing(saved, size)
    else:
        transform = ImageTransform.from_preprocessing(saved, size)
    if inner.config["in_chans"] != 1:
        return transform
    mean, std = (sum(values) / len(values) for values in (transform.mean, transform.std))
    return replace(transform, grey=True, mean=(mean,), std=(std,))


def check_channels(model: nn.Module) -> None:
    """Check that the channels of a model can be had from an image: three, or one, which is grey.

    Raises:
        UsageError: The model takes another number of channels.
    """
    count = _unwrap(model).config["in_chans"]
    if count not in (1, 3):
        raise UsageError(
            f"the model takes {count} channels, and images have 3 (RGB) or 1 (grey)",
            "use it from Python, with tensors of your own",
        )


def _unwrap(model: nn.Module) -> Any:
    """Return the Hiera inside of wrappers. This layer lies below the models, so a Hiera is
    recognised by its methods."""
    inner = find_inside(model, lambda module: hasattr(type(module), "input_kind"))
    if inner is None:
        raise no_hiera(model)
    return inner


@dataclass(frozen=True)
class ImageTransform:
    """Evaluation preprocessing: short side to `resize`, centre crop of `size`, normalise.

    Args:
        size: Height and width that the model takes, in pixels.
        resize: Short side before the crop, in pixels.
        mean, std: Statistics of the channels, for pixels in [0, 1].
        interpolation: `bicubic` or `bilinear`, both with antialiasing.
        crop_mode: `center`; or `squash` to resize the whole image to `size`, whatever its shape.
        grey: Whether the model takes one channel, of grey values.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    grey: bool = False
    crop_mode: str = "center"

    default_model: ClassVar[str] = zoo.DEFAULT_IMAGE_MODEL

    @classmethod
    def from_preprocessing(
        cls, preprocessing: Mapping[str, Any] | None, input_size: tuple[int, ...]
    ) -> Self:
        """Return a model's own preprocessing, scaled to its input size.

        Args:
            preprocessing: As in zoo.yaml and hiera.json. Missing values are those of
                hiera_base_224.
            input_size: (y, x) in pixels.

        Raises:
            CheckpointError: A value is not usable.
        """
        known = {**zoo.get(cls.default_model).preprocessing, **(preprocessing or {})}
        height, width = input_size[-2:]
        try:
            resize, size = int(known["resize"]), tuple(map(int, known["size"]))
            if len(size) != 2 or min(resize, *size) < 1:
                raise ValueError(f"size {size}, resize {resize}")
            if resize > MAX_RESIZE * min(size):
                raise ValueError(f"resize {resize} is more than {MAX_RESIZE} times {min(size)}")
            mean, std = _channel_statistics(known)
            interpolation = Image.Resampling[str(known["interpolation"]).upper()].name.lower()
            crop_mode = known.get("crop_mode", "center")
            if crop_mode not in CROP_MODES:
                raise ValueError(f"crop_mode {crop_mode!r}")
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(f"preprocessing is not usable ({error})") from error
        if (height, width) != size:  # keep the ratio of resize to crop (256 to 224)
            resize = round(min(height, width) * resize / min(size))
        resize = max(resize, min(height, width))
        return cls((height, width), resize, mean, std, interpolation, crop_mode=crop_mode)

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resize and centre-crop an RGB image. -> uint8 [height, width, 3]

        For a very long image, only the pixels that the crop needs are resampled. So an image of
        20000x1 costs no more than any other, and the result is the same except for rounding.
        """
        (height, width), (w, h) = self.size, image.size
        resampling = Image.Resampling[self.interpolation.upper()]
        if self.crop_mode == "squash":
            return np.array(image.resize((width, height), resampling))
        new_w, new_h = self.resized(w, h)
        left, top = round((new_w - width) / 2), round((new_h - height) / 2)
        if max(new_w, new_h) <= MAX_WHOLE_RESIZE * self.resize:
            resized = image.resize((new_w, new_h), resampling)
            return np.array(resized.crop((left, top, left + width, top + height)))
        x, y = w / new_w, h / new_h  # source pixels for each pixel of the resized image
        box = (left * x, top * y, min((left + width) * x, w), min((top + height) * y, h))
        return np.array(image.resize((width, height), resampling, box=box))

    def resized(self, w: int, h: int) -> tuple[int, int]:
        """Return the size, (w, h), to which an image is resized before the crop."""
        height, width = self.size
        if self.crop_mode == "squash":
            return width, height
        new_w, new_h = _resized_image_size(w, h, self.resize)
        if new_w < width or new_h < height:  # the crop is wider than the short side: enlarge
            grow = max(width / new_w, height / new_h)
            new_w, new_h = max(width, round(new_w * grow)), max(height, round(new_h * grow))
        return new_w, new_h

    def enough_pixels(self, w: int, h: int) -> tuple[int, int]:
        """Return a size, (w, h), from which `crop` gives almost the same as from an image of w x h:
        twice the size to which it is resized, as in Pillow's `thumbnail`.

        The image may have to be rotated by its EXIF orientation, so this is enough either way.
        """
        upright, turned = self.resized(w, h), self.resized(h, w)[::-1]
        return REDUCING_GAP * max(upright[0], turned[0]), REDUCING_GAP * max(upright[1], turned[1])

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, height, width, 3] -> float32 [b, c, height, width], on the same device. c is 3,
        or 1 with `grey`."""
        x = normalise_channels(pixels.to(torch.float32), self.mean, self.std, self.grey)
        return x.permute(0, 3, 1, 2)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inverse of the normalisation, in [0, 1]. [b, c, y, x] -> [b, 3, y, x]"""
        return denormalise_channels(x, self.mean, self.std)


@dataclass(frozen=True)
class VideoTransform:
    """Evaluation preprocessing of a video model.

    Args:
        size: Height and width that the model takes, in pixels.
        frames: Frames in a clip.
        stride: Distance between the frames of a clip, in frames at `fps`.
        fps: Frame rate at which `stride` is counted.
        mean, std: Statistics of the channels, for pixels in [0, 1].
        grey: See `ImageTransform`.
    """

    size: tuple[int, int]
    frames: int
    stride: int
    fps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey: bool = False

    default_model: ClassVar[str] = zoo.DEFAULT_VIDEO_MODEL

    @classmethod
    def from_preprocessing(
        cls, preprocessing: Mapping[str, Any] | None, input_size: tuple[int, ...]
    ) -> Self:
        """Return a model's own preprocessing, at its input size.

        Args:
            preprocessing: As in zoo.yaml and hiera.json. Missing values are those of
                hiera_base_16x224.
            input_size: (frames, y, x), in frames and pixels.

        Raises:
            CheckpointError: A value is not usable.
        """
        known = {**zoo.get(cls.default_model).preprocessing, **(preprocessing or {})}
        frames, height, width = input_size
        try:
            mean, std = _channel_statistics(known)
            stride, fps = int(known["stride"]), float(known["fps"])
            if stride < 1 or not 0 < fps < math.inf:
                raise ValueError(f"stride {stride}, fps {fps}")
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"preprocessing is not usable ({error})") from error
        return cls((height, width), frames, stride, fps, mean, std)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [b, t, height, width, 3] in 0..255 -> [b, c, t, height, width], same device. c is
        3, or 1 with `grey`."""
        x = normalise_channels(pixels, self.mean, self.std, self.grey)
        return x.permute(0, 4, 1, 2, 3)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inverse of the normalisation, in [0, 1]. [b, c, t, y, x] -> [b, 3, t, y, x]"""
        return denormalise_channels(x, self.mean, self.std)


def _channel_statistics(
    preprocessing: Mapping[str, Any],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of the three channels.

    Raises:
        TypeError, ValueError: They are not three finite numbers each, with deviations above 0.
    """
    mean, std = (tuple(map(float, preprocessing[name])) for name in ("mean", "std"))
    numbers = (*mean, *std)
    if not len(mean) == len(std) == 3 or not all(map(math.isfinite, numbers)) or min(std) <= 0:
        raise ValueError(f"mean {mean}, std {std}")
    return mean, std


@dataclass(frozen=True)
class CropGrid:
    """Rows and columns of the resized frame that the crops need, and where each crop begins."""

    scaled: tuple[int, int]  # (height, width) of the whole resized frame
    rows: np.ndarray  # of the resized frame, that some crop needs
    columns: np.ndarray
    y: np.ndarray  # the same rows and columns, in source pixels
    x: np.ndarray
    corners: list[tuple[int, int]]  # (top, left) of each crop in the resized frame
    boxes: list[tuple[int, int]]  # the same, in the sampled frame

    @classmethod
    def for_crops(cls, height: int, width: int, size: tuple[int, int], crops: int) -> CropGrid:
        """Place crops of `size` along the long side of a frame of [height, width] pixels."""
        new_h, new_w = scaled_size(height, width, max(size))
        along_x = new_w >= new_h
        tops = crop_offsets(new_h, size[0], 1 if along_x else crops)
        lefts = crop_offsets(new_w, size[1], crops if along_x else 1)
        corners = [(top, left) for top in tops for left in lefts]
        corners = corners[:1] if len(set(corners)) == 1 else corners
        rows = np.unique([top + np.arange(size[0]) for top in tops])
        columns = np.unique([left + np.arange(size[1]) for left in lefts])
        boxes = [
            (int(np.searchsorted(rows, top)), int(np.searchsorted(columns, left)))
            for top, left in corners
        ]
        return cls(
            (new_h, new_w),
            rows,
            columns,
            _pixel_centres(rows, height / new_h),
            _pixel_centres(columns, width / new_w),
            corners,
            boxes,
        )

    def sample(self, pixels: np.ndarray) -> np.ndarray:
        """Resize a frame like torch's interpolate: bilinear, not antialiased, align_corners=False.

        uint8 [height, width, 3] -> float32 [rows, columns, 3]
        """
        return _interpolate_axis(_interpolate_axis(pixels, self.y, 0), self.x, 1)


def resize_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize frames: bilinear, not antialiased, as in SlowFast. Same device.

    uint8 [n, height, width, 3] -> float32 [n, *size, 3]
    """
    planes = frames.permute(0, 3, 1, 2).to(torch.float32)
    resized = functional.interpolate(planes, size, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return (height, width) with the short side at `short`. The long side is rounded down after
    the division, as in SlowFast."""
    if height <= width:
        return short, int(width / height * short)
    return int(height / width * short), short


def denormalise_channels(
    x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Undo the normalisation of channels. [b, c, ...] -> [b, 3, ...]; grey is repeated."""
    shape = (-1, *[1] * (x.dim() - 2))
    centre, scale = (torch.tensor(v, device=x.device).view(shape) for v in (mean, std))
    pixels = x * scale + centre
    return pixels.expand(-1, 3, *pixels.shape[2:]) if x.shape[1] == 1 else pixels


def normalise_channels(
    pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], grey: bool = False
) -> torch.Tensor:
    """Normalise pixels in 0..255. float32 [..., 3] -> [..., 3], or [..., 1] with `grey`."""
    if grey:
        pixels = (pixels * _constant(GREY_WEIGHTS, pixels)).sum(-1, True)
    centre, scale = _constant(mean, pixels), _constant(std, pixels)
    return pixels.div(255).sub(centre).div(scale)


def _constant(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Return values as a tensor on the device of another tensor. It is copied there once, because
    the host waits for such a copy."""
    key = values, like.device
    found = _constants.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):  # gradients may be taken through it later
        made = torch.tensor(values, device=like.device)
    if like.device.type != "cpu" and type(made) is torch.Tensor:  # not within a tracer
        _constants[key] = made
    return made


def _resized_image_size(width: int, height: int, short: int) -> tuple[int, int]:
    """Return (width, height) with the short side at `short`. The long side is truncated, not
    rounded, as in torchvision."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _pixel_centres(positions: np.ndarray, scale: float) -> np.ndarray:
    """Map pixels of the resized frame to coordinates in the source frame. -> float32"""
    return np.maximum((positions + 0.5) * scale - 0.5, 0).astype(np.float32)


def _interpolate_axis(pixels: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Interpolate linearly between neighbours along an axis. -> float32"""
    low = np.minimum(positions.astype(np.int64), pixels.shape[axis] - 1)
    high = np.minimum(low + 1, pixels.shape[axis] - 1)
    weight = (positions - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    a, b = pixels.take(low, axis).astype(np.float32), pixels.take(high, axis).astype(np.float32)
    return a + (b - a) * weight
