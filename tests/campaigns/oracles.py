"""Compare what Hiera reads from a file with what Pillow and PyAV alone read from it.

    python -m tests.campaigns.oracles < PATHS > VERDICTS

It reads a path per line and writes a line of JSON for each: {"status": "ok" or "error", "reason":
the error's message, "wrong": what differs, or null}.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from hiera_core.data.image_reader import open_image
from hiera_core.data.media_types import kind_of
from hiera_core.data.video_files.video_reader import OPTIONS, Video
from hiera_core.errors import InputError

MEMORY_LIMIT = 6 * 2**30  # bytes of address space, so that a mistake does not stop the machine
MAX_FRAMES = 300  # of a video that are compared
DEEP_GREY = ("I", "F", "I;16", "I;16B", "I;16L")


def check(path: Path) -> dict[str, Any]:
    """Return the verdict on a file."""
    try:
        kind = kind_of(path, str(path))
        wrong = check_picture(path) if kind == "image" else check_video(path)
    except InputError as error:
        return {"status": "error", "reason": error.message, "wrong": None}
    except Exception as error:
        return {"status": "error", "reason": "", "wrong": f"{type(error).__name__}: {error}"}
    return {"status": "ok", "reason": "", "wrong": wrong}


# Pictures ---------------------------------------------------------------------------------------


def check_picture(path: Path) -> str | None:
    """Compare a picture with Pillow's decoding of it. -> what differs"""
    ours = np.asarray(open_image(path)[0])
    with Image.open(path) as image:
        image.load()
        try:
            plain = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF says nothing about the orientation
            plain = image
    if (plain.height, plain.width) != ours.shape[:2]:
        return f"{ours.shape[1]}x{ours.shape[0]} pixels instead of {plain.width}x{plain.height}"
    if plain.mode in DEEP_GREY:
        return None if is_rising(np.asarray(plain), ours) else "greys in another order"
    if "transparency" in plain.info or plain.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = (plain.convert("LA") if plain.mode == "La" else plain).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        theirs, tolerance = np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), 1
    else:
        theirs, tolerance = np.asarray(plain.convert("RGB")), 0
    difference = np.abs(ours.astype(np.int16) - theirs).max(initial=0)
    return f"pixels differ by {difference}" if difference > tolerance else None


def is_rising(values: np.ndarray, ours: np.ndarray) -> bool:
    """Return whether equal values have equal greys, and larger values are not darker."""
    if values.dtype == np.int32 and values.min() < 0 and not (ours[values < 0] == 0).all():
        values = values.view(np.uint32)  # Pillow reads large unsigned values as negative ones
    order = np.argsort(values, axis=None, kind="stable")
    values, greys = values.ravel()[order], ours[..., 0].ravel()[order].astype(np.int16)
    steps = np.diff(greys)
    return bool((steps >= 0).all() and (steps[np.diff(values) == 0] == 0).all())


# Videos -----------------------------------------------------------------------------------------


def check_video(path: Path) -> str | None:
    """Compare a video with decoding it from start to end. -> what differs"""
    with Video(path) as video:
        times, frames = decode_all(path, video)
        wanted = min(video.frames, MAX_FRAMES)
        random = np.random.default_rng(0)
        few = random.integers(0, wanted, 12).tolist()
        for indices in (range(0, wanted, max(1, wanted // 24)), few, sorted(few, reverse=True)):
            shown = list(video.read(indices))
            damaged = sum(not frame.intact for frame in shown)
            if damaged > 0.1 * len(shown):
                raise InputError(f"{damaged} of {len(shown)} frames are damaged or lost")
            for frame in shown:
                expected = frame_at(times, frame.index / video.fps, 0.25 / video.fps)
                if frame.intact and digest(frame.pixels) != frames[expected]:
                    return f"frame {frame.index} is not frame {expected} of the file"
        complete = len(frames) < MAX_FRAMES
        if complete and abs(video.frames - len(frames)) > max(1, 0.1 * video.frames):
            return f"{video.frames} frames, but {len(frames)} can be decoded"
    return None


def decode_all(path: Path, video: Video) -> tuple[np.ndarray, list[bytes]]:
    """Decode a video from its start. -> the time of each frame in seconds, and its digest

    Frames without usable time stamps follow one another at the rate of `video`.
    """
    stamps, frames, size = [], [], (video.width, video.height)
    with av.open(str(path), options=OPTIONS, metadata_errors="replace") as container:
        cover = av.stream.Disposition.attached_pic
        stream = next(s for s in container.streams.video if not s.disposition & cover)
        stream.thread_type = "NONE"  # some decoders of FFmpeg give other pixels in several threads
        for frame in itertools.islice(_decode(container, stream), MAX_FRAMES):
            stamps.append(frame.pts)
            pixels = frame.reformat(*size, "rgb24").to_ndarray()
            frames.append(digest(np.rot90(pixels, round(frame.rotation / 90))))
        tick, format = float(stream.time_base or 1), container.format.name
    if not frames:
        raise InputError("no frame can be decoded")
    ordered = None not in stamps and all(a < b for a, b in itertools.pairwise(stamps))
    if not ordered or format in ("mpeg", "mpegvideo", "h264", "hevc", "m4v"):
        return np.arange(len(frames)) / video.fps, frames
    return (np.asarray(stamps) - stamps[0]) * tick, frames


def _decode(container: Any, stream: Any) -> Any:
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            with contextlib.suppress(av.FFmpegError):
                yield from packet.decode()


def digest(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).data).digest()


def frame_at(times: np.ndarray, time: float, tolerance: float) -> int:
    """Return the last frame that begins at or before `time`."""
    return max(0, int(np.searchsorted(times, time + tolerance + 1e-6, side="right")) - 1)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    for line in sys.stdin.buffer:
        path = Path(line.rstrip(b"\n").decode(errors="surrogateescape"))
        print(json.dumps(check(path)), flush=True)


if __name__ == "__main__":
    main()
