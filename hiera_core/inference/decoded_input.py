"""An input between the worker that decodes it and the record of its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..data.clip_reader import DecodedSegment
from ..data.clip_sampling import VideoReport
from ..data.sources import Source
from ..errors import HieraError, InputError, check_type
from ..records import Record
from .launched import Started
from .transfer import Pixels as Pixels


@dataclass
class DecodedInput:
    """An input on its way to the model: the pixels of an image, the segments of a video, or
    neither if the record is finished."""

    record: Record
    pixels: Pixels | None = None
    report: VideoReport | None = None
    segments: Iterator[DecodedSegment] | None = None


@dataclass
class StartedBatch:
    """Inputs, and the results of the images among them, which the device may still compute."""

    inputs: list[DecodedInput]
    started: Started[Any]


def on_host(pixels: Pixels) -> np.ndarray:
    """Return pixels as an array."""
    return pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels


def checked_sources(inputs: Iterable[Source]) -> Iterator[Source]:
    """Yield the sources.

    Raises:
        UsageError: One of them is something else, such as a path.
    """
    for item in [inputs] if isinstance(inputs, str | Path) else inputs:
        check_type("an input", item, Source, "sources: sources.expand([path, ...]) makes them")
        yield cast(Source, item)


def with_input_errors(segments: Iterator[DecodedSegment]) -> Iterator[DecodedSegment]:
    """Convert every decoding error to an InputError, so that the other inputs continue."""
    try:
        yield from segments
    except HieraError:
        raise
    except Exception as error:
        raise InputError(str(error) or type(error).__name__) from error
