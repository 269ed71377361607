"""Classify images and videos."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack, overload

import numpy as np
import torch
from PIL import Image

from .. import zoo
from ..data.clip_reader import DecodedSegment
from ..data.clip_sampling import Sampling
from ..data.memory import InMemory, MediaInput
from ..device import Devices
from ..errors import InputError, UsageError, check_positive
from ..models import factory
from ..models.encoder import unwrap_model
from ..models.hiera import Hiera
from ..models.mae import MaskedAutoencoderHiera
from ..records import Kind, Prediction, Record, RecordJson, SegmentResult
from ..viz.annotate import Thumbnails, make_thumbnail
from .batching import BatchOptions, BatchRunner
from .decoded_input import Pixels
from .one_call import run_pipeline
from .pipeline import GivenModel, Pipeline, PipelineOptions
from .segments import run_segments

VIDEO_THUMBNAILS = 12  # number of thumbnails of a video without segments


class PredictorOptions(PipelineOptions, total=False):
    """Keyword arguments of `predict` and `Predictor`: those of every pipeline, and these.

    Keys:
        topk: Number of classes in a record.
        class_names: Names in place of the model's own.
    """

    topk: int
    class_names: Sequence[str] | None


@overload
def predict(  # type: ignore[overload-overlap]  # a str is an Iterable[str], too
    source: str | Path | np.ndarray | torch.Tensor,  # tensors can be batches
    model: str | Path | torch.nn.Module | None = None,
    *,
    expand: bool = False,
    **options: Unpack[PredictorOptions],
) -> RecordJson | list[RecordJson]: ...


@overload
def predict(  # type: ignore[overload-overlap]
    source: InMemory,
    model: str | Path | torch.nn.Module | None = None,
    *,
    expand: bool = False,
    **options: Unpack[PredictorOptions],
) -> RecordJson: ...


@overload
def predict(
    source: Iterable[MediaInput],
    model: str | Path | torch.nn.Module | None = None,
    *,
    expand: bool = False,
    **options: Unpack[PredictorOptions],
) -> list[RecordJson]: ...


def predict(
    source: MediaInput | Iterable[MediaInput],
    model: str | Path | torch.nn.Module | None = None,
    *,
    expand: bool = False,
    **options: Unpack[PredictorOptions],
) -> RecordJson | list[RecordJson]:
    """Classify images and videos with one call.

    >>> hiera_core.predict("photo.jpg")["topk"][0]["label"]

    Args:
        source: An image or video: a path, bytes, an open file, a PIL image, an array or a tensor
            (see `memory.as_pixels`); a folder; or several of them.
        model, options: See `Predictor` and `PredictorOptions`.
        expand: Read texts as the command line does: globs, URLs, `@list.txt` and `-`.

    Returns:
        A record (a dictionary with input, status, topk, ...) for a single image or video, else a
        list of records in the order of the inputs. An input that cannot be read has the status
        "error" and an `error` entry.

    Raises:
        UsageError: A folder is empty, or an input is of another type; see also `Predictor`.
    """
    records = run_pipeline(Predictor(model, **options), source, expand)
    return [r.to_json() for r in records] if isinstance(records, list) else records.to_json()


class Classifier(BatchRunner[Hiera, torch.Tensor]):
    """Computes the class probabilities of preprocessed views.

    Args:
        model: A built classifier.
        class_names: Names in place of the model's own.
        options: `borrowed`, `device`, `dtype`, `batch_size`, `compile`, as for `BatchRunner`.

    Raises:
        UsageError: The model is not a classifier.
        DeviceError: The device does not exist, or has too little memory for the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        class_names: Sequence[str] | None = None,
        **options: Unpack[BatchOptions],
    ) -> None:
        if class_names is not None:
            is_list = isinstance(class_names, Sequence) and not isinstance(class_names, str)
            if not (is_list and all(isinstance(name, str) for name in class_names)):
                raise UsageError(f"class_names is {class_names!r:.60}", "give a list of texts")
        super().__init__(_check_classifier(model), **options)
        self.class_names = class_names or self.model.class_names
        self._check_class_names()
        # The model returns logits, because the softmax is taken in fp32: in 16 bits, many of 1000
        # probabilities would be equal.
        self.bind()

    def bind(self) -> None:
        self._logits = self.compiled(self.model.forward_logits)

    def __call__(self, views: Sequence[np.ndarray]) -> torch.Tensor:
        """Return probabilities, float32 [views, classes] on the CPU.

        Args:
            views: The views, as the model's transform returns them.

        Raises:
            DeviceError: There is not enough memory for a single view.
        """
        return torch.stack(self.run(views))

    def _check_class_names(self) -> None:
        """Check that every class has a name. A list of other classes would give wrong answers.

        Raises:
            UsageError: There are more or fewer names than classes.
        """
        names, count = self.class_names, int(self.model.config["num_classes"])
        if names is not None and len(names) != count:
            raise UsageError(
                f"there are {len(names)} class names, and {self.name} has {count} classes",
                "give one name for each class, in the order of the classes",
            )

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = self._logits(x.to(self.dtype)).float().softmax(-1)
        return probabilities

    def _split(self, found: torch.Tensor) -> Sequence[torch.Tensor]:
        return found.unbind()


class Predictor(Pipeline[Classifier]):
    """Classifies a stream of images and videos.

    Args:
        model: See `Pipeline`. The defaults are hiera_base_224 and hiera_base_16x224.
        sampling: Which parts of a video the model sees.
        topk: Number of classes in a record.
        keep_thumbnails: Add small images of the input to its record, see `annotate.draw_record`.
        class_names: Names in place of the model's own.
        workers, device, dtype, batch_size, compile: See `PipelineOptions`.

    Raises:
        UsageError: The model is not a classifier, its name is unknown, or it does not support
            the sampling.
        CheckpointError, HubError: See `read_checkpoint`.
        DeviceError: The device does not exist.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": zoo.DEFAULT_IMAGE_MODEL,
        "video": zoo.DEFAULT_VIDEO_MODEL,
    }
    splits_videos: ClassVar[bool] = True

    def __init__(
        self,
        model: GivenModel = None,
        *,
        sampling: Sampling | None = None,
        topk: int = 5,
        keep_thumbnails: bool = False,
        class_names: Sequence[str] | None = None,
        workers: int | None = None,
        device: Devices = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if topk is None:
            raise UsageError("topk is None", "give a whole number above 0")
        check_positive("topk", topk)
        self.topk, self.keep_thumbnails = topk, keep_thumbnails
        super().__init__(
            model,
            sampling=sampling,
            workers=workers,
            class_names=class_names,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile,
        )

    def load(self, name: str) -> Hiera:
        return factory.create_classifier(name)

    def make_runner(self, model: torch.nn.Module, **options: Any) -> Classifier:
        return Classifier(model, **options)

    def classifier(self, kind: Kind) -> Classifier:
        """Return the classifier of images or of videos; see `runner`."""
        return self.runner(kind)

    @property
    def looks_at_pixels(self) -> bool:
        return self.keep_thumbnails

    def on_image_decoded(self, record: Record, image: Image.Image) -> None:
        if self.keep_thumbnails:
            record.thumbnails = [make_thumbnail(image)]

    def finish_image(self, record: Record, pixels: Pixels, result: torch.Tensor) -> None:
        record.topk = self._top_classes(record, result)

    def finish_video(self, record: Record, segments: Iterator[DecodedSegment]) -> None:
        """Average the probabilities over the views of each segment, and over all segments."""
        averages, seconds, results, thumbnails = [], [], [], Thumbnails()
        by_segment = self.sampling.is_split
        for segment, views in run_segments(self.classifier(record.kind), segments):
            probs = torch.stack(views).mean(0)
            averages.append(probs)
            seconds.append(segment.end - segment.start)
            topk = self._top_classes(record, probs)
            results.append(SegmentResult(segment.start, segment.end, topk))
            if self.keep_thumbnails:
                _add_thumbnails(thumbnails, segment, results[-1] if by_segment else None)
        weight = torch.tensor(seconds)
        overall = (torch.stack(averages) * (weight / weight.sum())[:, None]).sum(0)
        record.topk = self._top_classes(record, overall)
        if record.error is None:
            record.thumbnails = thumbnails.kept
            record.segments = results if by_segment else None

    def _top_classes(self, record: Record, probs: torch.Tensor) -> list[Prediction]:
        if not math.isfinite(probs.sum().item()):
            record.fail(InputError("the model's output is not finite", "use --dtype bf16 or fp32"))
            return []
        values, ids = probs.topk(min(self.topk, probs.shape[0]))
        names = self.classifier(record.kind).class_names
        return [
            Prediction(i, names[i] if names is not None and i < len(names) else None, value)
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]


def _check_classifier(model: torch.nn.Module) -> Hiera:
    inner = unwrap_model(model)
    if isinstance(inner, MaskedAutoencoderHiera):
        raise UsageError(
            "this is an autoencoder: it reconstructs, it does not classify",
            "use a classifier such as hiera_base_224",
        )
    zoo.check_is_hiera(inner.family, "this model")
    if not isinstance(inner, Hiera):
        raise UsageError(f"a model of type {type(inner).__name__} has no classifier", "use Hiera")
    if not inner.config["num_classes"]:
        raise UsageError("this model has no classifier (num_classes=0)", "give it a head")
    return inner


def _add_thumbnails(
    thumbnails: Thumbnails, segment: DecodedSegment, result: SegmentResult | None
) -> None:
    """Add the middle frame of a segment with its class, or a dozen frames of a whole video."""
    if result is not None:
        middle = len(segment.frames) // 2
        best = result.topk[0] if result.topk else None
        thumbnails.add(segment.frames[middle], segment.times[middle], best)
        return
    count = min(VIDEO_THUMBNAILS, len(segment.frames))
    for row in np.linspace(0, len(segment.frames) - 1, count).round().astype(int).tolist():
        thumbnails.add(segment.frames[row], segment.times[row])
