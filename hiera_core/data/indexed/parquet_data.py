"""Data sets of Parquet files: which files they have, and to which split each of them belongs."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import UsageError, did_you_mean
from ...places.remote_requests import is_remote, is_web
from ..media_types import ENDINGS
from . import hub_datasets
from .parquet_images import TableFile, holds_images, index_parquet
from .remote_shards import WILDCARD, list_files
from .sample_index import SampleIndex

TRAIN, VAL = ("train", "training"), ("validation", "valid", "val", "dev")
TEST = ("test", "testing")
NUMBERED = re.compile(r"(.+?)-\d{3,6}-of-\d{3,6}(-[0-9a-f]+)?")  # as `datasets` names its files
KNOWN = re.compile(rf"({'|'.join((*TRAIN, *VAL, *TEST))})([-_.].*)?")
COLUMNS = re.compile(r"(?P<data>.+?)\?(?P<columns>(image|label)=[^?&=]+(&(image|label)=[^?&=]+)?)")
ENDING = ".parquet"


@dataclass(frozen=True)
class ParquetData:
    """Parquet files by their splits.

    Args:
        name: What the user wrote, for messages.
        splits: The files of each split, in order.
        image, label: Names of columns, if the user has named them.
    """

    name: str
    splits: Mapping[str, Sequence[TableFile]]
    image: str | None = None
    label: str | None = None

    def split_named(self, *names: Sequence[str]) -> str | None:
        """Return the first of these splits that there is."""
        return next((n for group in names for n in group if n in self.splits), None)

    def index(self, split: str | None, labelled: bool) -> SampleIndex:
        """Return the index of a split; None: the only one.

        Raises:
            UsageError: There are several, and none is named; see also `index_parquet`.
        """
        if split is None and len(self.splits) > 1:
            raise UsageError(
                f"{self.name} holds the splits {', '.join(self.splits)}",
                f"name one: {self._name_of(next(iter(self.splits)))}",
            )
        chosen = next(iter(self.splits)) if split is None else split
        return index_parquet(self.splits[chosen], labelled, self.image, self.label)

    def _name_of(self, split: str) -> str:
        """Return what the user can write for a split."""
        if hub_datasets.parse(self.name) is not None:
            return f"{self.name.rstrip('/')}/{split}"
        first = self.splits[split][0].name
        if len(self.splits[split]) == 1:
            return first
        file = re.split(r"[\\/]", first)[-1]
        return first.removesuffix(file) + (f"{split}*" if file.startswith(split) else "*") + ENDING


def find_parquet(data: str, *, public_only: bool = False) -> ParquetData | None:
    """Return the Parquet files that a text names, or None if it names none.

    Args:
        data: A file, a folder with such files (in it, or in its folder `data`), a pattern of files,
            or a URL of these; or `hf://datasets/user/name[@revision][/split]`. `?image=COLUMN`
            and `?label=COLUMN&image=COLUMN` at the end name columns.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError, HubError: The place cannot be read, or has no such split.
    """
    named = COLUMNS.fullmatch(data)
    columns: dict[str, str] = {}
    text = data
    if named is not None and not Path(data).exists():
        text = named["data"]
        columns = dict(part.split("=") for part in named["columns"].split("&"))
    hub = hub_datasets.parse(text)
    inner = "" if hub is None else hub.inner
    if hub is not None:
        files = hub.files()
    elif is_remote(text) or is_web(text):
        files = _remote_files(text, public_only)
    else:
        files = _local_files(text)
    if not files:
        if columns:
            raise UsageError(f"{text} names no Parquet files", "check the path")
        return None
    if hub is None and text.lower().endswith(ENDING):  # files that the user has chosen
        return ParquetData(text, {TRAIN[0]: [*files.values()]}, **columns)
    return ParquetData(text, split_files(text, files, inner), **columns)


def without_columns(data: str) -> str:
    """Return what a text names, without the columns that `?label=` and `?image=` name behind it."""
    named = COLUMNS.fullmatch(data)
    return data if named is None or Path(data).exists() else named["data"]


def split_files(
    name: str, files: Mapping[str, TableFile], wanted: str = ""
) -> dict[str, list[TableFile]]:
    """Return the files by the splits that their names tell.

    Args:
        name: The data set, for messages.
        files: The files, by their paths within the data set.
        wanted: A split, a configuration, both with a `/`, a folder, or a file; "" for all.

    Raises:
        UsageError: There is nothing of this name, or there are several configurations.
    """
    found: dict[str, dict[str, list[TableFile]]] = {}  # by configuration and split
    for path in sorted(files):
        config, split = _place_of(path)
        full = f"{config}/{split}" if config else split
        is_wanted = wanted in ("", split, config, full) or path.startswith(f"{wanted}/")
        if is_wanted or fnmatch.fnmatchcase(path, wanted):
            found.setdefault(config, {}).setdefault(split, []).append(files[path])
    if not found:
        known = sorted({_place_of(path)[1] for path in files})
        hint = did_you_mean(wanted, known) or f"it has the splits {', '.join(known)}"
        raise UsageError(f"{name}: there is no {wanted!r} in the data set", hint)
    if len(found) > 1:
        base = name.removesuffix(f"/{wanted}") if wanted else name.rstrip("/")
        configs = sorted(filter(None, found))  # "": files that are in no folder
        ending = "/" if "://" in name and hub_datasets.parse(name) is None else ""
        raise UsageError(
            f"{name} holds several configurations ({', '.join(configs)})"
            + (", and files beside them" if "" in found else ""),
            f"name one: {base}/{configs[0]}{ending}",
        )
    return next(iter(found.values()))


def _place_of(path: str) -> tuple[str, str]:
    """Return the configuration ("" for the only one) and the split of a file."""
    parts = PurePosixPath(path)
    folders = [part for part in parts.parts[:-1] if part != "data"]
    stem = parts.stem
    if numbered := NUMBERED.fullmatch(stem):
        split = numbered[1]
    elif known := KNOWN.fullmatch(stem):
        split = known[1]
    elif folders and (stem.isdigit() or KNOWN.fullmatch(folders[-1])):
        split = folders.pop()
    else:
        split = TRAIN[0]
    return "/".join(folders), split


def _local_files(text: str) -> dict[str, TableFile]:
    path = Path(text)
    if path.is_dir():
        found = [*path.glob(f"*{ENDING}"), *path.glob(f"data/*{ENDING}")]
        found = [each for each in found if each.name[0] not in "._"]
        files = {each.relative_to(path).as_posix(): TableFile.at(str(each)) for each in found}
        # Tables may lie beside pictures, such as the features of these.
        is_other = files and _may_hold_pictures(path) and not any(map(holds_images, files.values()))
        return {} if is_other else files
    if path.suffix.lower() != ENDING:
        return {}
    if not path.exists() and WILDCARD.search(text):
        return {each: TableFile.at(each) for each in sorted(glob.glob(text))}
    return {path.name: TableFile.at(text)}


def _may_hold_pictures(folder: Path) -> bool:
    """Return whether a folder holds pictures, videos or class folders."""
    return any(
        each.suffix.lower() in ENDINGS or (each.name != "data" and each.is_dir())
        for each in folder.iterdir()
        if each.name[0] != "."
    )


def _remote_files(url: str, public_only: bool) -> dict[str, TableFile]:
    if url.endswith("/") and not is_web(url):
        listed = list_files(url, recursive=True, public_only=public_only)
        found = [each for each in listed if each.endswith(ENDING)]
    elif not url.lower().endswith(ENDING):
        return {}
    else:
        is_pattern = WILDCARD.search(url) is not None
        found = list_files(url, public_only=public_only) if is_pattern else [url]
    files = {each: TableFile.at(each, public_only=public_only) for each in found}
    return {name.removeprefix(url).lstrip("/"): file for name, file in files.items()}
