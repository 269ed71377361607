"""Turn images and videos into the tensor that a model takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import InputError, UsageError
from . import memory
from .clip_reader import ClipView, read_segments, unresized
from .clip_sampling import Sampling
from .decoders.device_images import crop_on_device
from .image_reader import open_image
from .sources import Source, is_folder
from .transforms import (
    ImageTransform,
    MediaInputs,
    VideoTransform,
    check_channels,
    transform_for,
)
from .video_files.animation_reader import kind_for_model

CENTRE = Sampling(clips=1, crops=1)


def model_input(model: nn.Module, source: MediaInputs) -> torch.Tensor:
    """Return the tensor that a model takes, from images or videos; see `PretrainedMixin.transform`.

    Raises:
        InputError: An input cannot be read, or is of the other kind.
        UsageError: An input is of another type, or the model takes neither images nor videos.
    """
    check_channels(model)
    transform = transform_for(model)
    views = [_view(item, transform) for item in _items(source, transform)]
    if not views:
        raise UsageError("there are no inputs", "give an image, a video, or several of them")
    weight = next(model.parameters())
    # The weights are on no device when a large model is built before they are loaded.
    device = views[0].device if weight.is_meta else weight.device
    if any(view.device != views[0].device for view in views):
        views = [view.to(device) for view in views]
    pixels = torch.stack(views).to(device)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return transform.normalise(pixels).to(dtype)


def _items(source: MediaInputs, transform: ImageTransform | VideoTransform) -> list[Source]:
    """Return a source for each input."""
    given: Any = source
    if memory.is_batch(source, "image" if isinstance(transform, ImageTransform) else "video"):
        given = list(given)
    elif memory.is_single(source):
        given = [source]
    elif not isinstance(source, Iterable):
        memory.as_pixels(source)  # raises an error about its type
    return [
        Source(str(item), path=Path(item))
        if isinstance(item, str | Path)
        else memory.as_source(item, index)
        for index, item in enumerate(given)
    ]


def _view(source: Source, transform: ImageTransform | VideoTransform) -> torch.Tensor:
    """Return what the model sees of an input: an image's crop, or a video's centre clip.

    -> uint8 [height, width, 3] or float32 [frames, height, width, 3], where the input lies
    """
    if source.path is not None and is_folder(source.path):
        raise UsageError(f"{source.name} is a folder", "give a list of its files")
    try:
        if source.error is not None:
            raise source.error
        takes_images = isinstance(transform, ImageTransform)
        content: Any = source.content() if source.pixels is None else source.pixels
        if isinstance(content, np.ndarray | torch.Tensor):
            kind = "video" if content.ndim == 4 else "image"
        else:
            kind = kind_for_model(content, source.name, takes_videos=not takes_images)
        if (kind == "image") != takes_images:
            raise InputError(
                "a picture, and the model takes video clips"
                if kind == "image"
                else "a video, and the model takes pictures",
                "frames are one array, [frames, height, width, channels]"
                if kind == "image"
                else "give a list of its frames, or use a model for videos",
            )
        if isinstance(transform, ImageTransform):
            return _crop(content, transform)
        _, segments = read_segments(content, CENTRE, transform)
        (view,) = unresized(next(segments).views)
        return view.tensor() if isinstance(view, ClipView) else torch.as_tensor(view)
    except InputError as error:
        raise InputError(f"{source.name}: {error.message}", error.hint) from error


def _crop(content: Any, transform: ImageTransform) -> torch.Tensor:
    if isinstance(content, torch.Tensor):
        cropped = crop_on_device(transform, content)
        if cropped is not None:
            return cropped
        content = content.cpu().numpy()
    is_array = isinstance(content, np.ndarray)
    image = Image.fromarray(content) if is_array else open_image(content)[0]
    return torch.from_numpy(transform.crop(image))
