"""The record: the result for one input, in the same form for every command and every format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from .errors import HieraError

Kind = Literal["image", "video"]
Status = Literal["ok", "partial", "error"]


class PredictionJson(TypedDict):
    id: int
    label: str | None
    prob: float


class SegmentJson(TypedDict):
    start: float  # seconds
    end: float
    topk: list[PredictionJson]


class ErrorJson(TypedDict):
    type: str
    message: str
    hint: str


class VideoJson(TypedDict):
    """Properties of a video, and how much of it was read."""

    duration: float  # seconds
    fps: float
    frames: int  # frames in the video
    used: int  # frames that were decoded for the model
    damaged: int  # used frames that were damaged or lost
    views: int  # views (clips x crops) that the model saw


class RecordJson(TypedDict):
    """A record as a dictionary, ready for JSON."""

    input: str
    index: int
    status: Status
    kind: Kind
    model: str
    topk: list[PredictionJson]
    notes: list[str]
    error: ErrorJson | None
    id: NotRequired[str | int]
    video: NotRequired[VideoJson]
    segments: NotRequired[list[SegmentJson]]


@dataclass(frozen=True)
class Prediction:
    """One class of a top-k, with its probability."""

    id: int
    label: str | None
    prob: float

    def to_json(self) -> PredictionJson:
        return {"id": self.id, "label": self.label, "prob": self.prob}


@dataclass(frozen=True)
class SegmentResult:
    """The most probable classes of a segment of a video."""

    start: float  # seconds
    end: float
    topk: list[Prediction]

    def to_json(self) -> SegmentJson:
        return {"start": self.start, "end": self.end, "topk": [p.to_json() for p in self.topk]}


@dataclass
class Record:
    """The result for one input."""

    input: str
    index: int  # position among the inputs, from 0
    model: str
    kind: Kind = "image"
    status: Status = "ok"
    topk: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: HieraError | None = None
    video: VideoJson | None = None
    segments: list[SegmentResult] | None = None  # None unless segments were requested
    thumbnails: list[Any] = field(default_factory=list)  # small images, if requested
    result: Any = None  # tensors of the task: features or a reconstruction
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of the task, for JSON
    lines: list[str] = field(default_factory=list)  # `extra` as text, for a terminal
    output_stem: str = ""  # where its output files are, see `OutputNames`
    id: str | int | None = None  # what a manifest calls this input

    def fail(self, error: HieraError) -> Record:
        """Turn this record into that of a failure, and return it."""
        self.status, self.error, self.topk, self.segments = "error", error, [], None
        self.result, self.extra, self.lines = None, {}, []
        return self

    def to_json(self) -> RecordJson:
        """Return the record as a dictionary.

        Records of videos also have a `video` field, and `segments` if they were requested. Inputs
        from a manifest have its `id`.
        """
        values: RecordJson = {
            "input": self.input,
            "index": self.index,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "topk": [p.to_json() for p in self.topk],
            "notes": self.notes,
            "error": None if self.error is None else error_json(self.error),
        }
        if self.id is not None:
            values["id"] = self.id
        if self.video is not None:
            values["video"] = self.video
        if self.segments is not None:
            values["segments"] = [s.to_json() for s in self.segments]
        return {**values, **self.extra}  # type: ignore[typeddict-item]


def error_json(error: HieraError) -> ErrorJson:
    return {"type": type(error).__name__, "message": error.message, "hint": error.hint}
