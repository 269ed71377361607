"""A decoded input as bytes: for workers that decode in one process, and compute in another.

The bytes are a header in JSON and the pixels as they are in memory. Reading them runs no code, so
they may come from a file or a network, where a pickle must not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ...data.clip_reader import ClipViews, DecodedSegment
from ...data.clip_sampling import VideoReport
from ...data.sources import Source
from ...errors import HieraError, InputError, OutputError
from ...records import Kind, Record, Status, error_json
from ..decoded_input import DecodedInput, on_host

MAGIC = b"hiera decoded 1\n"
LENGTH_BYTES = 8  # of the number that says how long the header is
DTYPES = ("uint8", "float32", "int64")
# What reading damaged bytes raises.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)


def to_bytes(decoded: DecodedInput) -> bytes:
    """Return a decoded input as bytes. The segments of a video are read now."""
    header: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    if decoded.pixels is not None:
        header["image"] = True
        arrays = [on_host(decoded.pixels)]
    elif decoded.segments is not None:
        try:
            header["segments"] = [_segment_header(s, arrays) for s in decoded.segments]
        except InputError as error:
            header["segments"], arrays = [], []
            header["error"] = error_json(error)
        if decoded.report is not None:
            header["report"] = dataclasses.asdict(decoded.report)
    return _pack({"record": _record_header(decoded.record), **header}, arrays)


def source_to_bytes(source: Source, index: int) -> bytes:
    """Return an input that is decoded later, where the model is: a path, or the content itself."""
    if source.error is not None or source.pixels is not None:
        raise ValueError(f"{source.name} has no path and no content")
    header = {
        "name": source.name,
        "path": None if source.path is None else str(source.path),
        "url": source.url,
        "span": source.span,
        "in_list": source.in_list,
        "id": source.id,
        "public_only": source.public_only,
        "index": index,
    }
    data = [] if source.data is None else [np.frombuffer(source.data, np.uint8)]
    return _pack({"source": header}, data)


def from_bytes(content: bytes) -> DecodedInput | Source:
    """Return what `to_bytes` or `source_to_bytes` was given.

    Raises:
        InputError: The bytes are others, or damaged.
    """
    try:
        header, arrays = _unpack(content)
        if "source" in header:
            return _read_source(header["source"], arrays)
        return _read_decoded(header, arrays)
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"not the bytes of a decoded input ({reason:.80})", "write them with Decoder"
        ) from error


def _read_source(known: dict[str, Any], arrays: list[np.ndarray]) -> Source:
    return Source(
        str(known["name"]),
        path=None if known["path"] is None else Path(known["path"]),
        url=known["url"],
        span=None if known["span"] is None else (int(known["span"][0]), int(known["span"][1])),
        data=arrays[0].tobytes() if arrays else None,
        in_list=bool(known["in_list"]),
        id=known["id"],
        public_only=bool(known["public_only"]),
        position=int(known["index"]),
    )


def _read_decoded(header: dict[str, Any], arrays: list[np.ndarray]) -> DecodedInput:
    record = _read_record(header["record"])
    if "image" in header:
        if arrays[0].ndim != 3:
            raise ValueError(f"an image of shape {arrays[0].shape}")
        return DecodedInput(record, arrays[0])
    if "segments" not in header:
        return DecodedInput(record)
    left = iter(arrays)
    segments = [_read_segment(known, next(left), next(left)) for known in header["segments"]]
    error = _read_error(header["error"]) if "error" in header else None
    if not segments and error is None:
        raise ValueError("a video without segments")
    report = None
    if "report" in header:
        report = VideoReport(**header["report"])
        report.notes = tuple(report.notes)
    return DecodedInput(record, report=report, segments=_then_raise(segments, error))


def _then_raise(
    segments: list[DecodedSegment], error: HieraError | None
) -> Iterator[DecodedSegment]:
    yield from segments
    if error is not None:
        raise error


# Records ------------------------------------------------------------------------------------------


def _record_header(record: Record) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in RECORD_FIELDS}
    return {**values, "error": None if record.error is None else error_json(record.error)}


RECORD_FIELDS = ("input", "index", "model", "kind", "status", "notes", "video", "id")


def _read_record(known: dict[str, Any]) -> Record:
    record = Record(**{name: known[name] for name in RECORD_FIELDS})
    texts = (record.input, record.model, *record.notes)
    is_named = all(isinstance(text, str) for text in texts) and isinstance(record.notes, list)
    is_known = record.kind in get_args(Kind) and record.status in get_args(Status)
    if not (is_named and is_known and type(record.index) is int):
        raise ValueError("its record is none")
    if known["error"] is not None:
        record.error = _read_error(known["error"])
    return record


def _read_error(known: dict[str, str]) -> HieraError:
    kinds: dict[str, type[HieraError]] = {"OutputError": OutputError}
    return kinds.get(known["type"], InputError)(known["message"], known["hint"])


# Segments -----------------------------------------------------------------------------------------


def _segment_header(segment: DecodedSegment, arrays: list[np.ndarray]) -> dict[str, Any]:
    """Return what describes a segment, after adding its pixels to the arrays."""
    views = segment.views
    assert isinstance(views, ClipViews)  # single frames are decoded where the model is
    assert views.layout is None  # planes are for the device of a model that is in this process
    arrays += [on_host(views.frames), views.clips]
    return {
        "start": segment.start,
        "end": segment.end,
        "boxes": views.boxes,
        "size": views.size,
        "scaled": views.scaled,
    }


def _read_segment(known: dict[str, Any], frames: np.ndarray, clips: np.ndarray) -> DecodedSegment:
    height, width = map(int, known["size"])
    scaled = known["scaled"]
    views = ClipViews(
        frames,
        clips,
        [(int(top), int(left)) for top, left in known["boxes"]],
        (height, width),
        None if scaled is None else (int(scaled[0]), int(scaled[1])),
    )
    if frames.ndim != 4 or clips.ndim != 2 or not (clips >= 0).all() or clips.max() >= len(frames):
        raise ValueError(f"clips of shape {clips.shape} in frames of shape {frames.shape}")
    return DecodedSegment(float(known["start"]), float(known["end"]), views, (), ())


# Bytes --------------------------------------------------------------------------------------------


def _pack(header: dict[str, Any], arrays: list[np.ndarray]) -> bytes:
    header["arrays"] = [{"dtype": str(a.dtype), "shape": a.shape} for a in arrays]
    text = json.dumps(header).encode()
    parts = [MAGIC, len(text).to_bytes(LENGTH_BYTES, "little"), text]
    return b"".join([*parts, *(np.ascontiguousarray(a).data.cast("B") for a in arrays)])


def _unpack(content: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    if not content.startswith(MAGIC):
        raise ValueError("they begin otherwise")
    begin = len(MAGIC) + LENGTH_BYTES
    length = int.from_bytes(content[len(MAGIC) : begin], "little")
    try:
        header = json.loads(content[begin : begin + length])
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    offset, arrays = begin + length, []
    for known in header["arrays"]:
        if known["dtype"] not in DTYPES:
            raise ValueError(f"dtype {known['dtype']!r}")
        shape = tuple(int(n) for n in known["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(content, known["dtype"], count, offset)
        arrays.append(flat.reshape(shape).copy())  # PyTorch takes no read-only memory
        offset += arrays[-1].nbytes
    return header, arrays
