"""The embeddings of a labelled data set, as an encoder that is not trained computes them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..atomic.lock import LOCK_NAME, exclusive_folder
from ..data.datasets import MediaDataset
from ..data.sources import Source
from ..errors import OutputError, UsageError
from ..inference import feature_formats
from ..inference.feature_store import FeatureStore
from ..inference.features import FeatureExtractor
from ..records import Record

NAME = "embedding"  # of the feature
CACHE_HINT = "name another folder with --cache (in Python: cache=), or remove this one"


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
        cache: Folder that keeps the embeddings, in the form that `hiera features -o` writes.
            Samples that are in it are not computed again. A file is known by its path, size and
            time, so that changed files are computed again.
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
        for record in extractor(map(known_by_content, (dataset.sources[row] for row in rows))):
            if record.error is not None:
                name = dataset.sources[rows[record.index]].name
                failed.append((name, record.error.message))
            else:
                vectors.append(embedding_of(record))
                labels.append(int(dataset.labels[rows[record.index]]))
            on_sample()
    if len({len(vector) for vector in vectors}) > 1:
        raise UsageError("the samples are images and videos", "probe them one after the other")
    found = torch.stack(vectors) if vectors else torch.zeros(0, 0)
    return FrozenFeatures(found, torch.tensor(labels, dtype=torch.int64), failed)


def known_by_content(source: Source) -> Source:
    """Return a source whose name changes if its content does. It keeps its ending.

    Of a member of a remote tar file, only its position is known without fetching it.
    """
    if source.error is not None or source.url is not None:
        return replace(source, name=f"{source.span or ''} {source.name}".lstrip())
    if source.path is not None:
        with contextlib.suppress(OSError):
            found = source.path.stat()
            state = f"{found.st_size} {found.st_mtime_ns} {source.span or ''}"
            return replace(source, name=f"{state} {source.path.resolve().parent}/{source.name}")
        return source
    pixels = source.pixels
    content = (source.data or b"") if pixels is None else np.ascontiguousarray(pixels).tobytes()
    return replace(source, name=f"{hashlib.sha256(content).hexdigest()} {source.name}")


def cache_folders(cache: str | Path, *data: str | Path) -> dict[str, Path]:
    """Return the folders of a cache, for the features of the two parts of the data.

    Args:
        cache: The folder.
        data: The data, where no cache may be.

    Raises:
        UsageError: The folder holds other files, or is within the data.
    """
    folder, names = Path(cache), {"train": "train-features", "val": "val-features"}
    where = folder.resolve()
    for place in map(Path, data):
        if place.is_dir() and where.is_relative_to(place.resolve()):
            raise UsageError(f"the cache {str(cache)!r} is within the data", "name another folder")
    try:
        known = {*names.values(), LOCK_NAME}
        others = [p.name for p in folder.iterdir() if p.name not in known] if str(cache) else ["."]
    except FileNotFoundError:
        others = []
    except OSError as error:
        raise OutputError(f"{folder} cannot be read ({error.strerror or error})") from error
    if others:
        raise UsageError(
            f"the cache {str(cache)!r} holds other files ({others[0]})", "name an empty folder"
        )
    return {part: folder / name for part, name in names.items()}


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
        store = FeatureStore(cache, settings={"sampling": views}, resume=True, hint=CACHE_HINT)
        with store.connected(extractor):
            yield embedding_of
