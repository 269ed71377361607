"""Real images and clips to compare the outputs of two models on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import zoo
from ..data import sources
from ..data.image_reader import open_image
from ..data.transforms import ImageTransform, VideoTransform
from ..errors import InputError, UsageError

log = logging.getLogger("hiera")

SAMPLES = zoo.ASSETS / "samples"
# Views of the photograph: left, top, width and height, as fractions of its size.
VIEWS = (
    (0, 0, 1, 1),
    (0, 0, 0.7, 0.6),
    (0.3, 0, 0.7, 0.5),
    (0.1, 0.4, 0.6, 0.6),
    (0.4, 0.5, 0.6, 0.5),
)
BATCH_SIZE = 4  # of images; clips run one by one
MANY_PIXELS = 512**2  # inputs of more pixels are compared on two pictures


class SampleInputs:
    """Pictures, and their preprocessing for a model.

    Args:
        pictures: RGB pictures.
        transform: Preprocessing of the model.
        chans: Input channels of the model.
        description: Description of the pictures, for the user.
    """

    def __init__(
        self, pictures: Sequence[Image.Image], transform: Any, chans: int, description: str
    ) -> None:
        self.pictures, self.transform, self.chans = pictures, transform, chans
        self.description = description
        self._is_video = isinstance(transform, VideoTransform)

    def __len__(self) -> int:
        return len(self.pictures)

    def at(self, size: Sequence[int]) -> SampleInputs:
        """Return the same samples for a model with another input size."""
        transform = type(self.transform).from_preprocessing(vars(self.transform), tuple(size))
        return SampleInputs(self.pictures, transform, self.chans, self.description)

    def batches(self, largest: int | None = None) -> Iterator[torch.Tensor]:
        """Yield normalised batches, [b, chans, (t,) y, x].

        Args:
            largest: Size of the largest batch, if it has to be small.
        """
        step = min(1 if self._is_video else BATCH_SIZE, largest or BATCH_SIZE)
        for first in range(0, len(self.pictures), step):
            views = [self._view(picture) for picture in self.pictures[first : first + step]]
            x = self.transform.normalise(torch.from_numpy(np.stack(views)))
            if x.shape[1] != self.chans:  # repeat the grey picture in every channel
                x = x.mean(1, keepdim=True).expand(-1, self.chans, *x.shape[2:])
            yield x.contiguous()

    def _view(self, picture: Image.Image) -> np.ndarray:
        if not self._is_video:
            return np.asarray(self.transform.crop(picture))
        return _pan(picture, self.transform)


def gather_samples(transform: Any, chans: int, pictures: Sequence[str] = ()) -> SampleInputs:
    """Return samples to compare outputs on.

    Args:
        transform: Preprocessing of the model. Video models get clips of a view that pans over a
            picture.
        chans: Input channels of the model.
        pictures: Image files or folders of the user. By default, use the samples of this package:
            several views of a photograph, and digits.

    Raises:
        UsageError: None of the user's pictures can be read.
    """
    if pictures:
        opened = list(_open_pictures(pictures))
        if not opened:
            raise UsageError(
                "none of the pictures to compare on can be read",
                "give image files, or folders that hold some",
            )
        return SampleInputs(opened, transform, chans, f"{len(opened)} pictures")
    photo = open_image(SAMPLES / "cat.jpg")[0]
    digits = [open_image(path)[0] for path in sorted(SAMPLES.glob("*.png"))]
    if isinstance(transform, VideoTransform):
        return SampleInputs([photo, digits[1]], transform, chans, "2 clips panned over pictures")
    if math.prod(transform.size) > MANY_PIXELS:
        return SampleInputs([photo, digits[1]], transform, chans, "a photograph, a bundled digit")
    views = [_crop_view(photo, view) for view in VIEWS]
    description = f"{len(views)} views of a photograph, {len(digits)} bundled digits"
    return SampleInputs(views + digits, transform, chans, description)


def _open_pictures(pictures: Sequence[str]) -> Iterator[Image.Image]:
    """Yield the pictures that can be read, and log a warning for each of the others."""
    for source in sources.expand(pictures):
        try:
            yield open_image(source.content())[0]
        except InputError as error:
            log.warning("%s: %s", source.name, error)


def _crop_view(photo: Image.Image, view: tuple[float, ...]) -> Image.Image:
    """Return the part of a photo that a view, in fractions of its size, covers."""
    (width, height), (left, top, w, h) = photo.size, view
    box = (left * width, top * height, (left + w) * width, (top + h) * height)
    return photo.crop(tuple(map(round, box)))  # type: ignore[arg-type]


def _pan(picture: Image.Image, transform: VideoTransform) -> np.ndarray:
    """Return the frames of a view that moves over a picture. -> float32 [t, y, x, 3], 0..255"""
    still = ImageTransform(transform.size, min(transform.size), transform.mean, transform.std)
    frames = []
    for frame in range(transform.frames):
        left = 0.3 * frame / max(transform.frames - 1, 1)
        frames.append(still.crop(_crop_view(picture, (left, left / 2, 0.7, 0.7))))
    return np.stack(frames).astype(np.float32)
