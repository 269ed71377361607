"""Read animated images (GIF, WebP, PNG, AVIF) as videos."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np

from ...errors import InputError
from ...records import Kind
from ..image_formats import open_header
from ..image_reader import MAX_PIXELS, as_input_errors, open_file, to_upright_rgb
from ..media_types import SIGNATURE_BYTES, kind_of, sniff_kind
from .decoder_threads import DecoderThreads
from .video_reader import DecodedFrame, Video, check_damage

VideoOpener: TypeAlias = Callable[[Path | bytes, int, DecoderThreads | None], Video]
FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
# Browsers show frames without a duration, and those of 10 ms or less, for this long.
DEFAULT_MS = 100.0
SHORTEST_MS = 10.0
MAX_TOTAL = 100  # pixels in all frames, in multiples of the limit for one


class Animation:
    """An open animation, with the interface of `Video`: frame `i` is what a viewer sees at time
    `i / fps`, where `fps` is the average rate.

    All frames are decoded when it is opened, one at a time, because their durations stand between
    them.

    Args:
        source: A path, or the bytes of the file.
        max_pixels: An animation with more pixels per frame is refused, or one with more than
            `MAX_TOTAL` times as many in all frames.

    Raises:
        InputError: The file is missing, damaged, too large, or not an image; or more than a tenth
            of its frames cannot be decoded.
    """

    declares_length = True

    def __init__(self, source: Path | bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._source, self._max_pixels = source, max_pixels
        self._file = contextlib.ExitStack()
        self.notes: tuple[str, ...] = ()
        try:
            with as_input_errors():
                self._open()
                self.width, self.height = self._image.size
                self._declared = int(getattr(self._image, "n_frames", 1)) - self._first
                self._starts = self._measure()
                present = len(self._starts) - 1
                # Before segments are counted: a header may declare any number of frames.
                check_damage(self._declared - present, self._declared)
        except BaseException:
            self.close()
            raise
        self.frames = self._declared
        self.fps = self.frames / self.duration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def duration(self) -> float:
        """Duration in seconds. Frames that cannot be decoded count with the average of others."""
        present = len(self._starts) - 1
        return self._starts[-1] / present * self._declared

    def read(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield frames by index. Ascending order is fast.

        Raises:
            InputError: A frame cannot be decoded.
        """
        present = len(self._starts) - 1
        for index in indices:
            shown = bisect.bisect_right(self._starts, index / self.fps + 1e-6) - 1
            with as_input_errors():
                self._show(min(shown, present - 1))
                pixels = np.asarray(to_upright_rgb(self._image, []))
            yield DecodedFrame(index, pixels, shown < present)

    def _open(self) -> None:
        """Open the file at its first frame, and close it if it was open."""
        self._file.close()
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_file(self._source))
            name = "" if isinstance(self._source, bytes) else str(self._source)
            image = open_header(file, name, self._max_pixels, animated=True)
            self._image = stack.enter_context(image)
            self._file = stack.pop_all()
        # A PNG file may begin with another image, for programs that do not support animations.
        self._first = int(getattr(image, "default_image", False))

    def _check_total(self) -> None:
        """Check the size of all frames together: a frame of a few bytes can take a second."""
        width, height = self._image.size
        if width * height * self._declared > MAX_TOTAL * self._max_pixels:
            raise InputError(
                f"{self._declared} frames of {width}x{height} pixels take too long to decode",
                "convert it to a video file, or raise --max-pixels if you trust it",
            )

    def _show(self, number: int) -> None:
        """Decode a frame."""
        if self._first + number < self._image.tell():
            self._open()  # not all of Pillow's readers can go back
        self._image.seek(self._first + number)
        self._image.load()

    def _measure(self) -> list[float]:
        """Return the times in seconds at which the frames begin, and at which the last one ends.

        They stop at a frame that cannot be decoded.
        """
        starts = [0.0]
        for number in range(self._declared):
            try:
                self._show(number)
            except Exception:  # Pillow raises a dozen types on damaged files
                if number == 0:
                    raise
                break
            self._check_total()
            duration = float(self._image.info.get("duration") or 0.0)
            starts.append(starts[-1] + (duration if duration > SHORTEST_MS else DEFAULT_MS) / 1000)
        return starts


def open_video(
    source: Path | bytes,
    max_pixels: int = MAX_PIXELS,
    threads: DecoderThreads | None = None,
    reader: VideoOpener = Video,
) -> Video | Animation:
    """Open a video file or an animation.

    Args:
        source, max_pixels, threads: See `Video`.
        reader: What opens a video file.

    Raises:
        InputError: See `Video` and `Animation`.
    """
    start = source[:SIGNATURE_BYTES] if isinstance(source, bytes) else _first_bytes(source)
    is_image = sniff_kind(start) == "image"
    return Animation(source, max_pixels) if is_image else reader(source, max_pixels, threads)


def kind_for_model(content: Path | bytes, name: str, *, takes_videos: bool) -> Kind:
    """Return the kind of an input. An animation is a video for models that take videos, and an
    image for all others, which see its first frame.

    Raises:
        InputError: See `media_types.kind_of`.
    """
    kind = kind_of(content, name)
    return "video" if kind == "image" and takes_videos and is_animation(content) else kind


def is_animation(content: Path | bytes) -> bool:
    """Return whether an image file has several frames, by what it declares."""
    try:
        name = "" if isinstance(content, bytes) else str(content)
        with (
            open_file(content) as file,
            open_header(file, name, MAX_PIXELS, animated=True) as image,
        ):
            return image.format in FORMATS and int(getattr(image, "n_frames", 1)) > 1
    except Exception:  # reading it gives the reason
        return False


def _first_bytes(path: Path) -> bytes:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return file.read(SIGNATURE_BYTES)
    return b""
