"""The record: what every command that takes inputs says of each of them, in every format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import HieraError

Kind = Literal["image", "video"]
Status = Literal["ok", "partial", "error"]


@dataclass(frozen=True)
class Guess:
    """One class of a top-k, with its probability."""

    id: int
    label: str | None
    prob: float


@dataclass(frozen=True)
class Segment:
    """A stretch of a video, in seconds, with its classes."""

    start: float
    end: float
    topk: list[Guess]


@dataclass
class Record:
    """One input's outcome."""

    input: str
    index: int  # place among the inputs, from 0
    model: str
    kind: Kind = "image"
    status: Status = "ok"
    topk: list[Guess] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: HieraError | None = None
    video: dict[str, Any] | None = None  # what was read of a video: duration, frames, views, ...
    segments: list[Segment] | None = None  # where pieces of a video were asked for
    shots: list[Any] = field(default_factory=list)  # small pictures of it, where asked for
    result: Any = None  # what a task made of it besides: features, a reconstruction
    extra: dict[str, Any] = field(default_factory=dict)  # what a task says besides, for JSON
    lines: list[str] = field(default_factory=list)  # and for people

    def fail(self, error: HieraError) -> Record:
        """Make this the record of a failure."""
        self.status, self.error, self.topk, self.segments = "error", error, [], None
        self.result, self.extra, self.lines = None, {}, []
        return self

    def to_json(self) -> dict[str, Any]:
        """Videos have `video` besides, and `segments` where asked for."""
        error = self.error
        values = {
            "input": self.input,
            "index": self.index,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "topk": _topk(self.topk),
            "notes": self.notes,
            "error": error
            and {"type": type(error).__name__, "message": error.message, "hint": error.hint},
        }
        if self.video is not None:
            values["video"] = self.video
        if self.segments is not None:
            values["segments"] = [
                {"start": s.start, "end": s.end, "topk": _topk(s.topk)} for s in self.segments
            ]
        return values | self.extra


def _topk(guesses: list[Guess]) -> list[dict[str, Any]]:
    return [{"id": g.id, "label": g.label, "prob": g.prob} for g in guesses]
