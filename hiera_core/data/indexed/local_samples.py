"""Indices of samples on this machine: folders of files, lists, tar files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UsageError
from .. import tar_files
from ..list_files import open_list
from ..media_types import ENDINGS
from .index_cache import IndexRequest, stamp_of
from .sample_index import IndexWriter, SampleIndex


def index_folder(folder: Path, labelled: bool) -> SampleIndex:
    """Index the images and videos in a folder, and in the folders within it, in name order. With
    labels, its folders are the classes.

    Links are followed. Hidden files and folders are left out.

    Raises:
        UsageError: There are files, but no class folders.
        OSError: A folder cannot be read.
    """

    def build(writer: IndexWriter) -> None:
        if not labelled:
            _add_folder(writer, folder, None)
            return
        here = folder.resolve()
        writer.add_place(str(folder), folder.stat().st_mtime_ns)
        inner = [p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."]
        # A link to a folder that this one lies in is no class.
        classes = sorted(p.name for p in inner if not here.is_relative_to(p.resolve()))
        for number, name in enumerate(classes):
            _add_folder(writer, folder / name, number)
        if not writer.count and any(True for _ in _walk(folder)):
            raise UsageError(
                f"{folder} has no class folders", "put each class into a folder of its own"
            )
        writer.classes = classes

    return IndexRequest("files", str(folder.absolute()), labelled, str(folder), build).open()


def _add_folder(writer: IndexWriter, folder: Path, label: int | None) -> None:
    place, path = -1, ""
    for here, name, time_ns in _walk(folder):
        if here != path or name is None:
            path, place = here, writer.add_place(here, time_ns)
        if name is not None:
            writer.add(place, name, label)


def _walk(folder: Path) -> Iterator[tuple[str, str | None, int]]:
    """Yield each folder, its path, None, and its time; and its images and videos: the path of the
    folder, the name of the file, and the time of the folder.

    They come in the order of their paths, part by part. A folder that several links lead to, or
    that lies within itself by a link, is entered once.

    Raises:
        OSError: A folder cannot be read.
    """
    entered: set[tuple[int, int]] = set()
    opened = [_Folder(folder)]
    while opened:
        here = opened[-1]
        if here.names is None:
            found = here.path.stat()  # before it is listed, so that a change in between is noticed
            here.time_ns = found.st_mtime_ns
            if (found.st_dev, found.st_ino) in entered:
                opened.pop()
                continue
            entered.add((found.st_dev, found.st_ino))
            here.list_names()
            yield str(here.path), None, here.time_ns
        name = next(here.names or iter(()), None)
        if name is None:
            opened.pop()
        elif name in here.folders:
            opened.append(_Folder(here.path / name))
        else:
            yield str(here.path), name, here.time_ns


class _Folder:
    """A folder that is gone through, in the order of the names in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.time_ns = path, 0
        self.names: Iterator[str] | None = None  # of its images, videos and folders
        self.folders: set[str] = set()

    def list_names(self) -> None:
        with os.scandir(self.path) as entries:
            names = []
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if _is_folder(entry):
                    self.folders.add(entry.name)
                    names.append(entry.name)
                elif Path(entry.name).suffix.lower() in ENDINGS:
                    names.append(entry.name)
        self.names = iter(sorted(names))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, or to itself
        return False


def index_list(path: Path, labelled: bool) -> SampleIndex:
    """Index the files of a list. See `open_list`.

    Raises:
        UsageError: The list cannot be read, or lacks labels.
    """
    opened = open_list(path, labelled)

    def build(writer: IndexWriter) -> None:
        place = writer.add_place(str(opened.base))
        for name, label in opened.files:
            writer.add(place, name, label if labelled else None)

    # Where the files of a list are depends on those that exist, also if the list stays the same.
    try:
        stamp = [*stamp_of(path), opened.example]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    return IndexRequest("files", str(path.absolute()), labelled, stamp, build).open()


def index_shards(shards: Sequence[Path], labelled: bool) -> SampleIndex:
    """Index the members of tar files in the format of webdataset; see `tar_files.read_samples`.

    Raises:
        UsageError: A tar file cannot be read, or a sample lacks its label.
    """

    def build(writer: IndexWriter) -> None:
        for shard in shards:
            try:
                samples = tar_files.read_samples(shard, labelled)
            except (OSError, tarfile.TarError) as error:
                raise UsageError(f"{shard} cannot be read ({error})", "get it again") from error
            add_shard(writer, str(shard), samples)

    try:
        stamp = [[str(shard), *stamp_of(shard)] for shard in shards]
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror})", "get it again"
        ) from error
    name = f"{shards[0].absolute()} and {len(shards) - 1} more tar files"
    parts = [str(shard.absolute()) for shard in shards]
    return IndexRequest("members", name, labelled, stamp, build, parts=parts).open()


def add_shard(
    writer: IndexWriter, shard: str, samples: Sequence[tuple[tar_files.Member, str | None]]
) -> None:
    """Add the samples of a tar file to an index.

    Raises:
        UsageError: A sample is stored as a sparse file, or lacks its label.
    """
    place = writer.add_place(shard)
    for member, label in samples:
        if member.is_sparse:
            raise UsageError(f"{shard}: {member.name} {tar_files.SPARSE}", tar_files.SPARSE_HINT)
        if writer.labelled and label is None:
            raise UsageError(f"{shard}: {member.name} has no label", "add a .cls file")
        writer.add(place, member.name, label, member.offset, member.size)
