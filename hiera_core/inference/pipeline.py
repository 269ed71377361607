"""Run a stream of inputs through models: decode in worker threads, compute in batches, and yield
one record for each input, in order.

A subclass decides what is computed for an input: classes, features or a reconstruction.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypedDict, TypeVar

import torch
from PIL import Image

from ..data.clip_reader import DecodedSegment, read_segments
from ..data.clip_sampling import Sampling, VideoReport
from ..data.decoders.device_images import crop_fast, crop_on_device
from ..data.decoders.image_decoder import check_decoder, decode_image
from ..data.sources import Source
from ..data.video_files.animation_reader import kind_for_model
from ..data.video_files.decoder_threads import DecoderThreads
from ..device import Devices, names_several, select_devices
from ..errors import HieraError, InputError, UsageError, check_positive, check_type
from ..process.cores import allowed_cores, cores_per_process
from ..records import Kind, Record
from .batching import BatchRunner
from .decoded_input import (
    DecodedInput,
    Pixels,
    StartedBatch,
    checked_sources,
    on_host,
    with_input_errors,
)
from .launched import Started
from .prefetch import prefetch_map, prefetch_next
from .segments import check_sampling

# Largest number of records, counted in batches, that wait for a batch of images to fill.
MAX_WAITING_BATCHES = 4
MAX_PREFETCH = 1024  # images that are decoded ahead, whatever the batch size
JPEG_FORMATS = ("JPEG", "MPO")  # as Pillow names them
# More threads than this do not decode faster. Some of them may wait for a network.
MAX_WORKERS = max(64, 4 * allowed_cores())
MAX_BATCH_SIZE = 1_000_000
COMPILE_NOTICE_S = 10.0  # seconds of compiling after which a message says so
log = logging.getLogger("hiera")
R = TypeVar("R", bound=BatchRunner[Any, Any])


class Owned(NamedTuple):
    """A built model that belongs to the pipeline: `auto` chooses its device and dtype, as for a
    model that is loaded by its name. Those of a model that the caller keeps are not changed."""

    model: torch.nn.Module


GivenModel: TypeAlias = (
    str | Path | torch.nn.Module | Owned | Callable[[Kind], torch.nn.Module] | None
)


class PipelineOptions(TypedDict, total=False):
    """Keyword arguments that `predict`, `features` and their classes share.

    Keys:
        sampling: Which parts of a video the model sees.
        workers: Decoding threads; None for one per core, see `cores_per_process`.
        device: See `select_devices`. With several devices, each has a copy of the model, and
            batches take turns.
        dtype: See `select_dtype`.
        batch_size: Views in one forward pass; None for a size that suits the device.
        compile: Compile the model with torch.compile.
    """

    sampling: Sampling | None
    workers: int | None
    device: Devices
    dtype: str | torch.dtype
    batch_size: int | None
    compile: bool


class Pipeline(Generic[R]):
    """Base class of `Predictor`, `FeatureExtractor` and `Reconstructor`.

    Args:
        model: A name, hub repository, folder or file (see `create_model`); a built model, whose
            device and dtype `auto` keeps, or an `Owned` one; a function that builds one, which it
            does not keep, for a kind of input; or None for the task's default model of each kind,
            which is loaded when the first input of that kind arrives.
        sampling: Which parts of a video the model sees.
        workers: Decoding threads, or None for one per core, see `cores_per_process`. More than
            `MAX_WORKERS` make no difference.
        batch_size: Views in one forward pass, at most `MAX_BATCH_SIZE`; or None for a size that
            suits the device.
        runner_options: Further keyword arguments for `make_runner`.

    Raises:
        UsageError: The model is for another task, its name is unknown, or it does not suit the
            sampling.
        CheckpointError, HubError: See `read_checkpoint`.
        DeviceError: The device does not exist.
    """

    default_models: ClassVar[dict[Kind, str]]
    splits_videos: ClassVar[bool] = False  # whether `segments` and `every` have a meaning

    def __init__(
        self,
        model: GivenModel = None,
        *,
        sampling: Sampling | None = None,
        workers: int | None = None,
        batch_size: int | None = None,
        **runner_options: object,
    ) -> None:
        borrowed = isinstance(model, torch.nn.Module)
        model = model.model if isinstance(model, Owned) else model
        model = str(model) if isinstance(model, Path) else model
        if not (model is None or isinstance(model, str | torch.nn.Module) or callable(model)):
            raise UsageError(f"model is {model!r:.60}", "give a name, a path or a model")
        if sampling is not None:
            check_type("sampling", sampling, Sampling, "a hiera_core.Sampling")
        check_positive("batch_size", batch_size, MAX_BATCH_SIZE)
        check_positive("workers", workers)
        self.sampling = sampling or Sampling()
        if self.sampling.is_split and not self.splits_videos:
            raise UsageError("segments and every are for prediction and features", "leave them out")
        check_decoder(self.sampling.decoder)
        self.workers = min(workers or cores_per_process(), MAX_WORKERS)
        self._decoder_threads = DecoderThreads(min(self.workers, cores_per_process()))
        self.batch_size, self._lock = batch_size, threading.Lock()
        self._runner_options = runner_options
        self._is_compiled = not runner_options.get("compile")
        self._runners: dict[Kind, R] = {}
        self._on_model: Callable[[R], None] = lambda runner: None
        self._build: Callable[[Kind], torch.nn.Module] | None = None
        if isinstance(model, str | torch.nn.Module):
            only = self._make_ready(model, borrowed=borrowed)
            check_sampling(only, self.sampling)
            self._runners[only.kind] = only
        else:
            self._build = model or (lambda kind: self.load(self.default_models[kind]))

    # What a subclass defines ----------------------------------------------------------------------

    def load(self, name: str) -> torch.nn.Module:
        """Return a model of this task by its name."""
        raise NotImplementedError

    def make_runner(self, model: Any, **options: Any) -> R:
        """Return a `BatchRunner` of this task."""
        raise NotImplementedError

    def finished_record(self, source: Source, index: int) -> Record | None:
        """Return the record of an input that an earlier run has finished, else None."""
        return None

    @property
    def looks_at_pixels(self) -> bool:
        """Whether images are looked at on the host, as for thumbnails. Otherwise those that are
        on the device stay there."""
        return False

    def on_image_decoded(self, record: Record, image: Image.Image) -> None:
        """This hook is called in a worker thread when an image has been decoded."""

    def finish_image(self, record: Record, pixels: Pixels, result: Any) -> None:
        """Complete the record of an image with the result of the model."""
        raise NotImplementedError

    def finish_video(self, record: Record, segments: Iterator[DecodedSegment]) -> None:
        """Run the segments of a video through the model, and complete its record.

        Raises:
            InputError: From `segments`, if too many frames are damaged.
        """
        raise NotImplementedError

    # The stream ---------------------------------------------------------------------------------

    def __call__(self, inputs: Iterable[Source]) -> Iterator[Record]:
        """Yield one record for each source, in order. Memory does not grow with their number.

        Raises:
            DeviceError: There is not enough memory for a single image or clip.
            CheckpointError, HubError: The model for an input cannot be loaded.
        """
        inputs = checked_sources(inputs)
        limit = self._limit
        waiting, images = list[DecodedInput](), 0
        behind: list[StartedBatch] = []
        for runner in self._runners.values():
            runner.begin_stream()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            for decoded in prefetch_map(
                self._decode,
                self._begin_records(inputs),
                pool=pool,
                limit=limit,
                cost=lambda item: limit // self.workers if item[0].is_named_like_video else 1,
            ):
                if decoded is not None:
                    waiting.append(decoded)
                    images += decoded.pixels is not None
                if decoded is None or self._fills_batch(waiting, images):
                    yield from self._compute(waiting, pool, behind, more=decoded is not None)
                    waiting, images = [], 0
            yield from self._compute(waiting, pool, behind, more=False, ended=True)
        finally:  # what is still being decoded is not needed, so do not wait for it
            pool.shutdown(wait=False, cancel_futures=True)
            for runner in [*self._runners.values()]:  # workers may still add one
                runner.end_stream()

    def decode(self, source: Source, index: int) -> DecodedInput:
        """Return a decoded input, for `compute`, which may be called in another process."""
        return self._decode((source, index, None))

    def compute(self, inputs: list[DecodedInput]) -> list[Record]:
        """Return the records of decoded inputs, in order.

        Raises:
            DeviceError: There is not enough memory for a single image or clip.
        """
        for decoded in inputs:
            if decoded.pixels is not None or decoded.segments is not None:
                self.runner(decoded.record.kind)
        with ThreadPoolExecutor(1) as pool:
            return list(self._compute(inputs, pool, [], more=False))

    def runner(self, kind: Kind) -> R:
        """Return the `BatchRunner` for images or for videos. It is built when it is first needed.

        Raises:
            InputError: The model takes the other kind.
        """
        if self.sampling.every is not None:
            kind = "image"
        with self._lock:
            if kind not in self._runners:
                if self._build is None:
                    (other,) = self._runners.values()
                    raise self.mismatch(kind, other)
                runner = self._make_ready(self._build(kind), borrowed=False)
                self._on_model(runner)
                self._runners[kind] = runner
            return self._runners[kind]

    def on_model(self, function: Callable[[R], None]) -> None:
        """Call a function with every model of this pipeline: with those that are loaded, now, and
        with others when they are loaded. What it raises ends the stream."""
        with self._lock:
            self._on_model = function
            for runner in self._runners.values():
                function(runner)

    @property
    def chooses_by_kind(self) -> bool:
        """Whether the kind of an input chooses the model."""
        return self._build is not None

    @property
    def takes(self) -> Kind | None:
        """The kind of input that the model takes, or None if the input chooses the model."""
        if self.sampling.every is not None:
            return "video"
        return None if self.chooses_by_kind else self.kinds[0]

    @property
    def _takes_animations(self) -> bool:
        """Whether animations are taken for videos, not for images."""
        splits = self.sampling.segments is not None
        return self.takes == "video" or (self.takes is None and splits)

    @property
    def may_split(self) -> bool:
        """Whether what the caller wants is also there for the parts of a video."""
        return True

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of input for which a model is loaded."""
        return list(self._runners)

    def mismatch(self, kind: Kind, model: BatchRunner[Any, Any]) -> InputError:
        """Return the error for an image given to a video model, or a video to an image model."""
        what, takes = ("video", "pictures") if kind == "video" else ("picture", "video clips")
        default = self.default_models[kind]
        hint = f"use a model for {kind}s such as {default}, or leave out --model"
        if kind == "video" and self.splits_videos and self.may_split:
            hint = f"--every SECONDS shows it single frames; or use a video model such as {default}"
        return InputError(f"a {what}, and {model.name} takes {takes}", hint)

    # Decoding, in worker threads ------------------------------------------------------------------

    def _begin_records(
        self, inputs: Iterable[Source]
    ) -> Iterator[tuple[Source, int, Record | None]]:
        """Yield each source with its position, and its record if that is finished already.

        `finished_record` is called here, in the order of the inputs, because inputs of the same
        name are told apart by their order.
        """
        for number, source in enumerate(inputs):
            index = number if source.position is None else source.position
            yield source, index, self.finished_record(source, index)

    def _decode(self, item: tuple[Source, int, Record | None]) -> DecodedInput:
        source, index, finished = item
        if finished is not None:
            return DecodedInput(finished)
        kind: Kind = "video" if source.looks_like_video else "image"
        record = Record(source.name, index, "", kind, output_stem=source.output_stem, id=source.id)
        try:
            content = source.content() if source.pixels is None else source.pixels
            if isinstance(content, Pixels):
                kind = "video" if content.ndim == 4 else "image"
            else:
                kind = kind_for_model(content, source.name, takes_videos=self._takes_animations)
            record.kind = kind
            runner = self.runner(kind)
            record.model = runner.name
            if kind == "video" and source.is_named_like_video:
                return self._open_video(record, content, runner)
            if kind == "video":  # nothing is decoded ahead, since it counts as an image
                return self._open_later(record, content, runner)
            return DecodedInput(record, self._read_image(record, content, runner))
        except InputError as error:
            return DecodedInput(record.fail(error))
        except HieraError:
            raise  # this input is not at fault: for example, a model cannot be loaded
        except Exception as error:  # resizing can fail too (memory); the other inputs continue
            return DecodedInput(record.fail(InputError(str(error) or type(error).__name__)))

    def _read_image(self, record: Record, content: Path | bytes | Pixels, runner: R) -> Pixels:
        """Return an image as the model sees it. -> uint8 [height, width, 3]

        An image that is on the model's device stays there, unless it is looked at on the host.
        """
        sampling, transform = self.sampling, runner.transform
        if isinstance(content, torch.Tensor) and not runner.shares_device(content):
            content = on_host(content)
        image, record.notes = decode_image(content, sampling, transform, runner.device)
        if isinstance(image, torch.Tensor):
            there = None
            if not self.looks_at_pixels and runner.shares_device(image):
                there = crop_on_device(transform, image)
            if there is not None:
                return runner.settle(there)
            image = Image.fromarray(on_host(image))
        self.on_image_decoded(record, image)
        is_fast = sampling.fast_jpeg and image.format in JPEG_FORMATS
        cropped = crop_fast(transform, image) if is_fast else transform.crop(image)
        return runner.stage(cropped, self._images_ahead(runner))

    def _open_video(
        self, record: Record, content: Path | bytes | Pixels, runner: R
    ) -> DecodedInput:
        """Open a video and decode its first segment; the others follow while the model works."""
        report, segments = self._read_segments(content, runner)
        try:
            first = next(segments)
        except InputError as error:
            record.video = report.to_json()
            return DecodedInput(record.fail(error))
        return DecodedInput(record, report=report, segments=itertools.chain([first], segments))

    def _open_later(
        self, record: Record, content: Path | bytes | Pixels, runner: R
    ) -> DecodedInput:
        """Return a video that is opened only when its turn comes."""
        decoded = DecodedInput(record)

        def segments() -> Iterator[DecodedSegment]:
            decoded.report, found = self._read_segments(content, runner)
            yield from found

        decoded.segments = with_input_errors(segments())
        return decoded

    def _read_segments(
        self, content: Path | bytes | Pixels, runner: R
    ) -> tuple[VideoReport, Iterator[DecodedSegment]]:
        stays = not self.looks_at_pixels and self.sampling.every is None
        if isinstance(content, torch.Tensor) and not (stays and runner.shares_device(content)):
            content = on_host(content)
        report, segments = read_segments(
            content, self.sampling, runner.transform, self._decoder_threads, runner.frame_store
        )
        return report, with_input_errors(segments)

    @property
    def _limit(self) -> int:
        """Number of images that are decoded ahead."""
        return min(2 * (self.batch_size or 64), MAX_PREFETCH) * self._depth + self.workers

    @property
    def _depth(self) -> int:
        """Number of batches that can be in work at a time, one for each device."""
        runners = [*self._runners.values()]  # another thread may add one
        return max((runner.depth for runner in runners), default=1)

    def _images_ahead(self, runner: R) -> int:
        """Return how many images can be decoded, wait for a batch, or be on the device."""
        return self._limit + (2 + runner.depth) * runner.batch_size

    # Computing ----------------------------------------------------------------------------------

    def _fills_batch(self, waiting: list[DecodedInput], images: int) -> bool:
        """Return whether the inputs, of which some are images, fill a batch, or end with a video,
        which is batched alone."""
        size = self._runners["image"].batch_size if images else 1
        full = images >= size or len(waiting) >= MAX_WAITING_BATCHES * size
        return full or waiting[-1].segments is not None

    def _compute(
        self,
        batch: list[DecodedInput],
        pool: ThreadPoolExecutor,
        behind: list[StartedBatch],
        more: bool,
        ended: bool = False,
    ) -> Iterator[Record]:
        """Start a batch, and yield the records of the batches before it.

        The device has this batch before the last one is read and its records are written. So
        records are one batch behind, unless there is nothing to wait for.

        Args:
            batch: Decoded inputs.
            pool: The worker threads.
            behind: The batches that devices compute, as many as there are devices. This one is
                added.
            more: Whether more inputs are ready.
            ended: Whether there are no more inputs.
        """
        images = [d.pixels for d in batch if d.pixels is not None]
        with self._compile_notice():
            started = Started[Any]()
            if images:
                started = self.runner("image").start(images, more=not ended)
        while len(behind) >= self._depth:
            yield from self._complete(behind.pop(0), pool)
        behind.append(StartedBatch(batch, started))
        has_video = bool(batch) and batch[-1].segments is not None
        if has_video or not (more and started.is_running):
            while behind:
                yield from self._complete(behind.pop(0), pool)

    def _complete(self, batch: StartedBatch, pool: ThreadPoolExecutor) -> Iterator[Record]:
        """Yield the records of a batch that was started."""
        results = iter(batch.started.results())
        for decoded in batch.inputs:
            if decoded.pixels is not None:
                self.finish_image(decoded.record, decoded.pixels, next(results))
                self.runner("image").release(decoded.pixels)
            elif decoded.segments is not None:
                self._compute_video(decoded, pool)
            yield decoded.record

    def _compute_video(self, decoded: DecodedInput, pool: ThreadPoolExecutor) -> None:
        record = decoded.record
        assert decoded.segments is not None
        try:
            with self._compile_notice():
                self.finish_video(record, prefetch_next(decoded.segments, pool))
        except InputError as error:
            record.fail(error)
        report = decoded.report
        if report is None:  # it could not be opened
            return
        record.video = report.to_json()
        record.notes += report.notes
        if record.error is None and report.damaged:
            record.status = "partial"
            record.notes.append(f"{report.damaged} of {report.used} frames damaged or lost")

    @contextlib.contextmanager
    def _compile_notice(self) -> Iterator[None]:
        """Say after some seconds that the first batch is being compiled, which can take minutes."""
        if self._is_compiled:
            yield
            return
        text = "still compiling the model: this takes a minute, and longer on a busy machine"
        timer = threading.Timer(COMPILE_NOTICE_S, log.info, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
            self._is_compiled = True
        finally:
            timer.cancel()

    # Models -------------------------------------------------------------------------------------

    def _make_ready(self, model: str | torch.nn.Module, *, borrowed: bool) -> R:
        built = self.load(model) if isinstance(model, str) else model
        options = {**self._runner_options, "batch_size": self.batch_size}
        device: Any = options.get("device", "auto")
        if not names_several(device):
            only = self.make_runner(built, borrowed=borrowed, **options)
            check_decoder(self.sampling.decoder, only.device)
            return only
        first, *others = select_devices(device)
        check_decoder(self.sampling.decoder, first)
        runner = self.make_runner(built, borrowed=borrowed, **{**options, "device": first})
        for other in others:
            copied = self.make_runner(runner.model, **{**options, "device": other})
            runner.add_replica(copied)
        return runner
