"""What a long run will take, from a few of its inputs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..data.sources import Source
from ..errors import UsageError
from ..inference.pipeline import Pipeline
from ..plain_data import counted, short_number, size_text
from .result_rows import RowLayout

WARM_UP = 8  # inputs before the clock starts, at most: loading, first batches
DAY_H = 24.0


@dataclass(frozen=True)
class Estimate:
    """Figures of a dry run, and what follows for all inputs.

    Args:
        inputs: Inputs that were timed.
        failed: Those of them that failed.
        seconds: Their duration.
        read: Bytes of their files; of inputs by URL, which are not counted, 0.
        written: Bytes of their rows as Parquet.
        total: Number of all inputs.
        device: What computed.
    """

    inputs: int
    failed: int
    seconds: float
    read: int
    written: int
    total: int
    device: str

    @property
    def rate(self) -> float:
        """Inputs per second of one process."""
        return self.inputs / max(self.seconds, 1e-9)

    @property
    def hours(self) -> float:
        """Hours that one process takes for all inputs."""
        return self.total / self.rate / 3600

    def lines(self) -> Iterator[str]:
        """Yield lines for a person."""
        each = self.total / self.inputs
        yield (
            f"{counted(self.inputs, 'input')} in {_seconds(self.seconds)} on {self.device}: "
            f"{short_number(self.rate)}/s, "
            f"{self.failed} failed"
        )
        yield (
            f"all {counted(self.total, 'input')}: {_duration(self.hours)} in one process like this "
            "one, "
            f"{size_text(self.read * each)} to read, "
            f"{size_text(self.written * each)} of rows to write"
        )
        needed = max(1, -(-self.hours // DAY_H))
        processes = "process" if needed == 1 else "processes"
        yield f"within a day: {needed:.0f} such {processes}, each with {self.device} of its own"


def spread(total: int, count: int) -> list[range]:
    """Return single rows that lie evenly over a manifest."""
    count = min(count, total)
    return [range(total * i // count, total * i // count + 1) for i in range(count)]


def estimate(
    pipeline: Pipeline[Any], sources: Iterable[Source], total: int, layout: RowLayout
) -> Estimate:
    """Run some inputs, and return what all of them will take.

    Raises:
        UsageError: There are fewer than two inputs.
    """
    inputs = list(sources)
    if len(inputs) < 2:
        raise UsageError("a dry run needs two inputs", "name more, or leave out --dry-run")
    warm_up = min(WARM_UP, len(inputs) // 2)
    for _ in pipeline(inputs[:warm_up]):
        pass
    timed = inputs[warm_up:]
    start = time.monotonic()
    records = list(pipeline(timed))
    seconds = time.monotonic() - start
    kinds = pipeline.kinds
    device = str(pipeline.runner(kinds[0]).device) if kinds else "this machine"
    return Estimate(
        len(timed),
        sum(record.error is not None for record in records),
        seconds,
        sum(map(_size, timed)),
        _parquet_size(layout, records),
        total,
        device,
    )


def _size(source: Source) -> int:
    if source.span is not None:
        return source.span[1]
    if source.path is not None:
        with contextlib.suppress(OSError):
            return source.path.stat().st_size
    return 0 if source.data is None else len(source.data)


def _parquet_size(layout: RowLayout, records: list[Any]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(layout.table(records), sink)
    return int(sink.getvalue().size)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def _duration(hours: float) -> str:
    """Return a duration in a unit that suits it: 0.4 s, 12 minutes, 3.5 hours."""
    if hours >= 1:
        shown = short_number(hours)
        return f"{shown} hour{'' if shown == '1' else 's'}"
    return (
        f"{short_number(hours * 60)} minutes"
        if hours >= 1 / 30
        else f"{short_number(hours * 3600)} s"
    )
