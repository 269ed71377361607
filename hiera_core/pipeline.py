"""A stream of inputs through models: decode in workers, compute in batches, one record each, in
order. What is made of an input (classes, features, a reconstruction) is a subclass's."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from . import inputs
from .errors import HieraError, InputError, UsageError
from .inputs import Source
from .preprocess.image import open_image, trusted_sizes
from .preprocess.video import Piece, Report, Sampling, frames_every
from .records import Kind, Record
from .runner import Runner
from .streaming import map_ahead, one_ahead

HOLD = 4  # batches of finished records that wait for a picture before them
R = TypeVar("R", bound=Runner[Any, Any])


@dataclass
class Decoded:
    """An input on its way to the model: a picture's pixels, a video's pieces, or neither."""

    record: Record
    pixels: np.ndarray | None = None
    report: Report | None = None
    pieces: Iterator[Piece] | None = None


class Pipeline(Generic[R]):
    """Base of `Predictor`, `FeatureExtractor` and `Reconstructor`.

    Args:
        model: a name, hub repository, folder or file (see `create_model`); a built model; a
            function that builds one for a kind of input; or None: the task's default for each kind
            of input, loaded when the first of its kind comes.
        sampling: which parts of a video are seen.
        workers: decoding threads, or None for one a core.
        options: `device`, `dtype`, `batch_size`, `compile`, as for `Runner`.

    Raises:
        UsageError: a model of another task, an unknown name.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    default_models: ClassVar[dict[Kind, str]]

    def __init__(
        self,
        model: str | torch.nn.Module | Callable[[Kind], Any] | None = None,
        *,
        sampling: Sampling | None = None,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        self.sampling = sampling or Sampling()
        self.workers = workers or os.cpu_count() or 1
        self._options, self._lock = options, threading.Lock()
        self._runners: dict[Kind, R] = {}
        self._build: Callable[[Kind], Any] | None = None
        if isinstance(model, str | torch.nn.Module):
            only = self._ready(model)
            self._runners[only.kind] = only
        else:
            self._build = model or (lambda kind: self.load(self.default_models[kind]))

    # What a task says ---------------------------------------------------------------------------

    def load(self, name: str) -> torch.nn.Module:
        """A model of this task by its name."""
        raise NotImplementedError

    def make_runner(self, model: Any, **options: Any) -> R:
        raise NotImplementedError

    def known(self, source: Source, index: int) -> Record | None:
        """The record of an input that needs no work, since an earlier run has done it."""
        return None

    def opened(self, record: Record, image: Image.Image) -> None:
        """A picture has been decoded (in a worker)."""

    def see_picture(self, record: Record, pixels: np.ndarray, result: Any) -> None:
        """The model has seen a picture: write down what it says."""
        raise NotImplementedError

    def see_video(self, record: Record, pieces: Iterator[Piece]) -> None:
        """Put a video's pieces through the model, and write down what it says.

        Raises:
            InputError: from `pieces`, when too many frames are damaged.
        """
        raise NotImplementedError

    # The stream ---------------------------------------------------------------------------------

    def __call__(self, sources: Iterable[Source]) -> Iterator[Record]:
        """One record for each source, in order. Memory does not grow with their number.

        Raises:
            DeviceError: out of memory with a single picture or clip.
            CheckpointError, HubError: a model that is needed now cannot be loaded.
        """
        batch = self._options.get("batch_size") or 64
        ahead = 2 * batch + self.workers
        waiting: list[Decoded] = []
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            with trusted_sizes():
                for decoded in map_ahead(
                    self._decode,
                    enumerate(sources),
                    pool=pool,
                    ahead=ahead,
                    cost=lambda item: ahead // self.workers if item[1].looks_like_video else 1,
                ):
                    if decoded is not None:
                        waiting.append(decoded)
                    if decoded is None or self._is_enough(waiting):
                        yield from self._compute(waiting, pool)
                        waiting = []
                yield from self._compute(waiting, pool)
        finally:  # do not wait for what nobody will read
            pool.shutdown(wait=False, cancel_futures=True)

    def runner(self, kind: Kind) -> R:
        """The one for pictures or for videos; loaded when first asked for.

        Raises:
            InputError: the model takes the other kind.
        """
        if self.sampling.every is not None:
            kind = "image"
        with self._lock:
            if kind not in self._runners:
                if self._build is None:
                    (other,) = self._runners.values()
                    raise self.mismatch(kind, other)
                self._runners[kind] = self._ready(self._build(kind))
            return self._runners[kind]

    @property
    def decides(self) -> bool:
        """Whether the kind of an input chooses the model."""
        return self._build is not None

    @property
    def kinds(self) -> list[Kind]:
        """Of the inputs that it has models for, so far."""
        return list(self._runners)

    def mismatch(self, kind: Kind, model: Runner[Any, Any]) -> InputError:
        """A picture for a video model, or the other way round."""
        what, takes = ("video", "pictures") if kind == "video" else ("picture", "video clips")
        return InputError(
            f"a {what}, and {model.name} takes {takes}",
            f"use a model for {kind}s such as {self.default_models[kind]}, or leave out --model",
        )

    # Decoding, in workers -----------------------------------------------------------------------

    def _decode(self, item: tuple[int, Source]) -> Decoded:
        index, source = item
        done = self.known(source, index)
        if done is not None:
            return Decoded(done)
        record = Record(source.name, index, "", "video" if source.looks_like_video else "image")
        try:
            content = source.content()
            kind = inputs.kind_of(content, source.name)
            record.kind = kind
            runner = self.runner(kind)
            record.model = runner.name
            if kind == "video":
                return self._open_video(record, content, runner)
            image, record.notes = open_image(content, self.sampling.max_pixels)
            self.opened(record, image)
            return Decoded(record, runner.transform.crop(image))
        except InputError as error:
            return Decoded(record.fail(error))
        except HieraError:
            raise  # a model that cannot be loaded is not this input's fault
        except Exception as error:  # resizing can fail too (memory); the batch goes on without it
            return Decoded(record.fail(InputError(str(error) or type(error).__name__)))

    def _open_video(self, record: Record, content: Path | bytes, runner: R) -> Decoded:
        """Open it and decode the first piece; the others follow while the model works."""
        if self.sampling.every is None:
            report, pieces = runner.transform.pieces(content, self.sampling)
        else:
            report, pieces = frames_every(content, self.sampling, runner.transform)
        pieces = _with_input_errors(pieces)
        try:
            first = next(pieces)
        except InputError as error:
            record.video = report.to_json()
            return Decoded(record.fail(error))
        return Decoded(record, report=report, pieces=itertools.chain([first], pieces))

    # Computing ----------------------------------------------------------------------------------

    def _is_enough(self, waiting: list[Decoded]) -> bool:
        """Pictures for a batch, or a video (which is batches by itself)."""
        pictures = sum(d.pixels is not None for d in waiting)
        size = self._runners["image"].batch_size if pictures else 1
        return pictures >= size or waiting[-1].pieces is not None or len(waiting) >= HOLD * size

    def _compute(self, batch: list[Decoded], pool: ThreadPoolExecutor) -> Iterator[Record]:
        good = [d.pixels for d in batch if d.pixels is not None]
        results = iter(self.runner("image").run(good) if good else ())
        for decoded in batch:
            if decoded.pixels is not None:
                self.see_picture(decoded.record, decoded.pixels, next(results))
            elif decoded.pieces is not None:
                self._see_video(decoded, pool)
            yield decoded.record

    def _see_video(self, decoded: Decoded, pool: ThreadPoolExecutor) -> None:
        record, report = decoded.record, decoded.report
        assert decoded.pieces is not None and report is not None
        try:
            self.see_video(record, one_ahead(decoded.pieces, pool))
        except InputError as error:
            record.fail(error)
        record.video = report.to_json()
        record.notes += report.notes
        if record.error is None and report.damaged:
            record.status = "partial"
            record.notes.append(f"{report.damaged} of {report.used} frames damaged or lost")

    # Models -------------------------------------------------------------------------------------

    def _ready(self, model: str | torch.nn.Module) -> R:
        borrowed = not isinstance(model, str)
        built = self.load(model) if isinstance(model, str) else model
        return self.make_runner(built, borrowed=borrowed, **self._options)


def of_whole_videos(sampling: Sampling | None) -> Sampling:
    """The same with one clip and one crop where none are given.

    Raises:
        UsageError: videos are to be seen in pieces.
    """
    sampling = sampling or Sampling()
    if sampling.segments is not None or sampling.every is not None:
        raise UsageError("segments and every are for prediction", "leave them out")
    return replace(sampling, clips=sampling.clips or 1, crops=sampling.crops or 1)


def run_one(
    pipeline: Pipeline[Any], source: str | Path | Iterable[str | Path]
) -> Record | list[Record]:
    """What the one-line functions share: a record for a single file or URL, else a list.

    Raises:
        UsageError: an empty folder, a glob that matches nothing; and as the pipeline.
    """
    single = isinstance(source, str | Path)
    names = [str(source)] if single else [str(s) for s in source]  # type: ignore[union-attr]
    inputs.check(names)
    records = list(pipeline(inputs.expand(names)))
    return records[0] if single and inputs.names_one(names[0]) else records


def _with_input_errors(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Whatever goes wrong while decoding is the input's fault; the batch goes on without it."""
    try:
        yield from pieces
    except HieraError:
        raise
    except Exception as error:
        raise InputError(str(error) or type(error).__name__) from error
