"""Real pictures and clips to compare two models on."""

from __future__ import annotations

import logging
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
# Left, top, width and height of views of the photograph, as shares of its own.
VIEWS = (
    (0, 0, 1, 1),
    (0, 0, 0.7, 0.6),
    (0.3, 0, 0.7, 0.5),
    (0.1, 0.4, 0.6, 0.6),
    (0.4, 0.5, 0.6, 0.5),
)
BATCH = 4  # pictures; clips go one by one


class SampleInputs:
    """Pictures, preprocessed for a model.

    Args:
        pictures: RGB pictures.
        transform: the model's preprocessing.
        description: what they are, in words.
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
        """The same for a model with another input size."""
        transform = type(self.transform).from_preprocessing(vars(self.transform), tuple(size))
        return SampleInputs(self.pictures, transform, self.chans, self.description)

    def batches(self) -> Iterator[torch.Tensor]:
        """[b, chans, (t,) y, x], normalised."""
        for first in range(0, len(self.pictures), step := 1 if self._is_video else BATCH):
            views = [self._view(picture) for picture in self.pictures[first : first + step]]
            x = self.transform.normalise(torch.from_numpy(np.stack(views)))
            if x.shape[1] != self.chans:  # models of other channels: anything real will do
                x = x.mean(1, keepdim=True).expand(-1, self.chans, *x.shape[2:])
            yield x.contiguous()

    def _view(self, picture: Image.Image) -> np.ndarray:
        if not self._is_video:
            return np.asarray(self.transform.crop(picture))
        return _pan(picture, self.transform)


def gather_samples(transform: Any, chans: int, pictures: Sequence[str] = ()) -> SampleInputs:
    """The user's pictures, or what is at hand: a photograph that ships with matplotlib, seen in
    several views, and the pictures in the box. Video models see a camera that pans over them.

    Raises:
        UsageError: none of the user's pictures can be read.
    """
    if pictures:
        found = list(_users(pictures))
        if not found:
            raise UsageError("no picture to compare on", "name pictures or folders of them")
        return SampleInputs(found, transform, chans, f"{len(found)} pictures")
    photo = open_image(SAMPLES / "cat.jpg")[0]
    digits = [open_image(path)[0] for path in sorted(SAMPLES.glob("*.png"))]
    if isinstance(transform, VideoTransform):
        return SampleInputs([photo, digits[1]], transform, chans, "2 clips panned over pictures")
    views = [_part(photo, view) for view in VIEWS]
    what = f"{len(views)} views of a photograph, {len(digits)} shipped digits"
    return SampleInputs(views + digits, transform, chans, what)


def _users(pictures: Sequence[str]) -> Iterator[Image.Image]:
    for source in sources.expand(pictures):
        try:
            yield open_image(source.content())[0]
        except InputError as error:
            log.warning("%s: %s", source.name, error)


def _part(photo: Image.Image, view: tuple[float, ...]) -> Image.Image:
    (width, height), (left, top, w, h) = photo.size, view
    box = (left * width, top * height, (left + w) * width, (top + h) * height)
    return photo.crop(tuple(map(round, box)))  # type: ignore[arg-type]


def _pan(picture: Image.Image, transform: VideoTransform) -> np.ndarray:
    """Frames of a window that moves over the picture. -> float32 [t, y, x, 3], 0..255"""
    still = ImageTransform(transform.size, min(transform.size), transform.mean, transform.std)
    frames = []
    for frame in range(transform.frames):
        share = 0.3 * frame / max(transform.frames - 1, 1)
        frames.append(still.crop(_part(picture, (share, share / 2, 0.7, 0.7))))
    return np.stack(frames).astype(np.float32)
