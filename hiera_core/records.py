"""The record: what every command that takes inputs says of each of them, in every format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import HieraError

Status = Literal["ok", "partial", "error"]


@dataclass(frozen=True)
class Guess:
    """One class of a top-k, with its probability."""

    id: int
    label: str | None
    prob: float


@dataclass
class Record:
    """One input's outcome."""

    input: str
    index: int  # place among the inputs, from 0
    model: str
    kind: str = "image"
    status: Status = "ok"
    topk: list[Guess] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: HieraError | None = None

    def fail(self, error: HieraError) -> Record:
        """Make this the record of a failure."""
        self.status, self.error, self.topk = "error", error, []
        return self

    def to_json(self) -> dict[str, Any]:
        error = self.error
        return {
            "input": self.input,
            "index": self.index,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "topk": [{"id": g.id, "label": g.label, "prob": g.prob} for g in self.topk],
            "notes": self.notes,
            "error": error
            and {"type": type(error).__name__, "message": error.message, "hint": error.hint},
        }
