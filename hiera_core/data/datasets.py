"""Data sets: class folders, lists, tar shards, Parquet files, and the built-in toy data sets.

A data set is a sequence of sources (see sources.py) with class indices. Nothing is decoded here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, check_type, did_you_mean
from ..places.remote_requests import is_remote, is_web, path_of_file_url
from ..zoo import labels as class_labels
from . import tar_files, toy_datasets
from .classes.class_balance import held_out_rows
from .indexed.local_samples import index_folder, index_list, index_shards
from .indexed.parquet_data import TEST, TRAIN, VAL, find_parquet, without_columns
from .indexed.remote_shards import WILDCARD, index_remote_shards, list_files, list_shards
from .indexed.sample_index import SampleIndex
from .list_files import as_class_number
from .sources import Source

log = logging.getLogger("hiera")
BUILT_IN: dict[str, Any] = {
    "digits": (toy_datasets.Digits, toy_datasets.DIGITS),
    "shapes": (toy_datasets.Shapes, toy_datasets.DIRECTIONS),
}
BUILT_IN_VAL = 0.2  # share of a built-in data set that is held out for validation
WNID = re.compile(r"n\d{8}")
# Sizes of the validation sets. Fewer and fewer videos of Kinetics can still be downloaded.
IMAGENET_VAL, KINETICS_VAL = 50_000, range(19_000, 20_001)


@dataclass(frozen=True)
class MediaDataset:
    """Images or videos with their classes.

    Args:
        sources: The samples.
        labels: Class indices, int64 [n], if they are known.
        classes: Names of the classes, if they are known.
        class_count: Number of classes. None: the number of names, or one more than the largest
            label.
    """

    sources: Sequence[Source]
    labels: np.ndarray | None = None
    classes: Sequence[str] | None = None
    class_count: int | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def subset(self, indices: Sequence[int] | np.ndarray) -> MediaDataset:
        """Return the samples with these indices, in the given order, with the same classes."""
        labels = None if self.labels is None else self.labels[indices]
        sources = _Subset(self.sources, np.asarray(indices))
        return replace(self, sources=sources, labels=labels, class_count=self.num_classes)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        if self.classes is not None:
            return len(self.classes)
        if self.labels is None or self.class_count is not None:
            return self.class_count
        return int(self.labels.max(initial=-1)) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of the number of samples, their labels, and the names of some of them.

        It does not depend on the folder that the data set is in.
        """
        indices = np.linspace(0, len(self) - 1, 8).round().astype(int).tolist()
        names = [Path(self.sources[index].name).name for index in indices]
        labels = b"" if self.labels is None else np.ascontiguousarray(self.labels).tobytes()
        text = json.dumps([len(self), self.num_classes, names]).encode() + labels
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """Training data, and validation data if some is held out."""

    train: MediaDataset
    val: MediaDataset | None = None


def open_splits(
    data: str | Path,
    val: str | float | None = None,
    labelled: bool = True,
    *,
    public_urls: Container[str] = (),
) -> Splits:
    """Open training and validation data.

    Args:
        data: The text `digits` or `shapes`, also if a file has this name (`./digits` and a `Path`
            are the file); a folder of class folders, or one with such folders in `train/`
            and `val/`; a list (.csv, .tsv, .txt) with `path label` lines, or in JSON; tar shards as
            a file, a folder, or a pattern such as `shard-{000..099}.tar`; or Parquet files with
            images as a file, a folder or a pattern. Shards and Parquet files may be at a remote
            place (`s3://`, `gs://`, shards also at `https://`), and `hf://datasets/USER/NAME` is a
            data set of the Hugging Face Hub.
        val: Validation data of any of these kinds, or a share of `data` to hold out (the same
            samples every time; if they have labels, the same share of each class). None: `val/` or
            the split `validation` in `data`, a fifth of a built-in data set, or nothing.
        labelled: Whether labels are needed. If not, any folder of images and videos will do.
        public_urls: URLs that must not lead into private networks, if `data` or `val` is one.

    Raises:
        UsageError: The data does not exist, is empty, lacks usable labels, or is in a private
            network and must not be.
    """
    data = path_of_file_url(str(data)) or data
    if isinstance(val, str) and _as_number(val) is not None:
        val = _as_number(val)
    train, own_val = _open_parts(data, labelled, val is None, str(data) in public_urls)
    if is_built_in(data) and val is None:
        val = BUILT_IN_VAL
    if val == 0 or (val is None and own_val is None):
        return Splits(train)
    if val is None or isinstance(val, str | Path):
        held_out = own_val
        if val is not None:
            held_out = open_dataset(val, labelled, public_only=str(val) in public_urls)
        assert held_out is not None
        if labelled:
            held_out = remap_labels(
                held_out, train.classes, train.num_classes, owner="the training data"
            )
        return Splits(train, held_out)
    if not 0 < val < 1:
        raise UsageError(f"data.val is {val}", "give a share below 1, or a path")
    count = round(val * len(train))
    if not 0 < count < len(train):
        what = "all" if count else "none"
        raise UsageError(
            f"data.val is {val:g}, which holds out {what} of {len(train)} samples",
            "give another share, or a path",
        )
    # The split of built-in data is that of the bundled models, which is older than stratification.
    labels = None if is_built_in(data) else train.labels
    rows = held_out_rows(len(train), val, labels)
    return Splits(train.subset(np.setdiff1d(np.arange(len(train)), rows)), train.subset(rows))


def _open_parts(
    data: str | Path, labelled: bool, wants_val: bool, public_only: bool
) -> tuple[MediaDataset, MediaDataset | None]:
    """Open the training data, and the validation data that lies beside it, if there is any."""
    if is_built_in(data):
        return open_dataset(data, labelled), None
    folder = Path(data)
    if (folder / "train").is_dir():
        has_val = wants_val and (folder / "val").is_dir()
        val = open_dataset(folder / "val", labelled) if has_val else None
        return open_dataset(folder / "train", labelled), val
    parquet = find_parquet(str(data), public_only=public_only)
    if parquet is None:
        return open_dataset(data, labelled, public_only=public_only), None
    train = parquet.index(parquet.split_named(TRAIN), labelled)
    name = parquet.split_named(VAL) if wants_val else None
    held_out = None if name is None else _from_index(parquet.index(name, labelled))
    return _from_index(train), held_out


def open_eval_data(data: str | Path) -> MediaDataset:
    """Open the validation data that belongs to `data`, or all of `data` if it has none.

    See `open_splits` for what `data` may be.

    Raises:
        UsageError: The data does not exist, is empty, or lacks usable labels.
    """
    check_type("data", data, (str, Path), "a path, or digits or shapes")
    data = path_of_file_url(str(data)) or data
    if is_built_in(data):
        return open_splits(data).val or open_dataset(data)
    if (Path(data) / "val").is_dir():
        return open_dataset(Path(data) / "val")
    parquet = find_parquet(str(data))
    if parquet is not None:
        return _from_index(parquet.index(parquet.split_named(VAL, TEST), labelled=True))
    return open_dataset(data)


def is_built_in(data: str | Path) -> bool:
    """Return whether this names a built-in data set. A file or folder of that name does not hide
    it, as one does not hide a model of the zoo: `./digits` is the folder."""
    return isinstance(data, str) and data in BUILT_IN


def is_url(data: str | Path) -> bool:
    """Return whether this names data at a remote place."""
    return isinstance(data, str) and (is_remote(data) or is_web(data))


def path_of(data: str | Path) -> Path:
    """Return the path of data on this machine, without the columns that are named behind it."""
    return Path(without_columns(str(data)))


def open_dataset(
    data: str | Path, labelled: bool = True, *, public_only: bool = False
) -> MediaDataset:
    """Open a whole data set.

    Args:
        data, labelled: See `open_splits`.
        public_only: Whether a URL must not lead into a private network.

    Raises:
        UsageError: The data does not exist, is empty, lacks usable labels, or is in a private
            network and must not be.
    """
    check_type("data", data, (str, Path), "a path, or digits or shapes")
    data = path_of_file_url(str(data)) or data
    path, text = Path(data), str(data)
    if is_built_in(data):
        if path.exists():
            log.info("%s is the built-in data set; ./%s is the folder of this name", text, text)
        make_sources, names = BUILT_IN[text]
        samples = make_sources()
        found = MediaDataset(samples, samples.labels, names)
    elif (index := _open_files(text, labelled, public_only)) is not None:
        found = _from_index(index)
    else:
        choices = (
            f"give a folder, a list, tar shards, Parquet files, or one of {', '.join(BUILT_IN)}"
        )
        raise UsageError(f"no data {text!r}", did_you_mean(text, BUILT_IN) or choices)
    if not len(found):
        raise UsageError(f"{text} holds no pictures or videos", "check the path")
    return found


def remap_labels(
    samples: MediaDataset,
    classes: Sequence[str] | None,
    num_classes: int | None,
    owner: str = "the model",
) -> MediaDataset:
    """Return the same samples, with their labels mapped to the class indices of a model.

    Classes are matched by name. Labels stay as they are if the data or the model has no class
    names. WordNet IDs (`n01440764`) are those of ImageNet-1k, or of a part of it, if the model has
    its classes; for another model, as many of them as it has classes are numbered in sorted order.
    Class names that are numbers are used as class indices.

    Args:
        samples: The data.
        classes: Class names of the model, if they are known.
        num_classes: Number of classes of the model.
        owner: What has these classes, for messages: the model, or other data.

    Raises:
        UsageError: The data has no labels, or classes that the model does not know.
    """
    if samples.labels is None or num_classes is None:
        raise UsageError("the data has no labels", "give class folders or a list with labels")
    names = samples.classes
    if names is None or classes is None or list(names) == list(classes):
        count = samples.num_classes or 0
        if count > num_classes:
            raise UsageError(
                f"the data has {count} classes, {owner} {num_classes}",
                f"use {'a model' if owner == 'the model' else 'data'} with the same classes",
            )
        return replace(samples, classes=classes)
    numbers = {_normalised(name): i for i, name in enumerate(classes)}
    found = [numbers.get(_normalised(name)) for name in names]
    if None in found and all(WNID.fullmatch(name) for name in names):
        found = _from_wordnet(names, classes)
    numeric = [as_class_number(name) for name in names]
    if None in found and all(number is not None and number < num_classes for number in numeric):
        found = numeric
    unknown = [name for name, number in zip(names, found, strict=True) if number is None]
    if not unknown:
        new_labels = np.array(found, np.int64)
    else:
        raise UsageError(
            f"{owner} knows no class {unknown[0]!r}"
            + (f" (and {len(unknown) - 1} more classes of the data)" if len(unknown) > 1 else ""),
            did_you_mean(unknown[0], classes)
            or "name the folders or labels like the classes of the model",
        )
    return replace(samples, labels=new_labels[samples.labels], classes=classes)


def _from_wordnet(names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """Return the class indices of WordNet IDs; None for those that the model does not know."""
    if len(classes) == 1000 and classes[0].startswith("tench"):  # in any spelling of ImageNet's
        wnids = class_labels.class_names("imagenet1k_wnids")
        known = {wnid: i for i, wnid in enumerate(wnids)}
        return [known.get(name) for name in names]
    return list(range(len(names))) if len(names) == len(classes) else [None] * len(names)


def benchmark_of(samples: MediaDataset) -> str | None:
    """Return `imagenet1k` or `kinetics400` if the data looks like that validation set."""
    classes, count = samples.classes, len(samples)
    if classes is not None and len(classes) == 1000 and all(WNID.fullmatch(c) for c in classes):
        return "imagenet1k" if count == IMAGENET_VAL else None
    if samples.num_classes == 400 and count in KINETICS_VAL:
        return "kinetics400"
    return None


# Kinds of data sets --------------------------------------------------------------------------


class _Subset(Sequence[Source]):
    """A selection of the items of another sequence."""

    def __init__(self, sources: Sequence[Source], indices: np.ndarray) -> None:
        self.sources = sources
        # Millions of them are sent to every worker on systems that cannot fork.
        small = len(sources) <= np.iinfo(np.int32).max
        self.indices = indices.astype(np.int32 if small else np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[int(self.indices[index])]


def _from_index(found: SampleIndex) -> MediaDataset:
    labels = found.labels
    return MediaDataset(found) if labels is None else MediaDataset(found, *labels)


def _open_files(text: str, labelled: bool, public_only: bool) -> SampleIndex | None:
    """Return the index of folders, lists, tar files or Parquet files; None if this names none."""
    path = Path(text)
    if is_remote(text) or is_web(text):
        return _open_remote(text, labelled, public_only)
    if path.is_dir() and any(path.glob("*.tar")):
        return index_shards(sorted(path.glob("*.tar")), labelled)
    if (parquet := find_parquet(text)) is not None:
        return parquet.index(None, labelled)
    if path.is_dir():
        return index_folder(path, labelled)
    if path.suffix == ".tar":
        return index_shards([Path(name) for name in _local_shards(text)], labelled)
    return index_list(path, labelled) if path.is_file() else None


def _local_shards(text: str) -> list[str]:
    """Return the tar files of a pattern with braces, `*` and `?`."""
    found: list[str] = []
    for name in tar_files.expand_braces(text):
        is_pattern = WILDCARD.search(name) is not None and not Path(name).exists()
        found += sorted(glob.glob(name)) if is_pattern else [name]
    if not found:
        raise UsageError(f"nothing matches {text!r}", "check the pattern")
    return found


def _open_remote(text: str, labelled: bool, public_only: bool) -> SampleIndex | None:
    if text.lower().endswith(".tar"):
        shards = list_shards(text, public_only=public_only)
        return index_remote_shards(shards, labelled, public_only=public_only)
    if text.endswith("/") and not is_web(text):
        listed = list_files(text, public_only=public_only)
        shards = [url for url in listed if url.lower().endswith(".tar")]
        if shards:
            return index_remote_shards(shards, labelled, public_only=public_only)
    parquet = find_parquet(text, public_only=public_only)
    if parquet is None:
        raise UsageError(
            f"{text} names no tar or Parquet files",
            "name shards-{000..099}.tar, a .parquet file, a folder of them that ends in /, or "
            "hf://datasets/USER/NAME; download other data",
        )
    return parquet.index(None, labelled)


def _normalised(name: str) -> str:
    """`Feeding_goats ` -> `feeding goats`. Copies of Kinetics spell their classes differently."""
    return name.strip().lower().replace("_", " ")


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
