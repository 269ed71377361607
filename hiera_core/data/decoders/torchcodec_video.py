"""Frames of videos decoded by torchcodec, with the frame numbers of `Video`.

torchcodec does not say which frames are damaged. PyAV reads a file in which it finds an error,
whose frames have no time stamps, or whose first frame looks different, as when it is rotated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError, first_line
from ..image_reader import MAX_PIXELS
from ..video_files.decoder_threads import DecoderThreads
from ..video_files.video_reader import DecodedFrame, Video, check_damage

FRAMES_AT_A_TIME = 8  # that are in memory
MAX_DIFFERENCE = 8  # levels of 255, on average; decoders convert colours in different ways


def check_torchcodec() -> None:
    """Check that torchcodec can be used.

    Raises:
        UsageError: It is not installed, or does not find FFmpeg's libraries.
    """
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "decoder torchcodec needs torchcodec, which is not installed",
            "pip install 'hiera-toolkit[torchcodec]'",
        ) from error
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"torchcodec cannot be loaded ({first_line(error):.80})",
            "install FFmpeg with its shared libraries, and a torchcodec for this PyTorch",
        ) from error


class TorchcodecVideo(Video):
    """A `Video` whose frames torchcodec decodes. PyAV opens it, checks it, and counts its frames.

    Args:
        source, max_pixels, threads: See `Video`.
    """

    def __init__(
        self,
        source: Path | bytes,
        max_pixels: int = MAX_PIXELS,
        threads: DecoderThreads | None = None,
    ) -> None:
        super().__init__(source, max_pixels, threads)
        self._decoder: Any = None
        if not self._timeline.in_order and self._timeline.present in (None, self.frames):
            self._decoder = self._open_decoder()

    def read(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield frames by index, as `Video.read` does."""
        if self._timeline.present is not None:
            check_damage(self.frames - self._timeline.present, self.frames)
        if self._decoder is not None and not self._agrees(indices[:1]):
            self._decoder = None
        left = iter(indices)
        while chunk := list(itertools.islice(left, FRAMES_AT_A_TIME)):
            frames = self._decode_chunk(chunk)
            if frames is None:
                yield from super().read([*chunk, *left])
                return
            yield from frames

    def _open_decoder(self) -> Any:
        """Return torchcodec's decoder of the stream that PyAV has chosen, or None if it cannot
        open it."""
        from torchcodec.decoders import VideoDecoder

        try:
            return VideoDecoder(
                self._file if isinstance(self._file, bytes) else str(self._file.absolute()),
                stream_index=self._stream.index,
                dimension_order="NHWC",
                num_ffmpeg_threads=self._thread_count,
                seek_mode="exact",
            )
        except (RuntimeError, ValueError):
            return None

    def _decode_chunk(self, indices: Sequence[int]) -> list[DecodedFrame] | None:
        """Return some frames, or None if PyAV has to read them."""
        decoder = self._decoder
        if decoder is None:
            return None
        first, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        # The tolerance is that of `Video`. Beyond the last frame, it is shown on.
        times = [self._timeline.start + i / self.fps + self._tolerance for i in indices]
        if times and max(times) > end + 1 / self.fps:  # frames are missing at the end
            self._decoder = None
            return None
        shown = [min(max(time, first), end - 1e-6) for time in times]
        try:
            batch = decoder.get_frames_played_at(shown).data.numpy()
        except (RuntimeError, ValueError, IndexError):
            self._decoder = None
            return None
        return [
            DecodedFrame(index, pixels, True) for index, pixels in zip(indices, batch, strict=True)
        ]

    def _agrees(self, indices: Sequence[int]) -> bool:
        """Return whether PyAV sees the same frames."""
        expected, found = list(super().read(indices)), self._decode_chunk(indices)
        for one, other in zip(expected, found or [], strict=False):
            if one.pixels.shape != other.pixels.shape or not one.intact:
                return False
            difference = one.pixels.astype(np.int16) - other.pixels
            if np.abs(difference).mean() > MAX_DIFFERENCE:
                return False
        return found is not None
