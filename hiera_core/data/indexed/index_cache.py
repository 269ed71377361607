"""Indices on disk, so that a data set of millions of samples is listed once.

An index is known by what was asked for (the path, whether labels are read) and holds what tells
whether it is still right: a stamp of the files that it was made from, such as their sizes and
times, and the times of folders. Small data sets are listed each time, and nothing is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...atomic import atomic_file
from ...atomic.lock import exclusive, share, try_lock
from ...errors import OutputError, UsageError
from .sample_index import IndexWriter, Kind, SampleIndex
from .sections import SectionsInFile, write_sections

FOLDER_VARIABLE = "HIERA_INDEX_FOLDER"
VERSION = 2  # of the format, and of how lists are read
ENDING, CONTENT_ENDING = ".index", ".content"
KEPT_SAMPLES = 50_000  # an index of as many samples is kept for the next run
UNUSED_S = 90 * 24 * 3600.0  # an index that was not opened for so long is removed
# A folder that was changed just before it was listed may change again without another time.
CLOCK_NS = 2_000_000_000
# What reading a file raises that is no index, or a damaged one.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)
OUR_NAMES = re.compile(r"[0-9a-f]{32}(\.index|-[0-9a-f]{8}\.content)")
WAIT_S = 0.2  # between looks at an index that another process builds
Stamp = Any  # what tells whether an index is still right: strings and numbers, in lists
log = logging.getLogger("hiera")


def default_folder() -> Path:
    """Return the folder of indices: that of the variable HIERA_INDEX_FOLDER, or one in the user's
    cache folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or Path.home() / ".cache") / "hiera" / "indices"


class IndexRequest:
    """An index that is wanted: what of, and how it is built.

    Args:
        kind: See `IndexWriter`.
        name: What the samples are of: an absolute path, or a URL.
        labelled: Whether labels are read.
        stamp: What the index depends on. One that was kept with another stamp is built again.
        build: Adds all samples to a writer. It calls `Building.begin_large` if that takes long.
        always_kept: Whether it is kept on disk, however few its samples are.
        parts: What else it is known by, such as the names of all files. Indices with other parts
            are kept beside it.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        labelled: bool,
        stamp: Stamp,
        build: Callable[[IndexWriter], None],
        *,
        always_kept: bool = False,
        parts: Stamp = None,
    ) -> None:
        self.kind, self.name, self.labelled = kind, name, labelled
        self.stamp = json.loads(json.dumps(stamp))
        self.build, self.always_kept = build, always_kept
        key = json.dumps([VERSION, kind, name, labelled, parts])
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self.path = default_folder() / f"{digest}{ENDING}"

    def open(self) -> SampleIndex:
        """Return the index: the one that was kept, if it is still right, or a new one.

        Raises:
            UsageError, OSError: What `build` raises.
        """
        kept = self._kept()
        if kept is not None:
            return kept
        with contextlib.ExitStack() as stack:
            if self.always_kept and (kept := self._begin(stack)) is not None:
                return kept
            writer = _LimitedWriter(self, stack)
            stack.callback(writer.close)
            begun_ns = time.time_ns()
            try:
                self.build(writer)
            except _BuiltElsewhere as elsewhere:
                return elsewhere.index
            if not self.always_kept and writer.count < KEPT_SAMPLES:
                return writer.in_memory()
            return self._keep(writer, begun_ns)

    def _kept(self) -> SampleIndex | None:
        """Return the index that was kept, or None if there is none, or it is not right any more."""
        try:
            sections = SectionsInFile(self.path)
            found = SampleIndex(sections)
            facts = sections.facts
            if facts["stamp"] != self.stamp or facts["name"] != self.name:
                return None
            if facts["content"] and not Path(facts["content"]).is_file():
                return None
            for place, time_ns in found.places():
                if time_ns and not _is_unchanged(place, time_ns, facts["begun_ns"]):
                    return None
            _hold_content(found, facts["content"])
        except FileNotFoundError:
            return None
        except (OSError, *DAMAGED) as error:
            log.debug("the index %s is built again (%s)", self.path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it was used; the time of its images tells whether these are new
        return found

    def _begin(self, stack: contextlib.ExitStack) -> SampleIndex | None:
        """Hold the lock of the index until `stack` closes. If another process holds it, wait, and
        return the index that it has built."""
        waits = False
        while True:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.path))
                return self._kept()  # another process may have built it just now
            except (OSError, OutputError):
                return None  # a folder that cannot be written: the index is not kept
            except UsageError as error:
                if not error.message.startswith("another process"):
                    return None
                if not waits:
                    log.info("waiting for the index of %s: %s", self.name, error.message)
                waits = True
            time.sleep(WAIT_S)
            if (kept := self._kept()) is not None:
                return kept

    def _keep(self, writer: IndexWriter, begun_ns: int) -> SampleIndex:
        """Write an index to disk, and open it. If that fails, it is held in memory."""
        facts = writer.facts()
        facts |= {"name": self.name, "stamp": self.stamp, "begun_ns": begun_ns}
        try:
            with atomic_file(self.path) as temporary:
                write_sections(temporary, facts, writer.sections)
            _remove_unused(self.path.parent)
            for other in self.path.parent.glob(f"{self.path.stem}-*{CONTENT_ENDING}"):
                if str(other) != facts["content"]:
                    _remove(other)
            found = SampleIndex(SectionsInFile(self.path))
            _hold_content(found, facts["content"])
            return found
        except (OSError, OutputError, ValueError) as error:
            log.warning("the index of %s is not kept for the next run: %s", self.name, error)
            return writer.in_memory()


class _BuiltElsewhere(Exception):
    """Another process has built the index in the meantime."""

    def __init__(self, index: SampleIndex) -> None:
        super().__init__()
        self.index = index


class _LimitedWriter(IndexWriter):
    """A writer that claims the file of the index when its samples have become many."""

    def __init__(self, request: IndexRequest, stack: contextlib.ExitStack) -> None:
        super().__init__(request.kind, request.labelled, folder=request.path.parent)
        self._request, self._stack = request, stack

    def add(
        self, place: int, name: str, label: str | int | None, offset: int = -1, size: int = -1
    ) -> None:
        """See `IndexWriter.add`."""
        super().add(place, name, label, offset, size)
        if self.count == KEPT_SAMPLES and not self._request.always_kept:
            log.info("indexing %s, which is done once", self._request.name)
            found = self._request._begin(self._stack)
            if found is not None:
                raise _BuiltElsewhere(found)


def stamp_of(path: Path) -> list[int]:
    """Return size and time of a file.

    Raises:
        OSError: There is none.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _is_unchanged(folder: str, time_ns: int, begun_ns: int) -> bool:
    """Return whether a folder has the names that it had when it was listed."""
    try:
        now = Path(folder).stat().st_mtime_ns
    except OSError:
        return False
    return now == time_ns and time_ns < begun_ns - CLOCK_NS


def _remove_unused(folder: Path) -> None:
    """Remove indices that were not opened for a long time, with the images of Parquet files."""
    for path in _files(folder):
        index = folder / f"{path.name[:32]}{ENDING}"  # images are used when their index is
        with contextlib.suppress(OSError):
            used = max(each.stat().st_mtime for each in (path, index) if each.exists())
            if time.time() - used > UNUSED_S:
                _remove(path)


def _hold_content(index: SampleIndex, content: str) -> None:
    """Keep the images of an index from being removed, as long as this process has the index.

    Raises:
        OSError: They are not there any more.
    """
    if content:
        handle = os.open(content, os.O_RDONLY)
        weakref.finalize(index, os.close, handle)
        if not share(handle) or not os.fstat(handle).st_nlink:  # it is just being removed
            raise FileNotFoundError(content)


def _remove(path: Path) -> None:
    """Remove a file, unless a process has the index of its images."""
    with contextlib.suppress(OSError):
        if os.name == "nt":  # which has no such locks, and does not remove open files
            path.unlink()
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            if try_lock(handle):
                path.unlink()
        finally:
            os.close(handle)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*"):
        if OUR_NAMES.fullmatch(path.name):  # the folder may hold files of the user
            yield path
