"""Data sets: class folders, lists of paths and labels, tar shards, and the built-in toy data sets.

A data set is a sequence of sources (see sources.py) with class indices. Nothing is decoded here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, check_type, did_you_mean
from ..zoo import labels as class_labels
from . import folders, tar_files, toy_datasets
from .classes.class_balance import held_out_rows
from .list_files import as_class_number, read_list
from .sources import Source

log = logging.getLogger("hiera")
BUILT_IN: dict[str, Any] = {
    "digits": (toy_datasets.Digits, toy_datasets.DIGITS),
    "shapes": (toy_datasets.Shapes, toy_datasets.DIRECTIONS),
}
BUILT_IN_VAL = 0.2  # share of a built-in data set that is held out for validation
MAX_CLASSES = 100_000  # a model has a weight for each; or ten for each sample, if that is more
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


def open_splits(data: str | Path, val: str | float | None = None, labelled: bool = True) -> Splits:
    """Open training and validation data.

    Args:
        data: The text `digits` or `shapes`, also if a file has this name (`./digits` and a `Path`
            are the file); a folder of class folders, or one with such folders in `train/`
            and `val/`; a list (.csv, .tsv, .txt) with `path label` lines; or tar shards as a file,
            a folder, or a pattern such as `shard-{000..099}.tar`.
        val: Validation data of any of these kinds, or a share of `data` to hold out (the same
            samples every time; if they have labels, the same share of each class). None: `val/` in
            `data`, a fifth of a built-in data set, or nothing.
        labelled: Whether labels are needed. If not, any folder of images and videos will do.

    Raises:
        UsageError: The data does not exist, is empty, or lacks usable labels.
    """
    folder = Path(data)
    if isinstance(val, str) and _as_number(val) is not None:
        val = _as_number(val)
    if is_built_in(data):
        val = BUILT_IN_VAL if val is None else val
    elif (folder / "train").is_dir():
        if val is None and (folder / "val").is_dir():
            val = str(folder / "val")
        folder = folder / "train"
    train = open_dataset(data if is_built_in(data) else folder, labelled)
    if val is None or val == 0:
        return Splits(train)
    if isinstance(val, str | Path):
        held_out = open_dataset(val, labelled)
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


def open_eval_data(data: str | Path) -> MediaDataset:
    """Open the validation data that belongs to `data`, or all of `data` if it has none.

    See `open_splits` for what `data` may be.

    Raises:
        UsageError: The data does not exist, is empty, or lacks usable labels.
    """
    check_type("data", data, (str, Path), "a path, or digits or shapes")
    if is_built_in(data):
        return open_splits(data).val or open_dataset(data)
    if (Path(data) / "val").is_dir():
        return open_dataset(Path(data) / "val")
    return open_dataset(data)


def is_built_in(data: str | Path) -> bool:
    """Return whether this names a built-in data set. A file or folder of that name does not hide
    it, as one does not hide a model of the zoo: `./digits` is the folder."""
    return isinstance(data, str) and data in BUILT_IN


def open_dataset(data: str | Path, labelled: bool = True) -> MediaDataset:
    """Open a whole data set.

    Args:
        data, labelled: See `open_splits`.

    Raises:
        UsageError: The data does not exist, is empty, or lacks usable labels.
    """
    check_type("data", data, (str, Path), "a path, or digits or shapes")
    path, text = Path(data), str(data)
    if is_built_in(data):
        if path.exists():
            log.info("%s is the built-in data set; ./%s is the folder of this name", text, text)
        make_sources, names = BUILT_IN[text]
        samples = make_sources()
        found = MediaDataset(samples, samples.labels, names)
    elif path.is_dir() and any(path.glob("*.tar")):
        found = _from_shards(sorted(path.glob("*.tar")), labelled)
    elif path.is_dir():
        found = _from_folder(path, labelled)
    elif path.suffix == ".tar":
        found = _from_shards([Path(name) for name in tar_files.expand_braces(text)], labelled)
    elif path.is_file():
        found = _from_list(path, labelled)
    else:
        choices = f"give a folder, a list, tar shards, or one of {', '.join(BUILT_IN)}"
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


class _Files(Sequence[Source]):
    """Files by path.

    Paths are held as strings, which take less memory than `Path` objects.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = np.array(paths, dtype=object)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = str(self.paths[index])
        return Source(path, path=Path(path))


class _Members(Sequence[Source]):
    """Files within tar files, each with its shard, name, offset and size, for random access."""

    def __init__(self, members: Sequence[tuple[Path, str, int, int]]) -> None:
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        shard, name, offset, size = self.members[index]
        return Source(f"{shard}/{name}", path=shard, span=(offset, size))


class _Subset(Sequence[Source]):
    """A selection of the items of another sequence."""

    def __init__(self, sources: Sequence[Source], indices: np.ndarray) -> None:
        self.sources, self.indices = sources, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[int(self.indices[index])]


def _from_folder(folder: Path, labelled: bool) -> MediaDataset:
    if not labelled:
        return MediaDataset(_Files(list(_media(folder))))
    here = folder.resolve()
    inner = [p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."]
    # A link to a folder that this one lies in is no class.
    classes = sorted(p.name for p in inner if not here.is_relative_to(p.resolve()))
    paths: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = list(_media(folder / name))
        paths += found
        labels += [number] * len(found)
    if not paths and any(True for _ in _media(folder)):
        raise UsageError(
            f"{folder} has no class folders", "put each class into a folder of its own"
        )
    return MediaDataset(_Files(paths), np.array(labels, np.int64), classes)


def _media(folder: Path) -> Iterable[str]:
    """Return the images and videos in a folder and in the folders within it, in name order.

    Links are followed. Hidden files and folders are left out.
    """
    return map(str, sorted(folders.find_files(folder, recursive=True)))


def _from_list(path: Path, labelled: bool) -> MediaDataset:
    listed = read_list(path, labelled)
    sources = _Files([str(file.path) for file in listed])
    if not labelled:
        return MediaDataset(sources)
    return MediaDataset(sources, *_number_labels([file.label for file in listed]))


def _from_shards(shards: Sequence[Path], labelled: bool) -> MediaDataset:
    """Read the headers of tar files in the format of webdataset.

    Files with the same name up to the first dot are one sample. Its `.cls` file holds the label.
    """
    members, words = [], []
    for shard in shards:
        try:
            found = list(tar_files.read_members(shard))
            labels = tar_files.read_labels(shard) if labelled else {}
        except (OSError, tarfile.TarError) as error:
            raise UsageError(f"{shard} cannot be read ({error})", "get it again") from error
        if sparse := [member.name for member in found if member.is_sparse]:
            raise UsageError(f"{shard}: {sparse[0]} {tar_files.SPARSE}", tar_files.SPARSE_HINT)
        found = list({member.key: member for member in found}.values())
        unlabelled = [member for member in found if labelled and member.key not in labels]
        if unlabelled:
            raise UsageError(f"{shard}: {unlabelled[0].name} has no label", "add a .cls file")
        members += [(shard, member.name, member.offset, member.size) for member in found]
        words += [labels.get(member.key, "") for member in found]
    if not labelled:
        return MediaDataset(_Members(members))
    return MediaDataset(_Members(members), *_number_labels(words))


def _number_labels(words: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    """Return class indices and class names.

    If all labels are numbers, these are the class indices, and there are no names. Otherwise
    classes are numbered in alphabetical order.

    Raises:
        UsageError: A number is too large for a class index.
    """
    numbers = [as_class_number(word) for word in words]
    if None not in numbers:
        largest = max(numbers, key=lambda number: number or 0, default=0) or 0
        if largest >= max(MAX_CLASSES, 10 * len(words)):
            raise UsageError(f"label {largest} is no class number", "number classes from 0 on")
        return np.array(numbers, np.int64), None
    classes = sorted(set(words))
    indices = {name: i for i, name in enumerate(classes)}
    return np.array([indices[word] for word in words], np.int64), classes


def _normalised(name: str) -> str:
    """`Feeding_goats ` -> `feeding goats`. Copies of Kinetics spell their classes differently."""
    return name.strip().lower().replace("_", " ")


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
