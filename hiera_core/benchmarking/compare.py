"""Old figures against new: what has become slower, and what is only noise."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .job import Measurement

Verdict = Literal["slower", "faster", "same", "noise", "new", "gone"]
BLOCKS = 8


@dataclass(frozen=True)
class Change:
    """One row, then and now."""

    key: str
    verdict: Verdict
    change: float | None = None  # of the median time; 0.2: it takes 20% longer
    noise: float | None = None  # two standard errors of that
    drift: float | None = None  # of the machine: how much longer its own product takes

    def line(self) -> str:
        if self.change is None:
            return f"{self.key}: {self.verdict}"
        drift = f", the machine itself {self.drift:+.1%}" if self.drift is not None else ""
        return f"{self.key}: {self.verdict}, time {self.change:+.1%} ± {self.noise:.1%}{drift}"


def compare(
    old: Sequence[Measurement], new: Sequence[Measurement], tolerance: float
) -> list[Change]:
    """A verdict for every row that either side has.

    `slower` is a change that exceeds `tolerance` (0.05: 5%) by more than its noise, and that a
    slower machine (its matmul rate, taken beside the model) does not explain; `noise` is one that
    exceeds it and does not stand out.
    """
    then = {row.key: row for row in old if row.samples_s}
    now = {row.key: row for row in new if row.samples_s}
    changes = [
        _judge(then[key], row, tolerance) if key in then else Change(key, "new")
        for key, row in now.items()
    ]
    return changes + [Change(key, "gone") for key in then if key not in now]


def _judge(old: Measurement, new: Measurement, tolerance: float) -> Change:
    before, after = (statistics.median(r.samples_s) for r in (old, new))
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
    return Change(new.key, verdict, change, noise, drift)


def _uncertainty(samples: Sequence[float]) -> float:
    """Relative standard error of the median. From medians of consecutive blocks, since runs that
    follow each other are alike: a machine is slow for seconds, not for single runs."""
    if len(samples) < 2:
        return 0.5
    count = min(BLOCKS, len(samples))
    cuts = [round(i * len(samples) / count) for i in range(count + 1)]
    blocks = [statistics.median(samples[a:b]) for a, b in itertools.pairwise(cuts)]
    few = 1 + 2 / count  # a spread from few values is itself uncertain
    return few * statistics.stdev(blocks) / math.sqrt(count) / statistics.median(samples)
