"""Jobs to measure, and for how long: plain data that is passed between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .. import zoo
from ..zoo.input_sizes import full_size

Mode = Literal["infer", "grad", "train"]
OURS = "hiera"  # name of this package's implementation


@dataclass(frozen=True)
class Job:
    """One implementation of one model at one batch size.

    Args:
        implementation: `hiera`, or a key of `peers.PEERS`.
        model: Name of the model in the zoo.
        batch: Batch size.
        device: The device: `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: `fp32`, `bf16` or `fp16`.
        mode: `infer` for the forward pass; `grad` for forward and backward; `train` for forward,
            backward and a step of AdamW.
        attentions: Variants of our attention: `fused`, `eager` or both. Peers ignore it.
        compile: Measure a compiled variant, too.
        size: Input size in pixels, with the frames first for video; None for the model's own.
    """

    implementation: str
    model: str
    batch: int
    device: str = "cpu"
    dtype: str = "fp32"
    mode: Mode = "infer"
    attentions: tuple[str, ...] = ("fused", "eager")
    compile: bool = False
    size: Sequence[int] | None = None

    @property
    def entry(self) -> zoo.ModelEntry:
        """The zoo's entry of the model, with the input size of this job.

        Raises:
            UsageError: The model is unknown, or the size has too few or too many numbers.
        """
        entry = zoo.get(self.model)
        if self.size is None:
            return entry
        own: tuple[int, ...] = entry.config["input_size"]
        config = {**entry.config, "input_size": full_size(tuple(self.size), len(own))}
        return replace(entry, config=config)


@dataclass(frozen=True)
class RunLength:
    """How long to measure.

    A measurement ends when it reaches both `seconds` and `runs`, or both `max_seconds` and
    `min_runs`.
    Measurements of one model and batch size alternate in rounds of `round_seconds`.
    """

    seconds: float = 3.0
    runs: int = 40
    max_seconds: float = 60.0
    min_runs: int = 5
    round_seconds: float = 0.3

    def is_over(self, samples: list[float]) -> bool:
        """Return whether the measurement may end, given the seconds of each run."""
        spent, count = sum(samples), len(samples)
        enough = spent >= self.seconds and count >= self.runs
        return enough or (spent >= max(self.max_seconds, self.seconds) and count >= self.min_runs)
