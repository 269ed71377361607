"""What a run has done, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..plain_data import counted, size_text


@dataclass
class RunSummary:
    """What a run has done.

    Attributes:
        ok, failed: Numbers of inputs, without those of earlier runs.
        earlier_ok, earlier_failed: Those of earlier runs.
        seconds: Duration, from the first chunk to the last file.
        busy, waited: Seconds that the actors computed, and waited for decoded inputs.
        decoded, written: Bytes that went to the actors, and to files.
        errors: Some of the errors.
    """

    ok: int = 0
    failed: int = 0
    earlier_ok: int = 0
    earlier_failed: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    decoded: int = 0
    written: int = 0
    errors: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return one line for a person."""
        count = self.ok + self.failed
        share = self.waited / max(self.busy + self.waited, 1e-9)
        return (
            f"{counted(count, 'input')} in {self.seconds:.1f} s, "
            f"{count / max(self.seconds, 1e-9):.1f}/s; "
            f"the model waited {share:.0%} of its time; {counted(self.failed, 'error')}; "
            f"{size_text(self.decoded)} decoded, {size_text(self.written)} written"
        )

    def add(self, one: dict[str, Any]) -> None:
        """Add what is known about a file that was written."""
        self.failed += one["failed"]
        self.ok += one["rows"] - one["failed"]
        self.busy += one["busy"]
        self.waited += one["waited"]
        self.decoded += one["size"]
        self.written += one["written"]
        self.errors += one["errors"]
