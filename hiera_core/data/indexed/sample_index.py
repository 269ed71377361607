"""What every sample of a data set is: a row of numbers, and a name in one buffer of bytes.

Millions of samples are so a few sections (see sections.py), and no list of strings or objects.
"""

from __future__ import annotations

import operator
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ...errors import UsageError
from ..list_files import as_class_number
from ..sources import Source
from .sections import Sections, SectionsInMemory, SectionWriter

# A sample: where its name begins, its offset and size within its place (-1: it is a file of its
# own), the length of its name, and the number of its place.
ROW = struct.Struct("<qqqii")
# A place, which is a folder, a tar file or a URL: where its name begins, its time in nanoseconds
# when it was read (0: that does not matter), and the length of its name.
PLACE = struct.Struct("<qqi")
LABEL_BYTES = 8
MAX_LABEL = (1 << 63) - 1
KEPT_PLACES = 1024  # names of places that are kept in memory
MAX_CLASSES = 100_000  # a model has a weight for each; or ten for each sample, if that is more
Kind = Literal["files", "members", "parquet"]


class Labels(NamedTuple):
    """Labels of an index.

    Attributes:
        numbers: Class indices, int64 [n].
        classes: Names of the classes, if they are known.
    """

    numbers: np.ndarray
    classes: list[str] | None


class SampleIndex(Sequence[Source]):
    """The samples of a data set, which become sources when they are asked for.

    A process that opens it gets no copy of the samples: see sections.py.

    Attributes:
        labels: The labels, if they are known.
        public_only: Whether URLs of samples must not lead into private networks; see `Source`.

    Raises:
        ValueError: The sections are not as long as the index says.
    """

    def __init__(self, sections: Sections) -> None:
        self._sections, self._places = sections, dict[int, str]()
        self.public_only = False
        facts = sections.facts
        sizes = {"rows": facts["count"] * ROW.size, "places": facts["places"] * PLACE.size}
        if facts["labelled"]:
            sizes["labels"] = facts["count"] * LABEL_BYTES
        if any(sections.size(name) != size for name, size in sizes.items()):
            raise ValueError("it is damaged")
        self._count: int = facts["count"]
        self._kind: Kind = facts["kind"]
        self._content: str = facts.get(
            "content", ""
        )  # the file that holds all samples, if one does

    @property
    def labels(self) -> Labels | None:
        """The labels, if they are known."""
        if not self._sections.facts["labelled"]:
            return None
        return Labels(self._sections.array("labels", np.int64), self._sections.facts["classes"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        number = operator.index(index)
        number += self._count if number < 0 else 0
        if not 0 <= number < self._count:
            raise IndexError(f"{index} of {self._count} samples")
        row = self._sections.read("rows", number * ROW.size, ROW.size)
        start, offset, size, length, place_number = ROW.unpack(row)
        name = _decoded(self._sections.read("names", start, length))
        place = self._place(place_number)
        if self._kind == "files":
            path = Path(place) / name
            return Source(str(path), path=path)
        if self._kind == "parquet":
            return Source(f"{place}/{name}", path=Path(self._content), span=(offset, size))
        if "://" in place:
            span, public_only = (offset, size), self.public_only
            return Source(f"{place}/{name}", url=place, span=span, public_only=public_only)
        return Source(f"{place}/{name}", path=Path(place), span=(offset, size))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}}

    def places(self) -> Iterator[tuple[str, int]]:
        """Yield the places, and their times in nanoseconds; see `PLACE`."""
        for number in range(self._sections.facts["places"]):
            row = self._sections.read("places", number * PLACE.size, PLACE.size)
            start, time_ns, length = PLACE.unpack(row)
            yield _decoded(self._sections.read("names", start, length)), time_ns

    def _place(self, number: int) -> str:
        if number not in self._places:
            if len(self._places) >= KEPT_PLACES:
                self._places.clear()
            row = self._sections.read("places", number * PLACE.size, PLACE.size)
            start, _, length = PLACE.unpack(row)
            self._places[number] = _decoded(self._sections.read("names", start, length))
        return self._places[number]


class IndexWriter:
    """Writes the samples of a data set one after another. Its memory does not grow with them.

    Args:
        kind: What the samples are: `files`, `members` of tar files, or images of `parquet` files.
        labelled: Whether the samples have labels.
        classes: Names of the classes, if labels are numbers of these.
        folder: Folder of temporary files.
    """

    def __init__(
        self,
        kind: Kind,
        labelled: bool,
        classes: Sequence[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.kind, self.labelled, self.count = kind, labelled, 0
        self.classes = None if classes is None else list(classes)
        self.sections = {
            name: SectionWriter(folder) for name in ("names", "rows", "places", "labels")
        }
        self.content = ""
        self._places, self._largest = 0, 0
        self._words: dict[str, int] = {}  # labels that are words, numbered as they come

    def add_place(self, name: str, time_ns: int = 0) -> int:
        """Add a place, and return its number; see `PLACE`."""
        encoded = _encoded(name)
        start = self.sections["names"].write(encoded)
        self.sections["places"].write(PLACE.pack(start, time_ns, len(encoded)))
        self._places += 1
        return self._places - 1

    def add(
        self, place: int, name: str, label: str | int | None, offset: int = -1, size: int = -1
    ) -> None:
        """Add a sample.

        Args:
            place: Number of its place.
            name: Its name within the place.
            label: A word, which may be a number, or a class index; None without labels.
            offset, size: Where it is within the place, in bytes; -1: it is a file.

        Raises:
            UsageError: Only some labels are words, or a number is too large.
        """
        encoded = _encoded(name)
        start = self.sections["names"].write(encoded)
        self.sections["rows"].write(ROW.pack(start, offset, size, len(encoded), place))
        if self.labelled:
            label = self._numbered(label)
            self._largest = max(self._largest, label)
            self.sections["labels"].write(label.to_bytes(LABEL_BYTES, "little", signed=True))
        self.count += 1

    def facts(self) -> dict[str, Any]:
        """Return what the index holds, when all samples are there. Labels that are words become
        class indices.

        Raises:
            UsageError: A number is too large for a class index.
        """
        if self._words:
            self._number_words()
        elif self.classes is None:
            self._check_largest(self._largest)
        return {
            "build": secrets.token_hex(8),
            "kind": self.kind,
            "count": self.count,
            "places": self._places,
            "labelled": self.labelled,
            "classes": self.classes,
            "content": self.content,
        }

    def in_memory(self) -> SampleIndex:
        """Return the index, all of it in memory."""
        facts = self.facts()
        content = {name: section.content() for name, section in self.sections.items()}
        return SampleIndex(SectionsInMemory(facts, content))

    def close(self) -> None:
        """Remove the temporary files."""
        for section in self.sections.values():
            section.close()

    def _numbered(self, label: str | int | None) -> int:
        """Return the number of a label, and check that it is of the kind of the others."""
        assert label is not None
        if bool(self._words) != isinstance(label, str) and self.count:
            raise UsageError(
                f"label {label!r:.60} is {'no' if self._words else 'a'} name, unlike those before",
                "write all labels as names, or all as numbers",
            )
        if isinstance(label, str):
            return self._words.setdefault(label, len(self._words))
        if label > MAX_LABEL:
            raise UsageError(f"label {label} is no class number", "number classes from 0 on")
        return label

    def _number_words(self) -> None:
        """Replace the numbers of words by class indices, and find out the names of the classes.

        If all words are numbers, these are the class indices, and there are no names. Otherwise
        classes are numbered in alphabetical order.
        """
        words = [*self._words]
        self._words = {}
        numbers = [as_class_number(word) for word in words]
        if None not in numbers:
            self._check_largest(max(number or 0 for number in numbers))
            new = np.array(numbers, np.int64)
        else:
            self.classes = sorted(words)
            indices = {name: i for i, name in enumerate(self.classes)}
            new = np.array([indices[word] for word in words], np.int64)
        self.sections["labels"].change(lambda old: new[np.frombuffer(old, "<i8")].tobytes())

    def _check_largest(self, label: int) -> None:
        if label >= max(MAX_CLASSES, 10 * self.count):
            raise UsageError(f"label {label} is no class number", "number classes from 0 on")


def _encoded(name: str) -> bytes:
    return os.fsencode(name) if os.name != "nt" else name.encode("utf-8", "surrogatepass")


def _decoded(name: bytes) -> str:
    return os.fsdecode(name) if os.name != "nt" else name.decode("utf-8", "surrogatepass")
