"""Compare old and new measurements: what has become slower, and what is only noise."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .measurement import Measurement, significant

Verdict = Literal["slower", "faster", "same", "noise", "new", "gone"]
BLOCKS = 8  # number of blocks of samples that estimate the uncertainty of a median


@dataclass(frozen=True)
class Change:
    """Difference between an old and a new measurement.

    Args:
        key: What was measured, see `Measurement.key`.
        verdict: See `compare`.
        change: Relative change of the median time. 0.2 means that it takes 20% longer.
        noise: Two standard errors of `change`.
        drift: Relative change of the time of a matrix product on this machine.
        old, new: The two measurements, if there are both.
    """

    key: str
    verdict: Verdict
    change: float | None = None
    noise: float | None = None
    drift: float | None = None
    old: Measurement | None = None
    new: Measurement | None = None

    def line(self) -> str:
        """Return the change as a line of text."""
        if self.change is None:
            return f"{self.key}: {self.verdict}"
        drift = f", machine drift {self.drift:+.1%}" if self.drift is not None else ""
        return f"{self.key}: {self.verdict}, time {self.change:+.1%} ± {self.noise:.1%}{drift}"


def compare(
    old: Sequence[Measurement], new: Sequence[Measurement], tolerance: float
) -> list[Change]:
    """Return a change for every measurement in `old` or `new`.

    A measurement is `slower` if its time has grown by more than `tolerance` (0.05 for 5%) plus its
    noise, and if the drift of the machine does not explain it. `faster` follows the same rule. The
    verdict is `noise` if a change exceeds the tolerance, but not the tolerance plus its noise and
    the drift.
    """
    old_by_key = {m.key: m for m in old if m.samples_s}
    new_by_key = {m.key: m for m in new if m.samples_s}
    changes = [
        _judge(old_by_key[key], measurement, tolerance) if key in old_by_key else Change(key, "new")
        for key, measurement in new_by_key.items()
    ]
    return changes + [Change(key, "gone") for key in old_by_key if key not in new_by_key]


def _judge(old: Measurement, new: Measurement, tolerance: float) -> Change:
    before, after = (statistics.median(m.samples_s) for m in (old, new))
    change = after / before - 1
    noise = 2 * math.hypot(_uncertainty(old.samples_s), _uncertainty(new.samples_s))
    drift = None
    if old.matmul_gflops and new.matmul_gflops:
        drift = old.matmul_gflops / new.matmul_gflops - 1
    explained = drift or 0.0
    verdict: Verdict = "same"
    if change - max(explained, 0) - noise > tolerance:
        verdict = "slower"
    elif change - min(explained, 0) + noise < -tolerance:
        verdict = "faster"
    elif abs(change) > tolerance:
        verdict = "noise"
    return Change(new.key, verdict, change, noise, drift, old, new)


# Columns of `cells` that a narrow terminal does not show, the first to go first.
OPTIONAL = ("mode", "device", "drift", "dtype", "noise")


def cells(changes: Sequence[Change]) -> tuple[list[str], list[list[str]]]:
    """Return the names of columns, and a row of text for each change that has both measurements.
    Speeds are in inputs/s, and a ratio above 1 means that the new one is faster."""
    names = ["model", "", "mode", "device", "dtype", "batch", "old", "new", "ratio", "noise"]
    names += ["drift", "verdict"]
    rows = []
    for change in changes:
        old, new = change.old, change.new
        if old is None or new is None or not (old.throughput and new.throughput):
            continue
        row = [new.model + new.at_size, new.label, new.mode, new.device, new.dtype, str(new.batch)]
        row += [significant(m.throughput) for m in (old, new)]
        row += [f"{new.throughput / old.throughput:.2f}x", f"±{change.noise or 0:.1%}"]
        row += ["" if change.drift is None else f"{change.drift:+.1%}", change.verdict]
        rows.append(row)
    return names, rows


def _uncertainty(samples: Sequence[float]) -> float:
    """Return the relative standard error of the median.

    It is estimated from the medians of consecutive blocks, because consecutive samples are
    correlated: a machine is slow for seconds, not for single runs.
    """
    if len(samples) < 2:
        return 0.5
    count = min(BLOCKS, len(samples))
    cuts = [round(i * len(samples) / count) for i in range(count + 1)]
    blocks = [statistics.median(samples[a:b]) for a, b in itertools.pairwise(cuts)]
    correction = 1 + 2 / count  # the spread of few values is itself uncertain
    return correction * statistics.stdev(blocks) / math.sqrt(count) / statistics.median(samples)
