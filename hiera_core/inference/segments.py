"""Run the segments of a video through a model, as many at a time as fill a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..data.clip_reader import DecodedSegment, unresized
from ..data.clip_sampling import Sampling
from ..errors import UsageError
from .batching import BatchRunner
from .launched import Started

Result = TypeVar("Result")
MAX_VIEWS = 64  # that are held at a time, however large the batches are


def run_segments(
    runner: BatchRunner[Any, Result], segments: Iterator[DecodedSegment]
) -> Iterator[tuple[DecodedSegment, list[Result]]]:
    """Yield each segment with the results of its views, in order.

    Memory does not grow with the number of segments.

    Raises:
        InputError: From `segments`, if too many frames are damaged.
        DeviceError: There is not enough memory for a single view.
    """
    behind: list[_Running[Result]] = []
    for together in _full_batches(segments, min(runner.batch_size, MAX_VIEWS)):
        # The device has the next batch before the results of the last one are looked at.
        running = _start(runner, together)
        while len(behind) >= getattr(runner, "depth", 1):
            yield from behind.pop(0).results()
        behind.append(running)
        while behind and not running.started.is_running:
            yield from behind.pop(0).results()
    for running in behind:
        yield from running.results()


def _full_batches(segments: Iterator[DecodedSegment], size: int) -> Iterator[list[DecodedSegment]]:
    """Yield segments with at most `size` views together, or a single segment with more."""
    waiting: list[DecodedSegment] = []
    room = size
    for segment in segments:
        if waiting and len(segment.views) > room:
            yield waiting
            waiting, room = [], size
        waiting.append(segment)
        room -= len(segment.views)
        if room <= 0:
            yield waiting
            waiting, room = [], size
    if waiting:
        yield waiting


@dataclass(frozen=True)
class _Running(Generic[Result]):
    """Segments, and the results of their views."""

    segments: list[DecodedSegment]
    started: Started[Result]

    def results(self) -> Iterator[tuple[DecodedSegment, list[Result]]]:
        results = iter(self.started.results())
        for segment in self.segments:
            yield segment, [next(results) for _ in range(len(segment.views))]


def _start(runner: BatchRunner[Any, Result], segments: list[DecodedSegment]) -> _Running[Result]:
    views: Any = [view for segment in segments for view in unresized(segment.views)]
    overlaps = isinstance(runner, BatchRunner) and runner.overlaps
    return _Running(segments, runner.start(views) if overlaps else Started(runner.run(views)))


def check_sampling(runner: BatchRunner[Any, Any], sampling: Sampling) -> None:
    """Check that a model can see what the sampling asks for.

    Raises:
        UsageError: Segments for an image model, or single frames for a video model.
    """
    if sampling.segments is not None and runner.kind == "image":
        raise UsageError(
            f"{runner.name} takes pictures, and segments are for video models",
            "use --every SECONDS, or a video model such as hiera_base_16x224",
        )
    if sampling.every is not None and runner.kind == "video":
        raise UsageError(
            f"{runner.name} takes clips, and single frames are for image models",
            "use --segments SECONDS, or an image model such as hiera_base_224",
        )
