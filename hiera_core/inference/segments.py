"""Run the segments of a video through a model, as many at a time as fill a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from ..data.clip_reader import DecodedSegment
from .batching import BatchRunner

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
    waiting: list[DecodedSegment] = []
    room = size = min(runner.batch_size, MAX_VIEWS)
    for segment in segments:
        if waiting and len(segment.views) > room:
            yield from _run_together(runner, waiting)
            waiting, room = [], size
        waiting.append(segment)
        room -= len(segment.views)
        if room <= 0:
            yield from _run_together(runner, waiting)
            waiting, room = [], size
    yield from _run_together(runner, waiting)


def _run_together(
    runner: BatchRunner[Any, Result], segments: Sequence[DecodedSegment]
) -> Iterator[tuple[DecodedSegment, list[Result]]]:
    # The views of a single segment are cut one by one; a list holds them all.
    views = [v for s in segments for v in s.views] if len(segments) > 1 else None
    results = iter(runner.run(views or segments[0].views) if segments else ())
    for segment in segments:
        yield segment, [next(results) for _ in range(len(segment.views))]
