"""Judge an encoder: accuracy of a k-NN or linear classifier on its frozen features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import torch

from ..data.datasets import MediaDataset, open_splits
from ..errors import UsageError, check_positive
from ..inference.evaluate import Evaluation, ProbeFacts, topk_hits
from ..inference.features import FeatureExtractor
from ..inference.pipeline import PipelineOptions
from .frozen_features import FrozenFeatures, cache_folders, frozen_features
from .linear_probe import fit_linear_probe
from .nearest_neighbours import NEIGHBOURS, knn_scores

Method = Literal["knn", "linear"]
log = logging.getLogger("hiera")
METHODS: tuple[Method, ...] = ("knn", "linear")


@dataclass(frozen=True)
class ProbeData:
    """Labelled samples for training a probe, and others for judging it."""

    train: MediaDataset
    val: MediaDataset


def probe(
    data: str | Path,
    model: str | Path | torch.nn.Module | None = None,
    method: Method = "knn",
    *,
    val: str | float | None = None,
    neighbours: int = NEIGHBOURS,
    cache: str | Path | None = None,
    **options: Unpack[PipelineOptions],
) -> Evaluation:
    """Measure how well a simple classifier recognises classes by the frozen features of a model.

    >>> hiera_core.probe("imagenet", "mae_hiera_base_224", "linear").top1

    Args:
        data: Labelled data with a part for training and one for validation: a folder with `train/`
            and `val/`, or `digits` or `shapes`; otherwise `val` says what to hold out.
        model: Any encoder: a classifier, an autoencoder, or the image encoder of SAM 2; see
            `FeatureExtractor`.
        method: `knn` (nearest neighbours) or `linear` (logistic regression).
        val: Validation data, or the share of `data` that is held out.
        neighbours: Number of training samples that vote, for `knn`.
        cache: Folder that keeps the features, so that the next probe of this model and data is
            quick.
        options: See `PipelineOptions`.

    Raises:
        UsageError: The method is unknown, or the data has no labels or nothing to hold out.
        CheckpointError, HubError, DeviceError, OutputError: See `FeatureExtractor` and
            `frozen_features`.
    """
    check_options(method, neighbours)
    parts = open_probe_data(data, val)
    extractor = FeatureExtractor(model, **options)
    places = [data] if val is None or isinstance(val, float) else [data, val]
    folders = {} if cache is None else cache_folders(cache, *places)
    found = [
        frozen_features(part, extractor, cache=folders.get(name))
        for name, part in (("train", parts.train), ("val", parts.val))
    ]
    return judge(parts, *found, method=method, neighbours=neighbours)


def check_options(method: str, neighbours: int) -> None:
    """Check the arguments of `probe`.

    Raises:
        UsageError: The method is unknown, or the number of neighbours is not positive.
    """
    if method not in METHODS:
        raise UsageError(f"unknown probe {method!r}", "use knn or linear")
    check_positive("neighbours", neighbours)


def open_probe_data(
    data: str | Path, val: str | float | None = None, *, public_urls: Container[str] = ()
) -> ProbeData:
    """Open data with a part for training and one for validation; see `open_splits`.

    Raises:
        UsageError: Nothing is held out.
    """
    splits = open_splits(data, val, public_urls=public_urls)
    if splits.val is None:
        raise UsageError(
            f"{data} has no val/, and a probe is evaluated on other samples than it is trained on",
            "name other data with --val, or hold out a share: --val 0.1",
        )
    return ProbeData(splits.train, splits.val)


def judge(
    data: ProbeData,
    train: FrozenFeatures,
    val: FrozenFeatures,
    *,
    method: Method,
    neighbours: int = NEIGHBOURS,
    on_step: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Train a probe on some features, and count how often it is right on others.

    Args:
        data: The data, with the names of the classes.
        train, val: Its features.
        method, neighbours: See `probe`.
        on_step: See `fit_linear_probe`.

    Raises:
        UsageError: No sample of a part could be read.
    """
    for name, part in (("training", train), ("validation", val)):
        if not len(part):
            first = "; the first: {}: {}".format(*part.failed[0]) if part.failed else ""
            raise UsageError(f"no {name} sample can be used{first}", "check the data and the model")
    num_classes = data.train.num_classes or int(train.labels.max()) + 1
    if len(train.labels.unique()) == 1:
        raise UsageError("the training samples have one class", "a probe needs two or more")
    facts: ProbeFacts = {"method": method, "train_samples": len(train)}
    if method == "knn":
        found = knn_scores(train, val.vectors, num_classes, neighbours)
        facts["neighbours"] = min(neighbours, len(train))
    else:
        fitted = fit_linear_probe(train, num_classes, on_step)
        found = fitted.scores(val.vectors)
        facts["weight_decay"] = fitted.decay
    evaluation = _count(found, val, data.train.classes, train.failed)
    evaluation.probe = facts
    missing = sorted(set(train.labels.tolist()) - set(val.labels.tolist()))
    if missing:
        names = ", ".join(evaluation.label(number) for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        log.warning("no validation sample of the classes %s%s", names, more)
    return evaluation


def _count(
    scores: torch.Tensor,
    val: FrozenFeatures,
    names: Sequence[str] | None,
    failed: list[tuple[str, str]],
) -> Evaluation:
    """Count the classes with the highest scores."""
    evaluation = Evaluation.empty(scores.shape[1], names)
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    _, among_five = topk_hits(ranked, val.labels)
    for label, first, hit in zip(val.labels, ranked[:, 0], among_five, strict=True):
        evaluation.confusion[label, first] += 1
        evaluation.within5[label] += int(hit)
    evaluation.failed = [*failed, *val.failed]
    return evaluation
