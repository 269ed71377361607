"""Classify a stream of pictures and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from . import factory, zoo
from .annotate import Shots, thumbnail
from .classifier import Classifier
from .errors import InputError, UsageError
from .model import Hiera
from .pipeline import Pipeline, run_one
from .preprocess.video import Piece, Sampling
from .records import Guess, Kind, Record, Segment
from .runner import Runner

SHOTS = 12  # of a whole video


class Predictor(Pipeline[Classifier]):
    """Names what is on pictures and in videos.

    Args:
        model: see `Pipeline`; the defaults are hiera_base_224 and hiera_base_16x224.
        sampling: which parts of a video are seen.
        topk: classes in a record.
        keep_shots: give records small pictures of their inputs, see `annotate.draw`.
        options: `workers`, `device`, `dtype`, `batch_size`, `class_names`, `compile`, as for
            `Pipeline` and `Classifier`.

    Raises:
        UsageError: no classifier, an unknown name, or a sampling that the model cannot take.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": zoo.DEFAULT_IMAGE_MODEL,
        "video": zoo.DEFAULT_VIDEO_MODEL,
    }

    def __init__(
        self,
        model: str | Hiera | Callable[[Kind], Hiera] | None = None,
        *,
        sampling: Sampling | None = None,
        topk: int = 5,
        keep_shots: bool = False,
        **options: Any,
    ) -> None:
        self.topk, self.keep_shots = topk, keep_shots
        super().__init__(model, sampling=sampling, **options)
        for only in self._runners.values():
            self._check_sampling(only)

    def load(self, name: str) -> Hiera:
        return factory.create_classifier(name)

    def make_runner(self, model: torch.nn.Module, **options: Any) -> Classifier:
        return Classifier(model, **options)

    def classifier(self, kind: Kind) -> Classifier:
        """The one for pictures or for videos; see `runner`."""
        return self.runner(kind)

    def opened(self, record: Record, image: Image.Image) -> None:
        if self.keep_shots:
            record.shots = [thumbnail(image)]

    def see_picture(self, record: Record, pixels: np.ndarray, result: torch.Tensor) -> None:
        record.topk = self._top(record, result)

    def see_video(self, record: Record, pieces: Iterator[Piece]) -> None:
        """Average the probabilities of each piece's views, and of all pieces."""
        classifier = self.classifier(record.kind)
        averages, seconds, segments, shots = [], [], [], Shots()
        in_pieces = self.sampling.segments is not None or self.sampling.every is not None
        for piece in pieces:
            probs = classifier(piece.views).mean(0)
            averages.append(probs)
            seconds.append(piece.end - piece.start)
            segments.append(Segment(piece.start, piece.end, self._top(record, probs)))
            if self.keep_shots:
                _add_shots(shots, piece, segments[-1] if in_pieces else None)
        weight = torch.tensor(seconds)
        overall = (torch.stack(averages) * (weight / weight.sum())[:, None]).sum(0)
        record.topk = self._top(record, overall)
        if record.error is None:
            record.shots = shots.kept
            record.segments = segments if in_pieces else None

    def mismatch(self, kind: Kind, model: Runner[Any, Any]) -> InputError:
        if kind == "image":
            return super().mismatch(kind, model)
        return InputError(
            f"a video, and {model.name} takes pictures",
            "--every SECONDS shows it single frames; or use a video model such as "
            f"{self.default_models[kind]}",
        )

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
    found = run_one(Predictor(model, **options), source)
    return [r.to_json() for r in found] if isinstance(found, list) else found.to_json()


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
