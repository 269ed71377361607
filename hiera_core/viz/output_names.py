"""Names of the output files of a run: short, and a different one for every input.

An input `holiday/x.jpg` gives `x.png`. If `work/x.jpg` is an input too, they give `holiday/x.png`
and `work/x.png`. Names that differ only in case or in the Unicode form of their letters count as
equal, because macOS and Windows take them for the same file.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.sources import STDIN, Source
from ..errors import InputError
from ..records import Record
from .output_paths import (
    OUTPUT_ENDINGS,
    STDIN_NAME,
    output_path,
    safe_parts,
    shorten_name,
    split_ending,
    split_url,
)

NOTHING = 0  # hash of an empty text
MAX_DIGITS = 16  # of the hash that distinguishes inputs that nothing else does


class Form(NamedTuple):
    """How much of an input's path its output files are named after, beyond the short name."""

    folders: int = 0  # how many folders in front of the short name
    tail: bool = False  # whether the input's own extension is kept
    digits: int = 0  # digits of a hash


@dataclass(frozen=True)
class PathOfInput:
    """The path of an input in parts: the folders in front of its short name, the short name without
    extension, and the tail (its extension, and the query of a URL)."""

    front: tuple[str, ...]
    short: tuple[str, ...]
    tail: str
    identity: int  # hash of what it names: equal if the same input is named twice

    def stem(self, form: Form) -> str:
        """Return the path of the output files, without their extension."""
        *folders, name = (*self.front[len(self.front) - form.folders :], *self.short)
        name += self.tail if form.tail else ""
        name += f"~{self.identity:016x}"[: form.digits + 1] if form.digits else ""
        return "/".join((*folders, shorten_name(name)))

    def rest(self, form: Form) -> int:
        """Return a hash of the folders that are not in the stem."""
        return _hash_of_folders(self.front[: len(self.front) - form.folders])

    @property
    def key(self) -> int:
        """A hash that distinguishes inputs, and the ways in which one input is named."""
        return self.identity ^ self.rest(Form())


class Claim(NamedTuple):
    """Which input has a stem."""

    identity: int
    rest: int


class OutputNames:
    """Chooses where the output files of each input are.

    The inputs that can be listed ahead get names that do not depend on their order. If their names
    would meet, all of them get as much of their paths in front as distinguishes them. Of other
    inputs, the first keeps the short name. The names depend on all inputs, so a run that is resumed
    gives the same names. Memory: about 25 bytes for an input that is listed, and 150 for others and
    for names that would meet.

    Args:
        folder: The folder of all results.
        listed: Returns the inputs that can be listed ahead, see `sources.expand`. It is called
            several times.
    """

    def __init__(self, folder: Path, listed: Callable[[], Iterable[Source]] = tuple) -> None:
        self.folder, self._listed = folder, listed
        self._forms: dict[int, Form] = {}  # by the `key` of inputs whose short names would meet
        self._table = np.empty((3, 0), np.uint64)  # hashes of stems, sorted; identities; rests
        self._later: dict[int, int] = {}  # the claims of inputs that were not listed
        self._inputs: set[int] = set()  # hashes of the paths of inputs within the folder
        self._unnamed = 0  # how many inputs had no path of their own
        self._real_path = functools.lru_cache(maxsize=1024)(_real_path)

    def assign(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yield all inputs of the run, each with its `output_stem`."""
        self._choose_forms()
        for source in sources:
            if _has_no_output(source):
                yield source
                continue
            self._note_input(source)
            stem = self._claim(self._path_of(source))
            error = source.error
            if stem is None:
                error = InputError("another result has the name of its result", "process it alone")
            yield replace(source, output_stem=stem or "", error=error)

    def path(self, record: Record, ending: str) -> Path:
        """Return the path of an output file of a record, after creating its folder.

        Raises:
            InputError, OutputError: See `output_path`; or the file would replace another input.
        """
        path = output_path(self.folder, record, ending)
        if hash_of(path.relative_to(self.folder).as_posix()) in self._inputs:
            raise InputError(f"the result would replace the input {path}", "use another folder")
        return path

    # Names that are chosen ahead ------------------------------------------------------------------

    def _choose_forms(self) -> None:
        """Give longer names to the listed inputs until no two of them meet."""
        while True:
            columns = [array("Q") for _ in range(5)]
            for source in self._listed():
                if _has_no_output(source):
                    continue
                self._note_input(source)
                path = self._path_of(source)
                form = self._forms.get(path.key, Form())
                stem, tail = hash_of(path.stem(form)), hash_of(path.tail)
                row = (stem, path.identity, path.rest(form), path.key, tail)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
            table = np.array([np.frombuffer(c, np.uint64) for c in columns])
            table = table[:, np.lexsort((table[1], table[0]))]
            self._table = table[:3].copy()
            # `list` over the groups: each is lengthened, whether another one was or not.
            if not any(list(map(self._lengthen, _groups_that_meet(table)))):
                return

    def _lengthen(self, group: np.ndarray) -> bool:
        """Give longer names to inputs with the same stem. Return whether any was possible."""
        _, _, rests, keys, tails = group.tolist()
        differ_in_front, differ_in_tail = len(set(rests)) > 1, len(set(tails)) > 1
        forms = [self._forms.get(key, Form()) for key in keys]
        differ_in_tail &= not all(form.tail for form in forms)
        for key, form, rest in zip(keys, forms, rests, strict=True):
            if differ_in_front:
                longer = form._replace(folders=form.folders + (rest != NOTHING))
            elif differ_in_tail:
                longer = form._replace(tail=True)
            else:
                longer = _with_digits(form)
            self._forms[key] = longer
        return any(self._forms[key] != form for key, form in zip(keys, forms, strict=True))

    # Names that are chosen when an input comes ----------------------------------------------------

    def _claim(self, path: PathOfInput) -> str | None:
        """Return the stem of an input, or None if others have all that it could have."""
        form = self._forms.get(path.key, Form())
        while True:
            stem, rest = path.stem(form), path.rest(form)
            claim = self._find(hash_of(stem))
            if claim is None:
                self._later[hash_of(stem)] = path.identity << 64 | rest
                return stem
            if claim.identity == path.identity:
                return stem
            if rest not in (claim.rest, NOTHING):
                longer = form._replace(folders=form.folders + 1)
            elif not form.tail:
                longer = form._replace(tail=True)
            else:
                longer = _with_digits(form)
            if longer == form:
                return None
            form = longer

    def _find(self, stem: int) -> Claim | None:
        stems, identities, rests = self._table
        row = int(np.searchsorted(stems, np.uint64(stem)))
        if row < len(stems) and int(stems[row]) == stem:
            return Claim(int(identities[row]), int(rests[row]))
        later = self._later.get(stem)
        return None if later is None else Claim(later >> 64, later & (2**64 - 1))

    # Paths of inputs ------------------------------------------------------------------------------

    def _path_of(self, source: Source) -> PathOfInput:
        if source.url is not None:
            where, query = split_url(source.url)
            *front, last = safe_parts(where)
            name, ending = split_ending(last)
            identity = hash_of(source.url, exact=True)
            return PathOfInput(tuple(front), (name,), ending + query, identity)
        if source.path is None:
            name, ending = split_ending(safe_parts(source.name)[-1])
            name = STDIN_NAME if source.name == STDIN else name
            return PathOfInput((), (name,), ending, self._identity_without_path(source))
        path = _without_dots(source.path)
        *folders, last = safe_parts(source.short_name or str(path))
        name, ending = split_ending(last)
        if source.short_name:
            # A tar file counts as a folder that is named like it.
            within = 1 if source.span else len(folders) + 1
            front = list(safe_parts(str(path))[:-within])
        else:
            front, folders = folders, []
        where = f"{_absolute(path)}\0{source.span or ''}"
        return PathOfInput(tuple(front), (*folders, name), ending, hash_of(where, exact=True))

    def _identity_without_path(self, source: Source) -> int:
        """Return a hash of the name. Contents in memory are all different, whatever their names."""
        self._unnamed += 1
        serial = "" if source.data is None and source.pixels is None else self._unnamed
        return hash_of(f"{source.name}\0{serial}", exact=True)

    def _note_input(self, source: Source) -> None:
        """Note the path of an input within the folder, if an output file could be there."""
        if source.path is None or source.path.suffix.lower() not in OUTPUT_ENDINGS:
            return
        path = self._real_path(source.path.parent) / source.path.name
        folder = self._real_path(self.folder)
        if path.is_relative_to(folder):
            self._inputs.add(hash_of(path.relative_to(folder).as_posix()))


def _has_no_output(source: Source) -> bool:
    """Return whether this is no file, but a list or folder that cannot be read."""
    return source.error is not None and source.path is None


def hash_of(text: str, *, exact: bool = False) -> int:
    """Return a 64-bit hash of a text. Unless `exact`, texts have the same hash if they are equal
    apart from case and Unicode form. That of an empty text is `NOTHING`."""
    if not exact:
        text = text.lower() if text.isascii() else _fold(text)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") if text else NOTHING


@functools.lru_cache(maxsize=1024)
def _hash_of_folders(folders: tuple[str, ...]) -> int:
    return hash_of("/".join(folders))


def _fold(text: str) -> str:
    """Return the form of a text for caseless comparison (Unicode, definition D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def _groups_that_meet(table: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the columns of each stem that different inputs have. The columns are sorted by stem and
    identity."""
    stems, identities = table[:2]
    same = stems[1:] == stems[:-1]
    meets = np.unique(stems[1:][same & (identities[1:] != identities[:-1])])
    starts, ends = np.searchsorted(stems, meets), np.searchsorted(stems, meets, "right")
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield table[:, start:end]


def _with_digits(form: Form) -> Form:
    return form._replace(digits=min(form.digits + 8, MAX_DIGITS))


def _without_dots(path: Path) -> Path:
    """Return a path without `..`. What these mean depends on links in front of them."""
    if ".." not in path.parts:
        return path
    after = path.parts[::-1].index("..")
    beginning = path.parts[: len(path.parts) - after]
    return _real_path(Path(*beginning)).joinpath(*path.parts[len(beginning) :])


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working directory is gone
        return path


def _real_path(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
        return path
