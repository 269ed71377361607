"""Accuracy of a classifier on labelled data. Every sample counts once, however many processes
share the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch

from .. import zoo
from ..data.clip_sampling import Sampling
from ..data.datasets import MediaDataset, benchmark_of, open_eval_data, remap_labels
from ..data.media_types import kind_of
from ..data.toy_datasets import BUNDLED
from ..errors import InputError, UsageError
from ..records import Kind
from .pipeline import PipelineOptions
from .predict import Classifier, Predictor

TOP_K = 5  # number of classes in top-5 accuracy


class ClassAccuracy(TypedDict):
    """Accuracy of one class, in percent."""

    id: int
    label: str
    samples: int
    top1: float
    top5: float | None


class Confusion(TypedDict):
    """How often samples of one class were classified as another."""

    label: str
    predicted: str
    count: int


class FailedSample(TypedDict):
    """A sample that could not be read."""

    input: str
    message: str


class ProbeFacts(TypedDict, total=False):
    """How the features of a model were judged; see `probe`."""

    method: str
    train_samples: int
    neighbours: int  # of knn
    weight_decay: float  # of linear


class EvaluationJson(TypedDict):
    """An evaluation as a dictionary, ready for JSON. Accuracies are in percent."""

    probe: ProbeFacts | None

    samples: int
    failed: int
    top1: float
    top5: float | None
    published_top1: float | None
    classes: list[ClassAccuracy]
    confusions: list[Confusion]
    errors: list[FailedSample]


@dataclass
class Evaluation:
    """Counts of right and wrong predictions.

    Attributes:
        confusion: int64 [classes, classes], true class by predicted class.
        within5: int64 [classes], samples of each class for which that class is among the five
            most probable.
        failed: Name of each sample that could not be read, and the reason. These samples do not
            count.
        names: Names of the classes, if known.
        published: Published top-1 accuracy of this checkpoint on this data, in percent.
        probe: How the features of the model were judged, if this is not a classifier's own
            accuracy.
    """

    confusion: np.ndarray
    within5: np.ndarray
    failed: list[tuple[str, str]] = field(default_factory=list)
    names: Sequence[str] | None = None
    published: float | None = None
    probe: ProbeFacts | None = None

    @classmethod
    def empty(cls, classes: int, names: Sequence[str] | None = None) -> Evaluation:
        return cls(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64), names=names)

    @property
    def counts(self) -> np.ndarray:
        """Samples of each class. -> [classes]"""
        counts: np.ndarray = self.confusion.sum(1)
        return counts

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return percent(self.confusion.trace(), self.samples)

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy in percent; None with five classes or fewer."""
        if not has_top5(len(self.confusion)):
            return None
        return percent(self.within5.sum(), self.samples)

    def add(self, other: Evaluation) -> None:
        """Add the counts of another process."""
        self.confusion += other.confusion
        self.within5 += other.within5
        self.failed += other.failed

    def classes(self) -> list[ClassAccuracy]:
        """Return the accuracy of each class that occurs."""
        many = self.top5 is not None
        return [
            {
                "id": i,
                "label": self.label(i),
                "samples": int(count),
                "top1": percent(self.confusion[i, i], count),
                "top5": percent(self.within5[i], count) if many else None,
            }
            for i, count in enumerate(self.counts)
            if count
        ]

    def worst_classes(self, limit: int = 20) -> list[ClassAccuracy]:
        """Return the classes with the lowest top-1 accuracy, the worst first."""
        return sorted(self.classes(), key=lambda accuracy: accuracy["top1"])[:limit]

    def confusions(self, limit: int = 10) -> list[Confusion]:
        """Return the most frequent mistakes."""
        mistakes = self.confusion.copy()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
        pairs = [divmod(int(position), len(mistakes)) for position in order]
        return [
            {"label": self.label(i), "predicted": self.label(j), "count": int(mistakes[i, j])}
            for i, j in pairs
            if mistakes[i, j]
        ]

    def label(self, number: int) -> str:
        """Return the name of a class, or its index if there are no names."""
        return str(number) if self.names is None else self.names[number]

    def to_json(self) -> EvaluationJson:
        """Return everything but the full confusion matrix."""
        return {
            "probe": self.probe,
            "samples": self.samples,
            "failed": len(self.failed),
            "top1": self.top1,
            "top5": self.top5,
            "published_top1": self.published,
            "classes": self.classes(),
            "confusions": self.confusions(50),
            "errors": [{"input": name, "message": message} for name, message in self.failed],
        }


class EvaluationOptions(PipelineOptions, total=False):
    """Keyword arguments of `evaluate`: those of every pipeline, and its own."""

    class_names: Sequence[str] | None


def evaluate(
    data: str | Path,
    model: str | Path | torch.nn.Module | None = None,
    **options: Unpack[EvaluationOptions],
) -> Evaluation:
    """Count how often a classifier is right on labelled data.

    >>> hiera_core.evaluate("imagenet/val", "hiera_base_224").top1

    Args:
        data: A folder of class folders (its `val/`, if it has one), a list of `path label` lines,
            tar shards, or `digits` or `shapes` (the part that training holds out).
        model: See `Predictor`. None: the default model for the kind of the first sample; for
            `digits` and `shapes`, the bundled model that is trained on them.
        options: See `EvaluationOptions`.

    Raises:
        UsageError: The data is not labelled, or its classes are not the model's; see also
            `Predictor`.
        CheckpointError, HubError: See `read_checkpoint`.
        DeviceError: The device does not exist, or has too little memory for a single sample.
    """
    found = open_eval_data(data)
    model = BUNDLED.get(str(data)) if model is None else model
    return evaluate_dataset(found, Predictor(model, topk=TOP_K, **options))


def evaluate_dataset(
    dataset: MediaDataset,
    predictor: Predictor,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_sample: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Count the predictions on one process's share of a data set.

    Args:
        dataset: Labelled samples, with their own class names or indices.
        predictor: Predictor of the model, with the top 5 classes.
        rank, world_size: This process takes every `world_size`-th sample, beginning with `rank`.
        on_sample: Called after each sample.

    Raises:
        UsageError: The data has classes that the model does not know.
        DeviceError: There is not enough memory for a single sample.
    """
    classifier = _classifier_for(dataset, predictor)
    num_classes = int(classifier.model.config["num_classes"])
    numbered = remap_labels(dataset, classifier.class_names, num_classes)
    found = Evaluation.empty(num_classes, numbered.classes)
    rows = range(rank, len(numbered), world_size)
    assert numbered.labels is not None
    for record in predictor(numbered.sources[row] for row in rows):
        label = int(numbered.labels[rows[record.index]])
        if record.error is not None:
            found.failed.append((record.input, record.error.message))
        else:
            ranked = torch.tensor([[prediction.id for prediction in record.topk]])
            _, among_five = topk_hits(ranked, torch.tensor([label]))
            found.confusion[label, record.topk[0].id] += 1
            found.within5[label] += int(among_five)
        on_sample()
    found.published = _published_top1(dataset, classifier, predictor)
    return found


def topk_hits(ranked: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each label is the first class, and whether it is among the first five.

    Args:
        ranked: Class indices, the most probable class first, [n, k].
        labels: Class indices, [n].

    Returns:
        Two bool tensors [n].
    """
    hits = ranked[:, :TOP_K] == labels[:, None]
    return hits[:, 0], hits.any(1)


def has_top5(num_classes: int) -> bool:
    """Return whether top-5 accuracy is meaningful. With five classes, it is always 100%."""
    return num_classes > TOP_K


def percent(count: float, total: float) -> float:
    """Return `count / total` in percent, or 0 if `total` is 0."""
    return 100 * float(count) / max(1, float(total))


def _classifier_for(dataset: MediaDataset, predictor: Predictor) -> Classifier:
    """Return the predictor's only classifier, or the one for the kind of the first sample."""
    if not predictor.chooses_by_kind:
        return predictor.classifier(predictor.kinds[0])
    return predictor.classifier(_first_kind(dataset))


def _first_kind(dataset: MediaDataset) -> Kind:
    """Return the kind of the first sample that can be read."""
    for source in dataset.sources:
        with contextlib.suppress(InputError):
            return kind_of(source.content(), source.name)
    raise UsageError("no sample of the data can be read", "check the paths in it")


def _published_top1(
    dataset: MediaDataset, classifier: Classifier, predictor: Predictor
) -> float | None:
    """Return the published accuracy of a released checkpoint on its own benchmark, in percent, if
    it is measured with the published number of views."""
    default = Sampling(max_pixels=predictor.sampling.max_pixels)
    if predictor.sampling != default:
        return None
    return published_top1(dataset, getattr(classifier.model, "card", {}))


def published_top1(dataset: MediaDataset, card: dict[str, object]) -> float | None:
    """Return the published accuracy of a released checkpoint on its own benchmark, in percent.

    Args:
        dataset: The data.
        card: The model's card, with `model` and `source`.
    """
    entry = zoo.models().get(str(card.get("model")))
    if entry is None or benchmark_of(dataset) != entry.classes:
        return None
    released = card.get("source") == f"{entry.name}.{entry.default}"
    return entry.top1 if released else None
