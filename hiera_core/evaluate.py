"""Accuracy of a classifier on labelled data: every sample once, however many processes share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import zoo
from .datasets import Samples, benchmark_of
from .predictor import Predictor

WITHIN = 5  # top-5


@dataclass
class Evaluation:
    """What was counted.

    Attributes:
        confusion: [classes, classes] int64, true class by predicted one.
        within5: [classes] int64, how many of a class had it among the first five.
        failed: name and reason of samples that could not be read; they count as nothing.
        names: of the classes, where they are known.
    """

    confusion: np.ndarray
    within5: np.ndarray
    failed: list[tuple[str, str]] = field(default_factory=list)
    names: Sequence[str] | None = None
    published: float | None = None  # top-1 in percent, of this checkpoint on this data

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
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.confusion.trace()) / max(1, self.samples)

    @property
    def top5(self) -> float | None:
        """Percent; None where there are not more than five classes."""
        if len(self.confusion) <= WITHIN:
            return None
        return 100 * float(self.within5.sum()) / max(1, self.samples)

    def add(self, other: Evaluation) -> None:
        """Another process's share."""
        self.confusion += other.confusion
        self.within5 += other.within5
        self.failed += other.failed

    def classes(self) -> list[dict[str, Any]]:
        """A row for each class that occurs: id, label, samples, top1, top5 (percent)."""
        many = self.top5 is not None
        return [
            {
                "id": i,
                "label": self.label(i),
                "samples": int(count),
                "top1": 100 * float(self.confusion[i, i]) / count,
                "top5": 100 * float(self.within5[i]) / count if many else None,
            }
            for i, count in enumerate(self.counts)
            if count
        ]

    def confusions(self, limit: int = 10) -> list[dict[str, Any]]:
        """The most frequent mistakes: true label, predicted label, how often."""
        mistakes = self.confusion.copy()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
        pairs = [divmod(int(place), len(mistakes)) for place in order]
        return [
            {"label": self.label(i), "predicted": self.label(j), "count": int(mistakes[i, j])}
            for i, j in pairs
            if mistakes[i, j]
        ]

    def label(self, number: int) -> str:
        return str(number) if self.names is None else self.names[number]

    def to_json(self) -> dict[str, Any]:
        """Everything but the full confusion matrix."""
        return {
            "samples": self.samples,
            "failed": len(self.failed),
            "top1": self.top1,
            "top5": self.top5,
            "published_top1": self.published,
            "classes": self.classes(),
            "confusions": self.confusions(50),
            "errors": [{"input": name, "message": message} for name, message in self.failed],
        }


def evaluate(
    samples: Samples,
    predictor: Predictor,
    classes: int,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Count one process's share of the samples.

    Args:
        samples: with labels in the model's numbering, see `datasets.with_classes`.
        predictor: of the model, with top-5.
        classes: of the model.
        rank, world: this process takes every `world`-th sample from `rank` on.
        progress: called after each sample.

    Raises:
        DeviceError: out of memory with a single sample.
    """
    found = Evaluation.empty(classes, samples.classes)
    rows = range(rank, len(samples), world)
    assert samples.labels is not None
    for record in predictor(samples.sources[row] for row in rows):
        label = int(samples.labels[rows[record.index]])
        if record.error is not None:
            found.failed.append((record.input, record.error.message))
        else:
            guesses = [guess.id for guess in record.topk]
            found.confusion[label, guesses[0]] += 1
            found.within5[label] += label in guesses[:WITHIN]
        progress()
    return found


def published_top1(samples: Samples, card: dict[str, Any]) -> float | None:
    """The published accuracy of a released checkpoint on its own benchmark, in percent."""
    row = zoo.models().get(str(card.get("model")))
    if row is None or benchmark_of(samples) != row.classes:
        return None
    released = card.get("source") == f"{row.name}.{row.default}"
    return row.top1 if released else None
