"""Data sets: a folder of classes, a list of paths and labels, tar shards, or a built-in one.

Nothing is decoded here: a data set is a sequence of sources (see inputs.py) with class numbers.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, did_you_mean
from . import toy_datasets
from .sources import ENDINGS, Source

BUILT_IN: dict[str, Any] = {
    "digits": (toy_datasets.Digits, toy_datasets.DIGITS),
    "shapes": (toy_datasets.Shapes, toy_datasets.DIRECTIONS),
}
BUILT_IN_VAL = 0.2  # of a built-in set is held out
SPLIT_SEED = 0
HEADERS = (  # what lists call their columns
    {"path", "paths", "file", "filename", "file_name", "image", "image_path", "video", "name"},
    {"label", "labels", "class", "class_name", "category", "target", "id"},
)
WNID = re.compile(r"n\d{8}")
IMAGENET_VAL, KINETICS_VAL = 50_000, range(19_000, 20_001)  # videos keep vanishing from the latter


@dataclass(frozen=True)
class MediaDataset:
    """Sources and, where they are known, their class numbers [n] and the classes' names, or at
    least how many classes there are (None: as many as the largest number says)."""

    sources: Sequence[Source]
    labels: np.ndarray | None = None
    classes: Sequence[str] | None = None
    count: int | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def part(self, rows: Sequence[int] | np.ndarray) -> MediaDataset:
        """Some of them, in the given order."""
        labels = None if self.labels is None else self.labels[rows]
        sources = _Rows(self.sources, np.asarray(rows))
        return replace(self, sources=sources, labels=labels, count=self.num_classes)

    @property
    def num_classes(self) -> int | None:
        if self.classes is not None:
            return len(self.classes)
        if self.labels is None or self.count is not None:
            return self.count
        return int(self.labels.max(initial=-1)) + 1

    @property
    def fingerprint(self) -> str:
        """Changes with the samples' number, labels and names (some of them; without folders)."""
        places = np.linspace(0, len(self) - 1, 8).round().astype(int).tolist()
        names = [Path(self.sources[place].name).name for place in places]
        labels = b"" if self.labels is None else np.ascontiguousarray(self.labels).tobytes()
        text = json.dumps([len(self), self.num_classes, names]).encode() + labels
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """What to train on, and what to look at on the way."""

    train: MediaDataset
    val: MediaDataset | None = None


def open_splits(data: str | Path, val: str | float | None = None, labelled: bool = True) -> Splits:
    """Open training data and what is held out of it.

    Args:
        data: `digits` or `shapes`; a folder of class folders, or one with `train/` and `val/` of
            them; a list (.csv, .tsv, .txt) with `path label` lines; tar shards: a file, a folder of
            them, or a pattern `shard-{000..099}.tar`.
        val: other data of any of these kinds; or a share to hold out, drawn once and for all;
            None: what `data` itself brings (`val/`), or nothing.
        labelled: without, labels are not needed: any folder of pictures and videos will do.

    Raises:
        UsageError: there is no such data, it is empty, or it lacks labels.
    """
    folder = Path(data)
    if isinstance(val, str) and _number(val) is not None:
        val = _number(val)
    if val is None and str(data) in BUILT_IN and not folder.exists():
        val = BUILT_IN_VAL
    if (folder / "train").is_dir():
        if val is None and (folder / "val").is_dir():
            val = str(folder / "val")
        folder = folder / "train"
    train = open_dataset(folder, labelled)
    if val is None or val == 0:
        return Splits(train)
    if isinstance(val, str | Path):
        held = open_dataset(val, labelled)
        if labelled:
            held = remap_labels(held, train.classes, train.num_classes)
        return Splits(train, held)
    if not 0 < val < 1:
        raise UsageError(f"data.val is {val}", "give a share below 1, or a path")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    count = round(val * len(train))
    return Splits(train.part(np.sort(order[count:])), train.part(np.sort(order[:count])))


def open_eval_data(data: str | Path) -> MediaDataset:
    """Data to evaluate on: what `splits` holds out of it by itself, else all of it."""
    if (Path(data) / "val").is_dir():
        return open_dataset(Path(data) / "val")
    if str(data) in BUILT_IN and not Path(data).exists():
        return open_splits(data).val or open_dataset(data)
    return open_dataset(data)


def open_dataset(data: str | Path, labelled: bool = True) -> MediaDataset:
    """All of one data set; see `splits`."""
    path, text = Path(data), str(data)
    if path.is_dir() and any(path.glob("*.tar")):
        found = _from_shards(sorted(path.glob("*.tar")), labelled)
    elif path.is_dir():
        found = _from_folder(path, labelled)
    elif path.suffix == ".tar":
        found = _from_shards([Path(name) for name in _braces(text)], labelled)
    elif path.is_file():
        found = _from_list(path, labelled)
    elif text in BUILT_IN:
        sources, names = BUILT_IN[text]
        built = sources()
        found = MediaDataset(built, built.labels, names)
    else:
        hint = did_you_mean(
            text, BUILT_IN
        ) or "give a folder, a list, tar shards, or one of " + ", ".join(BUILT_IN)
        raise UsageError(f"no data {text!r}", hint)
    if not len(found):
        raise UsageError(f"{text} holds no pictures or videos", "check the path")
    return found


def remap_labels(
    samples: MediaDataset, classes: Sequence[str] | None, num_classes: int | None
) -> MediaDataset:
    """The same samples with their labels in another numbering: the model's.

    By name where the names agree; as they are where either side has numbers only; and folders named
    by WordNet's numbers in their order, which is ImageNet-1k's.

    Raises:
        UsageError: classes that the model does not know.
    """
    if samples.labels is None or num_classes is None:
        raise UsageError("the data has no labels", "give class folders or a list with labels")
    own = samples.classes
    if own is None or classes is None or list(own) == list(classes):
        count = samples.num_classes or 0
        if count > num_classes:
            raise UsageError(
                f"the data has {count} classes, the model {num_classes}", "they must be the same"
            )
        return replace(samples, classes=classes)
    number = {_plain(name): i for i, name in enumerate(classes)}
    unknown = [name for name in own if _plain(name) not in number]
    if not unknown:
        table = np.array([number[_plain(name)] for name in own], np.int64)
    elif len(own) == num_classes and all(WNID.fullmatch(name) for name in own):
        table = np.arange(num_classes)
    elif all(name.isdigit() and int(name) < num_classes for name in own):
        table = np.array([int(name) for name in own], np.int64)
    else:
        raise UsageError(
            f"the model knows no class {unknown[0]!r}"
            + (f" (nor {len(unknown) - 1} more of the data's)" if len(unknown) > 1 else ""),
            did_you_mean(unknown[0], classes) or "name the folders or labels as its classes",
        )
    return replace(samples, labels=table[samples.labels], classes=classes)


def benchmark_of(samples: MediaDataset) -> str | None:
    """`imagenet1k` or `kinetics400` when these look like its validation set."""
    classes, count = samples.classes, len(samples)
    if classes is not None and len(classes) == 1000 and all(WNID.fullmatch(c) for c in classes):
        return "imagenet1k" if count == IMAGENET_VAL else None
    if samples.num_classes == 400 and count in KINETICS_VAL:
        return "kinetics400"
    return None


# Kinds of data sets --------------------------------------------------------------------------


class _Files(Sequence[Source]):
    """Paths, as text: a million of them take little memory and cost forked workers nothing."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = np.array(paths, dtype=object)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = str(self.paths[index])
        return Source(path, path=Path(path))


class _Members(Sequence[Source]):
    """Files inside of tars: read at their place, in any order."""

    def __init__(self, members: Sequence[tuple[Path, str, int, int]]) -> None:
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        shard, name, offset, size = self.members[index]
        return Source(f"{shard}/{name}", path=shard, span=(offset, size))


class _Rows(Sequence[Source]):
    """Some rows of another sequence."""

    def __init__(self, sources: Sequence[Source], rows: np.ndarray) -> None:
        self.sources, self.rows = sources, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[int(self.rows[index])]


def _from_folder(folder: Path, labelled: bool) -> MediaDataset:
    if not labelled:
        return MediaDataset(_Files(list(_media(folder))))
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
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
    """Pictures and videos in a folder and those within it, in name order; hidden ones left out."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in ENDINGS and not hidden:
            yield str(path)


def _from_list(path: Path, labelled: bool) -> MediaDataset:
    """`path label` lines, separated by comma, tab or space; paths are relative to the list."""
    paths, words = [], []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, row in enumerate(_rows_of(file, path.suffix), start=1):
                if not row or not row[0] or (line == 1 and _is_header(row, path.parent)):
                    continue
                if labelled and len(row) < 2:
                    raise UsageError(f"{path}: line {line} has no label", "write `path label`")
                paths.append(str(path.parent / row[0]))
                words.append(row[1] if len(row) > 1 else "")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if not labelled:
        return MediaDataset(_Files(paths))
    labels, classes = _numbered(words)
    return MediaDataset(_Files(paths), labels, classes)


def _rows_of(file: Iterable[str], ending: str) -> Iterable[list[str]]:
    """Cells of each line. The first line tells what separates them: in .csv commas if it has any;
    elsewhere tabs or spaces if it has any."""
    lines = iter(file)
    first = next(lines, "")
    everything = itertools.chain([first], lines)
    if "," in first and (ending == ".csv" or not re.search(r"\s", first.strip())):
        rows: Iterable[list[str]] = csv.reader(everything, skipinitialspace=True)
    else:  # the label is the last word: names may hold spaces
        separator = "\t" if "\t" in first else None
        rows = (line.strip("\r\n").rsplit(separator, 1) for line in everything)
    yield from ([cell.strip() for cell in row] for row in rows)


def _is_header(row: list[str], folder: Path) -> bool:
    """A first line that names the columns, and no file."""
    words = [cell.lower() for cell in row[:2]]
    names = words[0] in HEADERS[0] and (len(words) < 2 or words[1] in HEADERS[1])
    return names and not (folder / row[0]).exists()


def _from_shards(shards: Sequence[Path], labelled: bool) -> MediaDataset:
    """webdataset's form: files with one name but for the ending are a sample; `.cls` holds its
    label. Only headers are read here."""
    members, words = [], []
    for shard in shards:
        media: dict[str, tuple[Path, str, int, int]] = {}
        labels: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for entry in archive:
                    key, _, ending = entry.name.rpartition("/")[2].partition(".")
                    key = f"{entry.name.rpartition('/')[0]}/{key}"
                    if f".{ending.rpartition('.')[2].lower()}" in ENDINGS:
                        media[key] = (shard, entry.name, entry.offset_data, entry.size)
                    elif ending == "cls" and (content := archive.extractfile(entry)):
                        labels[key] = content.read().decode("utf-8", "replace").strip()
        except (OSError, tarfile.TarError) as error:
            raise UsageError(f"{shard} cannot be read ({error})", "fetch it again") from error
        lacking = [name for name in media if labelled and name not in labels]
        if lacking:
            raise UsageError(f"{shard}: {media[lacking[0]][1]} has no label", "add a .cls file")
        members += list(media.values())
        words += [labels.get(key, "") for key in media]
    if not labelled:
        return MediaDataset(_Members(members))
    return MediaDataset(_Members(members), *_numbered(words))


def _numbered(words: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    """Class numbers as they are; names by their order in the alphabet."""
    if all(word.isdigit() for word in words):
        return np.array([int(word) for word in words], np.int64), None
    classes = sorted(set(words))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[word] for word in words], np.int64), classes


def _braces(text: str) -> list[str]:
    """`a-{00..12}.tar` -> a-00.tar, a-01.tar, ..."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [text]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [text[: found.start()] + f"{n:0{len(first)}}" + text[found.end() :] for n in numbers]


def _plain(name: str) -> str:
    """Kinetics writes `abseiling` and `feeding_goats` as it likes."""
    return name.strip().lower().replace("_", " ")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
