"""Measure the speed of models: the function behind `hiera bench`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .. import zoo
from ..errors import DeviceError, UsageError, check_choice
from ..models.factory import model_class
from . import peers, runner
from .job import OURS, Job, Mode, RunLength
from .machine import Header, batch_for, settings
from .measurement import Measurement

Attention = Literal["fused", "eager"]


@dataclass
class Benchmark:
    """The measurements of one call, and the machine and settings they were taken with."""

    header: Header
    measurements: list[Measurement]


def bench(
    models: str | Sequence[str] = (zoo.DEFAULT_IMAGE_MODEL,),
    *,
    mode: Mode = "infer",
    batch_sizes: Sequence[int] | None = None,
    attention: Sequence[Attention] = ("fused", "eager"),
    compile: bool = False,
    against: Sequence[str] = (),
    seconds: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    size: int | Sequence[int] | None = None,
) -> Benchmark:
    """Measure throughput, latency and memory of models, each in a process of its own.

    >>> for m in hiera_core.bench(["hiera_tiny_224"]).measurements:
    ...     print(m.label, m.throughput, m.latency_ms(90))

    Weights are random, so nothing is downloaded. The variants and peers of a model are measured
    alternately, so that a busy machine slows all of them down alike.

    Args:
        models: Names of models in the zoo.
        mode: `infer`; `grad`: forward and backward; `train`: both, and an optimiser step.
        batch_sizes: Inputs in a batch; None for a size that suits the device. A size is halved
            when memory runs out.
        attention: Our attention implementations to measure.
        compile: Also measure the compiled model.
        against: Other implementations: `reference`, `timm`, `transformers`, `hiera-optim`, `vit`.
            `reference:fp32` measures one in another dtype.
        seconds: How long to measure each variant; None for 3 seconds or more.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        size: Input size in pixels, with the frames first for video; a single side stands for
            height and width. None for each model's own.

    Raises:
        UsageError: A model, peer or dtype is unknown, a peer is not installed, or a model does not
            take the size.
        DeviceError: The device does not exist, or everything fails on it. If only some of the
            measurements fail, these have an `error`.
    """
    models = [models] if isinstance(models, str) else models
    if not isinstance(models, Sequence) or not all(isinstance(name, str) for name in models):
        raise UsageError("bench takes names of models", "use names that `hiera models` lists")
    check_choice("mode", mode, get_args(Mode))
    for variant in attention:
        check_choice("attention", variant, get_args(Attention))
    if not attention:
        raise UsageError("no attention to measure", "use fused, eager or both")
    if any(size < 1 for size in batch_sizes or ()):
        raise UsageError(f"batch sizes {list(batch_sizes or ())}", "give numbers above 0")
    check_size(models, size)
    for peer in against:
        peers.check(peer)
    header, length = settings(device, dtype, mode, seconds)
    template = Job(OURS, "", 0, header.device, header.dtype, mode, tuple(attention), compile)
    template = replace(template, size=(size,) if isinstance(size, int) else size)
    measured = list(measure_models(models, batch_sizes, template, against, length))
    failed = [m for m in measured if m.error is not None]
    if failed and len(failed) == len(measured):
        raise DeviceError(f"{failed[0].model}: {failed[0].error}", "use a smaller model or batch")
    return Benchmark(header, measured)


def check_size(models: Sequence[str], size: int | Sequence[int] | None) -> None:
    """Check that models exist, and take inputs of a size.

    Raises:
        UsageError: A model is unknown, or does not take this size; the hint names those nearest.
    """
    sides = (size,) if isinstance(size, int) else size
    for name in models:
        entry = Job(OURS, name, 0, size=sides).entry
        model_class(entry).config_class(**entry.config)


def measure_models(
    models: Sequence[str],
    batch_sizes: Sequence[int] | None,
    template: Job,
    against: Sequence[str],
    length: RunLength,
    progress: Callable[[str], None] = lambda text: None,
    starting: Callable[[str], None] = lambda name: None,
) -> Iterator[Measurement]:
    """Yield the measurements of each model and batch size, when all of its variants are done.

    If a model fails, its measurement holds the error, and the next model is measured.

    Args:
        models, batch_sizes, against: As for `bench`.
        template: Device, dtype, mode, attention and compilation of every job.
        length: How long to measure each variant.
        progress: Called with a line of text at each step of the work.
        starting: Called with the name of each model before it is measured.
    """
    for number, name in enumerate(models, 1):
        starting(name)
        entry = zoo.get(name)
        default = batch_for(entry.kind, template.device, template.mode, entry.family)
        sizes = batch_sizes or [default]
        for jobs in runner.job_groups([name], sizes, template, against):
            place = f"{number}/{len(models)}"
            try:
                measured = runner.measure(jobs, length, functools.partial(_report, progress, place))
            except DeviceError as error:
                measured = [runner.failed(jobs[0], error.message.removeprefix(f"{name}: "))]
            yield from measured


def _report(progress: Callable[[str], None], place: str, text: str) -> None:
    progress(f"{place} {text}")
