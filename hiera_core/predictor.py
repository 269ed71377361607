"""Classify a stream of inputs: decode in workers, compute in batches, one record each, in order."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import factory, inputs, zoo
from .annotate import Shots, thumbnail
from .classifier import Classifier
from .errors import HieraError, InputError, UsageError
from .inputs import Source
from .model import Hiera
from .preprocess.image import open_image, trusted_sizes
from .preprocess.video import Piece, Report, Sampling, frames_every
from .records import Guess, Kind, Record, Segment
from .streaming import map_ahead, one_ahead

DEFAULT_MODELS: dict[Kind, str] = {
    "image": zoo.DEFAULT_IMAGE_MODEL,
    "video": zoo.DEFAULT_VIDEO_MODEL,
}
SHOTS = 12  # of a whole video
HOLD = 4  # batches of finished records that wait for a picture before them


@dataclass
class _Decoded:
    """An input on its way to the model: a picture's pixels, a video's pieces, or neither."""

    record: Record
    pixels: np.ndarray | None = None
    report: Report | None = None
    pieces: Iterator[Piece] | None = None


class Predictor:
    """Names what is on pictures and in videos.

    Args:
        model: a name, hub repository, folder or file (see `create_model`); a built `Hiera`; a
            function that builds one for a kind of input; or None: hiera_base_224 for pictures,
            hiera_base_16x224 for videos, each loaded when the first of its kind comes.
        sampling: which parts of a video are seen.
        topk: classes in a record.
        workers: decoding threads, or None for one a core.
        keep_shots: give records small pictures of their inputs, see `annotate.draw`.
        options: `device`, `dtype`, `batch_size`, `class_names`, `compile`, as `Classifier`.

    Raises:
        UsageError: no classifier, an unknown name, or a sampling that the model cannot take.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    def __init__(
        self,
        model: str | Hiera | Callable[[Kind], Hiera] | None = None,
        *,
        sampling: Sampling | None = None,
        topk: int = 5,
        workers: int | None = None,
        keep_shots: bool = False,
        **options: Any,
    ) -> None:
        self.sampling, self.topk, self.keep_shots = sampling or Sampling(), topk, keep_shots
        self.workers = workers or os.cpu_count() or 1
        self._options, self._lock = options, threading.Lock()
        self._classifiers: dict[Kind, Classifier] = {}
        self._build: Callable[[Kind], Hiera] | None = None
        if isinstance(model, str | torch.nn.Module):
            only = self._ready(model)
            self._classifiers[only.kind] = only
            self._check_sampling(only)
        else:
            self._build = model or _build_default

    def __call__(self, sources: Iterable[Source]) -> Iterator[Record]:
        """One record for each source, in order. Memory does not grow with their number.

        Raises:
            DeviceError: out of memory with a single picture or clip.
            CheckpointError, HubError: a model that is needed now cannot be loaded.
        """
        batch = self._options.get("batch_size") or 64
        ahead = 2 * batch + self.workers
        waiting: list[_Decoded] = []
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
                        yield from self._classify(waiting, pool)
                        waiting = []
                yield from self._classify(waiting, pool)
        finally:  # do not wait for what nobody will read
            pool.shutdown(wait=False, cancel_futures=True)

    def classifier(self, kind: Kind) -> Classifier:
        """The one for pictures or for videos; loaded when first asked for.

        Raises:
            InputError: the model takes the other kind.
        """
        if self.sampling.every is not None:
            kind = "image"
        with self._lock:
            if kind not in self._classifiers:
                if self._build is None:
                    (other,) = self._classifiers.values()
                    raise _mismatch(kind, other)
                self._classifiers[kind] = self._ready(self._build(kind))
            return self._classifiers[kind]

    @property
    def decides(self) -> bool:
        """Whether the kind of an input chooses the model."""
        return self._build is not None

    @property
    def kinds(self) -> list[Kind]:
        """Of the inputs that it has models for, so far."""
        return list(self._classifiers)

    # Decoding, in workers -----------------------------------------------------------------------

    def _decode(self, item: tuple[int, Source]) -> _Decoded:
        index, source = item
        record = Record(source.name, index, "", "video" if source.looks_like_video else "image")
        try:
            content = source.content()
            kind = inputs.kind_of(content, source.name)
            record.kind = kind
            classifier = self.classifier(kind)
            record.model = classifier.name
            if kind == "video":
                return self._open_video(record, content, classifier)
            image, record.notes = open_image(content, self.sampling.max_pixels)
            if self.keep_shots:
                record.shots = [thumbnail(image)]
            return _Decoded(record, classifier.transform.crop(image))
        except InputError as error:
            return _Decoded(record.fail(error))
        except HieraError:
            raise  # a model that cannot be loaded is not this input's fault
        except Exception as error:  # resizing can fail too (memory); the batch goes on without it
            return _Decoded(record.fail(InputError(str(error) or type(error).__name__)))

    def _open_video(
        self, record: Record, content: Path | bytes, classifier: Classifier
    ) -> _Decoded:
        """Open it and decode the first piece; the others follow while the model works."""
        if self.sampling.every is None:
            report, pieces = classifier.transform.pieces(content, self.sampling)
        else:
            report, pieces = frames_every(content, self.sampling, classifier.transform)
        pieces = _with_input_errors(pieces)
        try:
            first = next(pieces)
        except InputError as error:
            record.video = report.to_json()
            return _Decoded(record.fail(error))
        return _Decoded(record, report=report, pieces=itertools.chain([first], pieces))

    # Computing ----------------------------------------------------------------------------------

    def _is_enough(self, waiting: list[_Decoded]) -> bool:
        """Pictures for a batch, or a video (which is batches by itself)."""
        pictures = sum(d.pixels is not None for d in waiting)
        size = self._classifiers["image"].batch_size if pictures else 1
        return pictures >= size or waiting[-1].pieces is not None or len(waiting) >= HOLD * size

    def _classify(self, batch: list[_Decoded], pool: ThreadPoolExecutor) -> Iterator[Record]:
        good = [d.pixels for d in batch if d.pixels is not None]
        rows = iter(self.classifier("image")(good) if good else ())
        for decoded in batch:
            record = decoded.record
            if decoded.pixels is not None:
                record.topk = self._top(record, next(rows))
            elif decoded.pieces is not None:
                self._classify_video(decoded, pool)
            yield record

    def _classify_video(self, decoded: _Decoded, pool: ThreadPoolExecutor) -> None:
        """Average the probabilities of each piece's views, and of all pieces."""
        record, report = decoded.record, decoded.report
        assert decoded.pieces is not None and report is not None
        classifier = self.classifier(record.kind)
        averages, seconds, segments, shots = [], [], [], Shots()
        in_pieces = self.sampling.segments is not None or self.sampling.every is not None
        try:
            for piece in one_ahead(decoded.pieces, pool):
                probs = classifier(piece.views).mean(0)
                averages.append(probs)
                seconds.append(piece.end - piece.start)
                segments.append(Segment(piece.start, piece.end, self._top(record, probs)))
                if self.keep_shots:
                    _add_shots(shots, piece, segments[-1] if in_pieces else None)
        except InputError as error:
            record.fail(error)
        record.video = report.to_json()
        record.notes += report.notes
        if record.error is not None:
            return
        weight = torch.tensor(seconds)
        overall = (torch.stack(averages) * (weight / weight.sum())[:, None]).sum(0)
        record.topk = self._top(record, overall)
        record.shots = shots.kept
        if in_pieces:
            record.segments = segments
        if report.damaged:
            record.status = "partial"
            record.notes.append(f"{report.damaged} of {report.used} frames damaged or lost")

    def _top(self, record: Record, probs: torch.Tensor) -> list[Guess]:
        if not bool(probs.isfinite().all()):
            record.fail(InputError("the model's output is not finite", "use --dtype bf16 or fp32"))
            return []
        values, ids = probs.topk(min(self.topk, len(probs)))
        names = self.classifier(record.kind).class_names
        return [
            Guess(i, names[i] if names is not None and i < len(names) else None, value)
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    # Models -------------------------------------------------------------------------------------

    def _ready(self, model: str | torch.nn.Module) -> Classifier:
        borrowed = not isinstance(model, str)
        built = factory.create_classifier(model) if isinstance(model, str) else model
        return Classifier(built, borrowed=borrowed, **self._options)

    def _check_sampling(self, only: Classifier) -> None:
        if self.sampling.segments is not None and only.kind == "image":
            raise UsageError(
                f"{only.name} takes pictures, and segments are for video models",
                "use --every SECONDS, or a video model such as hiera_base_16x224",
            )
        if self.sampling.every is not None and only.kind == "video":
            raise UsageError(
                f"{only.name} takes clips, and single frames are for image models",
                "use --segments SECONDS, or an image model such as hiera_base_224",
            )


def predict(
    source: str | Path | Iterable[str | Path],
    model: str | Hiera | None = None,
    **options: Any,
) -> Any:
    """Classify in one line: `hiera_core.predict("x.jpg")["topk"][0]["label"]`.

    Args:
        source: a picture or video, a folder, glob or URL, or several of them.
        model, options: see `Predictor`.

    Returns:
        A record (a dict: input, status, topk, ...) for a single file or URL, else a list of them.
        Inputs that fail have status "error" and say why.

    Raises:
        UsageError: an empty folder, a glob that matches nothing; and as `Predictor`.
    """
    single = isinstance(source, str | Path)
    names = [str(source)] if single else [str(s) for s in source]  # type: ignore[union-attr]
    inputs.check(names)
    records = [r.to_json() for r in Predictor(model, **options)(inputs.expand(names))]
    return records[0] if single and inputs.names_one(names[0]) else records


def _with_input_errors(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Whatever goes wrong while decoding is the input's fault; the batch goes on without it."""
    try:
        yield from pieces
    except HieraError:
        raise
    except Exception as error:
        raise InputError(str(error) or type(error).__name__) from error


def _build_default(kind: Kind) -> Hiera:
    return factory.create_classifier(DEFAULT_MODELS[kind])


def _add_shots(shots: Shots, piece: Piece, segment: Segment | None) -> None:
    """Of a piece the frame in its middle with its class; of a whole video a dozen."""
    if segment is not None:
        middle = len(piece.frames) // 2
        guess = segment.topk[0] if segment.topk else None
        shots.add(piece.frames[middle], piece.times[middle], guess)
        return
    count = min(SHOTS, len(piece.frames))
    for place in np.linspace(0, len(piece.frames) - 1, count).round().astype(int).tolist():
        shots.add(piece.frames[place], piece.times[place])


def _mismatch(kind: Kind, model: Classifier) -> InputError:
    if kind == "video":
        return InputError(
            f"a video, and {model.name} takes pictures",
            "--every SECONDS shows it single frames; or use a video model such as "
            "hiera_base_16x224",
        )
    return InputError(
        f"a picture, and {model.name} takes video clips",
        "use an image model such as hiera_base_224, or leave out --model",
    )
