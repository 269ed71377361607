"""Measure the speed of models: the function behind `hiera bench`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .. import zoo
from ..data import sources
from ..data.clip_sampling import Decoder, Sampling
from ..data.decoders.image_decoder import check_decoder
from ..data.sources import Source
from ..errors import DeviceError, HieraError, InputError, UsageError, check_choice
from ..inference.batching import default_batch_size
from ..models.factory import model_class
from ..process.cores import cores_per_process
from . import peers, runner
from .given_model import Description, describe_models
from .job import COMPUTED, OURS, FileInputs, Job, Mode, RunLength
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
    mode: Literal["infer", "grad", "train"] = "infer",
    batch_sizes: Sequence[int] | None = None,
    attention: Sequence[Attention] = ("fused", "eager"),
    compile: bool = False,
    against: Sequence[str] = (),
    seconds: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    size: int | Sequence[int] | None = None,
    files: str | Path | Sequence[str | Path] | None = None,
    decoder: Decoder = "pillow",
    fast_jpeg: bool = False,
) -> Benchmark:
    """Measure throughput, latency and memory of models, each in a process of its own.

    >>> for m in hiera_core.bench(["hiera_tiny_224"]).measurements:
    ...     print(m.label, m.throughput, m.latency_ms(90))

    Weights are random, so nothing is downloaded for models of the zoo; of others, the checkpoint is
    read for its architecture. The variants and peers of a model are measured alternately, so that
    a busy machine slows all of them down alike.

    Args:
        models: Names of models in the zoo, or checkpoints: folders, files, URLs, hub repositories.
        mode: `infer`; `grad`: forward and backward; `train`: the step of `hiera train`, and for
            other implementations forward, backward and a step of AdamW.
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
        files: Measure from files to answers instead: files and folders of images or videos. Goes
            with neither `mode` nor `attention`.
        decoder, fast_jpeg: How files are read; see `Sampling`.

    Raises:
        UsageError: A model, peer, dtype or decoder is unknown, a peer or decoder is not installed,
            or a model does not take the size.
        CheckpointError, HubError: A checkpoint cannot be read.
        InputError: None of the files can be read.
        DeviceError: The device does not exist, or everything fails on it. If only some of the
            measurements fail, these have an `error`.
    """
    models = [models] if isinstance(models, str) else models
    if not isinstance(models, Sequence) or not all(isinstance(name, str) for name in models):
        raise UsageError("bench takes names of models", "use names that `hiera models` lists")
    check_choice("mode", mode, COMPUTED)
    for variant in attention:
        check_choice("attention", variant, ("fused", "eager"))
    if not attention:
        raise UsageError("no attention to measure", "use fused, eager or both")
    if any(size < 1 for size in batch_sizes or ()):
        raise UsageError(f"batch sizes {list(batch_sizes or ())}", "give numbers above 0")
    for peer in against:
        peers.check(peer)
    given: Mode = mode
    if files is not None:
        if mode != "infer" or set(attention) != {"fused", "eager"}:
            raise UsageError("files are measured as predict runs", "leave out mode and attention")
        given = "files"
        read = [files] if isinstance(files, str | Path) else files
        inputs = file_inputs(
            [str(item) for item in read], against, decoder=decoder, fast_jpeg=fast_jpeg
        )
    elif fast_jpeg or decoder != "pillow":
        raise UsageError("decoder and fast_jpeg are for files", "give files, too")
    described = describe_models(models)
    check_models(described, size, given)
    header, length = settings(device, dtype, given, seconds)
    template = Job(OURS, "", 0, header.device, header.dtype, given, tuple(attention), compile)
    template = replace(
        template,
        size=(size,) if isinstance(size, int) else size,
        files=None if files is None else inputs,
    )
    groups = measure_models(described, batch_sizes, template, against, length)
    measured = [measurement for group in groups for measurement in group]
    if error := total_failure(measured):
        raise error
    return Benchmark(header, measured)


def check_models(
    described: Mapping[str, Description | None], size: int | Sequence[int] | None, mode: Mode
) -> None:
    """Check that models exist, take inputs of a size, and suit the mode.

    Args:
        described: See `describe_models`.
        size: See `bench`.
        mode: What is measured.

    Raises:
        UsageError: A model is unknown, does not take this size (the hint names those nearest), or
            does not classify, in mode `files`.
    """
    sides = (size,) if isinstance(size, int) else size
    for name, description in described.items():
        entry = Job(OURS, name, 0, size=sides, description=description).entry
        model_class(entry).config_class(**entry.config)
        if mode == "files":
            zoo.check_is_hiera(entry.family, name)
        if mode == "files" and (entry.autoencoder or entry.config.get("num_classes") == 0):
            raise UsageError(f"--from classifies, and {name} has no classes", "use a classifier")


def file_inputs(
    inputs: Sequence[str],
    against: Sequence[str] = (),
    *,
    recursive: bool = False,
    workers: int | None = None,
    decoder: Decoder = "pillow",
    fast_jpeg: bool = False,
) -> FileInputs:
    """Return what is read in mode `files`.

    Args:
        inputs, recursive: See `sources.expand`.
        against: Peers that read them, too.
        workers: Decoding threads, and processes of a peer; None for one per core.
        decoder, fast_jpeg: See `Sampling`.

    Raises:
        UsageError: There are no inputs, they cannot be read twice, a peer is not timm, or the
            decoder is unknown, not installed, or cannot be combined with `fast_jpeg`.
        DeviceError: The decoder needs a device that is not there.
    """
    Sampling(decoder=decoder, fast_jpeg=fast_jpeg)
    check_decoder(decoder)
    for peer in against:
        if peer.partition(":")[0] != "timm":
            raise UsageError(
                f"--from compares with timm alone, not with {peer}", "use --against timm"
            )
    sources.check_inputs(inputs, recursive=recursive)
    for text in inputs:
        if not sources.can_be_listed_twice(text):
            raise UsageError(f"{text} can be read only once", "name files or folders")
    found = sources.expand(inputs, recursive=recursive)
    first = next(found, None)
    if first is None:
        raise UsageError("no inputs", "the list or pattern is empty")
    if not any(map(_exists, itertools.chain([first], found))):
        raise UsageError(f"{first.name}: no such file", "check the paths")
    count = workers or cores_per_process()
    return FileInputs(list(inputs), recursive, count, decoder, fast_jpeg)


def measure_models(
    described: Mapping[str, Description | None],
    batch_sizes: Sequence[int] | None,
    template: Job,
    against: Sequence[str],
    length: RunLength,
    progress: Callable[[str], None] = lambda text: None,
    starting: Callable[[str], None] = lambda name: None,
) -> Iterator[list[Measurement]]:
    """Yield the measurements of each model and batch size, when all of its variants are done.

    If a model fails, its measurement holds the error, and the next model is measured.

    Args:
        described: The models, see `describe_models`.
        batch_sizes, against: As for `bench`.
        template: Device, dtype, mode, attention and compilation of every job.
        length: How long to measure each variant.
        progress: Called with a line of text at each step of the work.
        starting: Called with the name of each model before it is measured.
    """
    for number, (name, description) in enumerate(described.items(), 1):
        starting(name)
        job = replace(template, model=name, description=description)
        sizes = batch_sizes or [_default_batch(job)]
        for jobs in runner.job_groups([name], sizes, job, against):
            place = f"{number}/{len(described)}"
            try:
                measured = runner.measure(jobs, length, functools.partial(_report, progress, place))
            except DeviceError as error:
                measured = [runner.failed(jobs[0], error.message.removeprefix(f"{name}: "))]
            yield measured


def total_failure(measurements: Sequence[Measurement]) -> HieraError | None:
    """Return the error to raise if all measurements failed, else None."""
    failed = [m for m in measurements if m.error is not None]
    if not failed or len(failed) < sum(m.unavailable is None for m in measurements):
        return None
    message = f"{failed[0].model}: {failed[0].error}"
    if failed[0].mode == "files":
        return InputError(message, "`hiera predict` says what is wrong with each of them")
    return DeviceError(message, "use a smaller model or batch")


def _exists(source: Source) -> bool:
    """Return whether an input is there, as far as that is known before it is fetched."""
    return source.error is None and (source.path is None or source.path.exists())


def _default_batch(job: Job) -> int:
    """Return the batch size of a job: that of `hiera predict` for files."""
    entry = job.entry
    if job.mode == "files":
        pixels = math.prod(entry.config["input_size"])
        return default_batch_size(entry.kind, job.device.partition(":")[0], pixels)
    return batch_for(entry.kind, job.device, job.mode, entry.family)


def _report(progress: Callable[[str], None], place: str, text: str) -> None:
    progress(f"{place} {text}")
