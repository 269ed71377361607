"""Jobs to measure, and for how long: plain data that is passed between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .. import zoo
from ..data.clip_sampling import Decoder, Sampling
from ..zoo.input_sizes import full_size
from .given_model import entry_of

Mode = Literal["infer", "grad", "train", "files"]
COMPUTED = ("infer", "grad", "train")  # modes whose inputs are drawn, and lie on the device
OURS = "hiera"  # name of this package's implementation


@dataclass(frozen=True)
class FileInputs:
    """Files that are read and classified, in mode `files`.

    Args:
        inputs: What `hiera predict` takes.
        recursive: Whether folders within a folder are read.
        workers: Decoding threads, and of peers, processes.
        decoder, fast_jpeg: See `Sampling`. Peers read as they do.
    """

    inputs: Sequence[str]
    recursive: bool
    workers: int
    decoder: Decoder = "pillow"
    fast_jpeg: bool = False

    @property
    def sampling(self) -> Sampling:
        """How `hiera predict` reads them.

        Raises:
            UsageError: The decoder is unknown, or cannot be combined with `fast_jpeg`.
        """
        return Sampling(decoder=self.decoder, fast_jpeg=self.fast_jpeg)

    @property
    def reading(self) -> str | None:
        """How they are read, if not as by default, such as `fast JPEG`."""
        words = [self.decoder] if self.decoder != "pillow" else []
        return ", ".join(words + ["fast JPEG"] * self.fast_jpeg) or None


@dataclass(frozen=True)
class Job:
    """One implementation of one model at one batch size.

    Args:
        implementation: `hiera`, or a key of `peers.PEERS`.
        model: Name of the model in the zoo, or what the user gave for a checkpoint.
        batch: Batch size.
        device: The device: `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: `fp32`, `bf16` or `fp16`.
        mode: `infer` for the forward pass; `grad` for forward and backward; `train` for a step of
            `hiera train`, and for peers forward, backward and a step of AdamW; `files` for files to
            answers, see `files`.
        attentions: Variants of our attention: `fused`, `eager` or both. Peers ignore it.
        compile: Measure a compiled variant, too.
        size: Input size in pixels, with the frames first for video; None for the model's own.
        description: Of a model that is not in the zoo; see `given_model.describe_models`.
        files: What is read in mode `files`.
        warm_up_s: Seconds for which a variant runs before it is measured.
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
    description: dict[str, Any] | None = None
    files: FileInputs | None = None
    warm_up_s: float = 1.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """Return the job from what `dataclasses.asdict` made of it."""
        files = values["files"]
        return cls(**{**values, "files": None if files is None else FileInputs(**files)})

    @property
    def entry(self) -> zoo.ModelEntry:
        """The zoo's entry of the model, or what stands for it, with the input size of this job.

        Raises:
            UsageError: The model is unknown, or the size has too few or too many numbers.
        """
        if self.description is not None:
            entry = entry_of(self.description)
        else:
            entry = zoo.get(zoo.split_tag(self.model)[0])
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
