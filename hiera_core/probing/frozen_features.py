"""The embeddings of a labelled data set, as an encoder that is not trained computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..atomic.lock import exclusive_folder
from ..data.datasets import MediaDataset
from ..errors import UsageError
from ..inference import feature_formats
from ..inference.feature_store import FeatureStore
from ..inference.features import FeatureExtractor
from ..records import Record

NAME = "embedding"  # of the feature


@dataclass
class FrozenFeatures:
    """Embeddings and labels of the samples that could be read.

    Attributes:
        vectors: float32 [n, c].
        labels: Class indices, int64 [n].
        failed: Name of each sample that could not be read, and the reason.
    """

    vectors: torch.Tensor
    labels: torch.Tensor
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: torch.Tensor) -> FrozenFeatures:
        """Return the samples at some positions."""
        return FrozenFeatures(self.vectors[indices], self.labels[indices])

    @classmethod
    def concatenate(cls, parts: Sequence[FrozenFeatures]) -> FrozenFeatures:
        """Return the samples of several processes together."""
        return cls(
            torch.cat([part.vectors for part in parts]),
            torch.cat([part.labels for part in parts]),
            [failure for part in parts for failure in part.failed],
        )


def frozen_features(
    dataset: MediaDataset,
    extractor: FeatureExtractor,
    *,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> FrozenFeatures:
    """Return the embeddings of one process's share of a data set.

    Args:
        dataset: Labelled samples.
        extractor: Extractor with the default selection, which is one embedding for each input.
        rank, world_size: This process takes every `world_size`-th sample, beginning with `rank`.
        cache: Folder that keeps the embeddings, as `hiera features -o` writes them. Samples that
            are in it are not computed again.
        on_sample: Called after each sample.

    Raises:
        UsageError: The data has no labels, its samples are both images and videos, or the cache
            was made with other weights or settings.
        DeviceError: There is not enough memory for a single sample.
        OutputError: The cache cannot be written.
    """
    if dataset.labels is None:
        raise UsageError("the data has no labels", "give class folders, or lines `path label`")
    rows = range(rank, len(dataset), world_size)
    vectors: list[torch.Tensor] = []
    labels: list[int] = []
    failed: list[tuple[str, str]] = []
    with _cached(cache, extractor) as embedding_of:
        for record in extractor(dataset.sources[row] for row in rows):
            if record.error is not None:
                failed.append((record.input, record.error.message))
            else:
                vectors.append(embedding_of(record))
                labels.append(int(dataset.labels[rows[record.index]]))
            on_sample()
    if len({len(vector) for vector in vectors}) > 1:
        raise UsageError("the samples are images and videos", "probe them one after the other")
    found = torch.stack(vectors) if vectors else torch.zeros(0, 0)
    return FrozenFeatures(found, torch.tensor(labels, dtype=torch.int64), failed)


@contextlib.contextmanager
def _cached(
    cache: Path | None, extractor: FeatureExtractor
) -> Iterator[Callable[[Record], torch.Tensor]]:
    """Connect an extractor with its cache, and yield a function that returns the embedding of a
    record, from the record itself or from the cache."""
    if cache is None:
        yield lambda record: record.result[NAME]
        return
    read: dict[str, torch.Tensor] = {}  # the shard that was read last

    def embedding_of(record: Record) -> torch.Tensor:
        if record.result is not None:
            store.add(record)
            vector: torch.Tensor = record.result[NAME]
            return vector
        name, row = record.extra["file"]["name"], record.extra["file"]["row"]
        if name not in read:
            read.clear()
            read[name] = feature_formats.read(name)[0][NAME]
        return read[name][row].clone()

    with exclusive_folder(cache):
        views = asdict(extractor.sampling)
        store = FeatureStore(cache, settings={"sampling": views}, resume=True)
        with store.connected(extractor):
            yield embedding_of
