"""What is to be measured, and what is found: plain data that crosses between processes."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mode = Literal["infer", "grad", "train"]
OURS = "hiera"


@dataclass(frozen=True)
class Job:
    """One implementation of one model at one batch size.

    Args:
        implementation: `hiera`, or a name of `peers.PEERS`.
        mode: infer; grad: forward and backward; train: that and a step of AdamW.
        attentions: of ours: fused, eager or both. Peers have their own.
        compile: also compiled, as a variant of its own.
    """

    implementation: str
    model: str
    batch: int
    device: str = "cpu"
    dtype: str = "fp32"
    mode: Mode = "infer"
    attentions: tuple[str, ...] = ("fused", "eager")
    compile: bool = False


@dataclass(frozen=True)
class RunLength:
    """How long a row is measured: until it has `seconds` and `runs`, or `limit` seconds and
    `least` runs. Rows of one model and batch take turns of `turn` seconds."""

    seconds: float = 3.0
    runs: int = 40
    limit: float = 60.0
    least: int = 5
    turn: float = 0.3

    def is_over(self, samples: list[float]) -> bool:
        spent, count = sum(samples), len(samples)
        enough = spent >= self.seconds and count >= self.runs
        return enough or (spent >= max(self.limit, self.seconds) and count >= self.least)


@dataclass
class Measurement:
    """One variant's figures."""

    model: str
    implementation: str
    attention: str | None  # of ours
    compiled: bool
    mode: str
    device: str
    dtype: str
    batch: int
    unit: str = "images"
    version: str | None = None  # of a peer
    params: int | None = None
    gmacs: float | None = None  # 1e9 multiply-adds of one input's forward pass
    published: float | None = None  # inputs/s on an A100, fp16, without fused attention
    memory_mib: float | None = None  # peak, weights and all
    matmul_gflops: float | None = None  # rate of a large product in this process
    samples_s: list[float] = field(default_factory=list)  # seconds of each run
    rounds: list[float] = field(default_factory=list)  # median seconds of each turn
    speedup: float | None = None  # over eager attention
    ratio: float | None = None  # our rate over this peer's, median of the turns
    ratio_low: float | None = None  # the quartiles of the turns
    ratio_high: float | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def key(self) -> str:
        """What makes two rows comparable."""
        parts = (self.model, self.implementation, self.attention, self.compiled, self.mode)
        return " ".join(map(str, (*parts, self.device, self.dtype, self.batch)))

    @property
    def label(self) -> str:
        words = [self.implementation] if self.implementation != OURS else []
        words += [self.attention] if self.attention else []
        return ", ".join(words + ["compiled"] * self.compiled)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.samples_s) if self.samples_s else None

    @property
    def throughput(self) -> float | None:
        """Inputs a second, by the median."""
        return self.batch / self.median_s if self.median_s else None

    def latency_ms(self, percent: float) -> float | None:
        """Of a batch, nearest rank."""
        if not self.samples_s:
            return None
        ranked = sorted(self.samples_s)
        return 1e3 * ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]

    @property
    def utilisation(self) -> float | None:
        """Share of the matmul rate that the model's products come to; a backward pass is two
        forward ones."""
        if not (self.gmacs and self.throughput and self.matmul_gflops):
            return None
        passes = 1 if self.mode == "infer" else 3
        return 2 * passes * self.gmacs * self.throughput / self.matmul_gflops

    def to_json(self) -> dict[str, Any]:
        derived = {
            "median_ms": self.latency_ms(50),
            **{f"p{p}_ms": self.latency_ms(p) for p in (50, 90, 99)},
            "throughput": self.throughput,
            "runs": len(self.samples_s),
            "utilisation": self.utilisation,
        }
        derived["median_ms"] = None if self.median_s is None else 1e3 * self.median_s
        return {**asdict(self), **derived}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        names = cls.__dataclass_fields__
        return cls(**{k: v for k, v in values.items() if k in names})


def add_ratios(rows: list[Measurement]) -> None:
    """Speed-up over eager attention, and our rate over each peer's, among rows measured in turns.

    A peer is held against our fused rows, compiled against compiled.
    """
    ours = {(r.attention, r.compiled): r for r in rows if r.implementation == OURS and r.rounds}
    eager = ours.get(("eager", False))
    for row in rows:
        best = ours.get(("fused", row.compiled)) or ours.get(("fused", False))
        if row.implementation == OURS and eager is not None and row.rounds:
            row.speedup = ratio_of(eager, row)[1]
        elif row.implementation != OURS and best is not None and row.rounds:
            row.ratio_low, row.ratio, row.ratio_high = ratio_of(row, best)


def ratio_of(slow: Measurement, fast: Measurement) -> tuple[float, float, float]:
    """Quartiles, turn by turn, of how many times faster the second is."""
    pairs = zip(slow.rounds, fast.rounds, strict=False)
    values = sorted(fast.batch * a / (b * slow.batch) for a, b in pairs)
    return values[len(values) // 4], statistics.median(values), values[3 * len(values) // 4]
