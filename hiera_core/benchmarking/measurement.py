"""Measurements of one variant of a model, and the figures that are derived from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .job import OURS, Job

Step = Callable[[], Any]
ANSWERS, DECODING = "files to answers", "decoding alone"  # values of `part`


@dataclass
class Measurement:
    """Results of one variant of a job, such as fused attention, compiled."""

    model: str
    implementation: str
    attention: str | None  # None for a peer
    compiled: bool
    mode: str
    device: str
    dtype: str
    batch: int
    unit: str = "images"
    version: str | None = None  # of a peer's package
    params: int | None = None
    gmacs: float | None = None  # 1e9 multiply-adds in the forward pass of one input
    published: float | None = None  # inputs/s in the paper: A100, fp16, eager attention
    memory_mib: float | None = None  # peak, including the weights
    matmul_gflops: float | None = None  # 1e9 operations/s of a large matrix product
    samples_s: list[float] = field(default_factory=list)  # seconds of each run
    together_s: list[float] = field(default_factory=list)  # seconds of a run among others, by round
    rounds: list[float] = field(default_factory=list)  # seconds of a run in each round, for ratios
    speedup: float | None = None  # relative to eager attention
    ratio: float | None = None  # our throughput / this peer's: median over rounds
    ratio_low: float | None = None  # lower quartile
    ratio_high: float | None = None  # upper quartile
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    size: str | None = None  # of the input, such as 512x512, if it is not the model's own
    unavailable: str | None = None  # why a peer has no such model
    # Of mode `files`:
    part: str | None = None  # what is timed: ANSWERS or DECODING
    reading: str | None = None  # how files are read, if not as by default: see `FileInputs`
    inputs: int | None = None  # images or videos of a run that were read
    unreadable: int | None = None  # that could not be read
    waiting: float | None = None  # share of the time in which the model had nothing to compute

    @classmethod
    def of_job(cls, job: Job, attention: str | None, compiled: bool, **values: Any) -> Measurement:
        """Return the measurement of a variant of a job, without samples.

        Args:
            job: The job.
            attention, compiled, values: Fields of the measurement.
        """
        entry, is_own_size = job.entry, job.size is None
        size = None if is_own_size else "x".join(map(str, entry.config["input_size"]))
        published = entry.speed if job.implementation == OURS and is_own_size else None
        unit = "clips" if entry.kind == "video" else "images"
        return cls(
            job.model, job.implementation, attention, compiled, job.mode, job.device, job.dtype,
            job.batch, unit, size=size, published=published, **values,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """Text that is the same for measurements that can be compared."""
        parts = (self.model, self.implementation, self.attention, self.compiled, self.mode)
        key = " ".join(map(str, (*parts, self.device, self.dtype, self.batch))) + self.at_size
        return " ".join([key, *(word for word in (self.part, self.reading) if word)])

    @property
    def at_size(self) -> str:
        """The input size as the end of a name, such as ` 512x512`; "" for the model's own."""
        return f" {self.size}" if self.size else ""

    @property
    def label(self) -> str:
        """Name of the variant, without the model, such as `fused, compiled`."""
        words = [self.implementation] if self.implementation != OURS else []
        words += [word for word in (self.part, self.reading, self.attention) if word]
        return ", ".join(words + ["compiled"] * self.compiled)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.samples_s) if self.samples_s else None

    @property
    def throughput(self) -> float | None:
        """Inputs/s: of runs that follow one another, or, on a CPU, from the median of a run."""
        seconds = statistics.median(self.together_s) if self.together_s else self.median_s
        count = self.batch if self.inputs is None else self.inputs
        return count / seconds if seconds else None

    def latency_ms(self, percent: float) -> float | None:
        """Return a percentile of the time of a run. It is one of the samples, not interpolated.
        None if a run is not a batch."""
        if not self.samples_s or self.inputs is not None:
            return None
        ranked = sorted(self.samples_s)
        return 1e3 * ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]

    @property
    def utilisation(self) -> float | None:
        """Fraction of `matmul_gflops` that the model reaches."""
        if not (self.gmacs and self.throughput and self.matmul_gflops):
            return None
        passes = 1 if self.mode == "infer" else 3  # a backward pass counts as two forward passes
        return 2 * passes * self.gmacs * self.throughput / self.matmul_gflops

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and the figures that are derived from them."""
        derived = {
            "median_ms": None if self.median_s is None else 1e3 * self.median_s,
            **{f"p{p}_ms": self.latency_ms(p) for p in (50, 90, 99)},
            "throughput": self.throughput,
            "runs": len(self.samples_s),
            "utilisation": self.utilisation,
        }
        return {**asdict(self), **derived}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """Return the measurement from the output of `to_json`. Derived figures are ignored."""
        names = cls.__dataclass_fields__
        return cls(**{k: v for k, v in values.items() if k in names})


@dataclass
class Variant:
    """A step to time, and the measurement for its samples.

    Args:
        row: The measurement.
        step: What is timed.
        warm_up: What is done once before, if that is not the step itself.
        facts: Fields of the measurement that are known when the step has run.
    """

    row: Measurement
    step: Step
    warm_up: Step | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def add_ratios(measurements: list[Measurement]) -> None:
    """Set the ratios of measurements that ran alternately: `speedup` of ours, `ratio` of peers.

    A peer is compared with our fused attention, and a compiled peer with our compiled variant.
    """
    ours = {
        (m.attention, m.compiled): m
        for m in measurements
        if m.implementation == OURS and m.rounds and m.part != DECODING
    }
    eager = ours.get(("eager", False))
    for measurement in measurements:
        if not measurement.rounds:
            continue
        if measurement.implementation == OURS:
            if eager is not None:
                measurement.speedup = ratio_of(eager, measurement)[1]
            continue
        best = ours.get(("fused", measurement.compiled)) or ours.get(("fused", False))
        if best is None:  # in mode `files`
            best = ours.get((None, measurement.compiled)) or ours.get((None, False))
        if best is not None:
            low, middle, high = ratio_of(measurement, best)
            measurement.ratio_low, measurement.ratio, measurement.ratio_high = low, middle, high


def ratio_of(slow: Measurement, fast: Measurement) -> tuple[float, float, float]:
    """Return the throughput of `fast` divided by that of `slow`: the lower quartile, the median and
    the upper quartile over their rounds."""
    pairs = zip(slow.rounds, fast.rounds, strict=False)
    counts = [m.batch if m.inputs is None else m.inputs for m in (slow, fast)]
    values = sorted(counts[1] * a / (b * counts[0]) for a, b in pairs)
    return values[len(values) // 4], statistics.median(values), values[3 * len(values) // 4]


def significant(value: float | None) -> str:
    """Format a number with three significant digits: 0.123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
