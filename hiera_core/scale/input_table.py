"""The inputs of a run as a table that any worker can read a part of: a manifest, or a listing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.division.manifest import Manifest
from ..data.sources import Source, can_be_listed_twice
from ..errors import InputError, UsageError
from ..places.places import Place
from .result_rows import IdType

LISTING = "_inputs.parquet"  # the name begins so that readers of the folder's results pass it over
LISTED_TOGETHER = 50_000


@dataclass(frozen=True)
class ManifestInputs:
    """Inputs that a manifest names. It is opened again in each worker.

    Args:
        path, path_column, id_column, private_urls: See `Manifest`.
        digest: See `Manifest.digest_of_copy`. A copy that is fetched later must be the same.
    """

    path: Path | str
    path_column: str | None = None
    id_column: str | None = None
    private_urls: bool = False
    digest: str | None = None

    @classmethod
    def of(cls, table: Manifest) -> ManifestInputs:
        """Return the inputs of a manifest that this process has opened."""
        path = table.path if isinstance(table.path, str) else table.path.absolute()
        return cls(path, *table.columns, table.private_urls, table.digest_of_copy())

    def open(self) -> Manifest:
        """Return the manifest.

        Raises:
            UsageError, HubError: See `Manifest`; or the file at the URL is another one now.
        """
        table = Manifest(
            self.path, self.path_column, self.id_column, private_urls=self.private_urls
        )
        if self.digest is not None and table.digest_of_copy() != self.digest:
            raise UsageError(
                f"manifest {self.path} has changed since the run began",
                "name a file that stays as it is, and write to another folder",
            )
        return table


@dataclass(frozen=True)
class ListedInputs:
    """Inputs that were listed once, into a file that every worker can read.

    Args:
        place, name: The file.
    """

    place: Place
    name: str = LISTING

    def open(self) -> Listing:
        """Return the listing."""
        return Listing(self.place, self.name)


InputTable = ManifestInputs | ListedInputs


def id_type_of(manifest: Manifest) -> IdType:
    """Return the type of the ids of a manifest, by its first rows."""
    ids = [s.id for s in manifest.read(range(min(1000, len(manifest)))) if s.id is not None]
    if not ids:
        return "none"
    return "text" if any(isinstance(one, str) for one in ids) else "number"


def write_listing(sources: Iterable[Source], place: Place) -> None:
    """Write inputs to a file, some at a time, so that memory does not grow with their number.

    Raises:
        UsageError: One of them is standard input, which no other process can read.
        OutputError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, raw = pa.string(), pa.int64(), pa.binary()
    names = [("name", raw), ("path", raw), ("url", text), ("error", text), ("hint", text)]
    numbers = [("offset", number), ("size", number), ("in_list", pa.bool_())]
    schema = pa.schema([*names, *numbers])
    found = iter(sources)
    with place.writing(LISTING) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while some := list(islice(found, LISTED_TOGETHER)):
            writer.write_table(pa.Table.from_pylist([_listed(s) for s in some], schema))


def list_failed_again(place: Place, expand: Callable[[str], Iterable[Source]]) -> None:
    """List the inputs again that could not be listed: folders and tar files that were missing, or
    at a place that did not answer. The first input that such a name stands for takes its row. The
    others come after all rows, because rows that are written already keep their numbers.

    Args:
        place: The folder of the listing.
        expand: Returns the inputs that a name stands for; see `sources.expand`.

    Raises:
        UsageError: The listing is damaged.
        OutputError: It cannot be written.
    """
    listing = Listing(place, LISTING)
    if listing.has_errors():
        write_listing(_listed_again(listing, expand), place)


def _listed_again(listing: Listing, expand: Callable[[str], Iterable[Source]]) -> Iterator[Source]:
    found_more, previous = [], ""
    for source in listing.read(range(len(listing))):
        name = source.name
        # A member of a tar file was found, and so were those before the tar file was damaged.
        is_part = name.lower().endswith(".tar") and previous.startswith(f"{name}/")
        is_found = source.error is None or source.span is not None or is_part
        previous = name
        if is_found or not can_be_listed_twice(name):
            yield source
            continue
        found = next(iter(expand(name)), source)
        yield found
        if found.error is None or found.name != name:
            found_more.append(name)
    for name in found_more:
        yield from islice(expand(name), 1, None)


def _listed(source: Source) -> dict[str, object]:
    if source.data is not None or source.pixels is not None:
        raise UsageError(
            f"{source.name!r} is content in this process, which workers cannot read",
            "write it to a file",
        )
    offset, size = source.span or (None, None)
    path = None if source.path is None else str(source.path.absolute())
    error = source.error or InputError("")
    return {
        "name": source.name.encode("utf-8", "surrogateescape"),
        "path": None if path is None else path.encode("utf-8", "surrogateescape"),
        "url": source.url,
        "offset": offset,
        "size": size,
        "error": None if source.error is None else error.message,
        "hint": None if source.error is None else error.hint,
        "in_list": source.in_list,
    }


class Listing:
    """A file of `write_listing`.

    Raises:
        UsageError: The file is damaged.
    """

    def __init__(self, place: Place, name: str) -> None:
        from ..data.division.parquet_rows import ParquetRows

        self._rows = ParquetRows(place.open(name))

    def __len__(self) -> int:
        return self._rows.total

    def has_errors(self) -> bool:
        """Return whether there is an input that could not be listed."""
        found = self._rows.read(range(len(self)), ["error"])
        return any(error is not None for (error,) in found)

    def read(self, rows: range) -> Iterator[Source]:
        """Yield the inputs in a contiguous range of rows.

        Raises:
            UsageError: The file is damaged.
        """
        for position, values in zip(rows, self._rows.read(rows, self._rows.columns), strict=True):
            known = dict(zip(self._rows.columns, values, strict=True))
            error, span = known["error"], (known["offset"], known["size"])
            yield Source(
                _decoded(known["name"]),
                path=None if known["path"] is None else Path(_decoded(known["path"])),
                url=known["url"],  # type: ignore[arg-type]
                span=None if span[0] is None else span,  # type: ignore[arg-type]
                error=None if error is None else InputError(str(error), str(known["hint"])),
                in_list=bool(known["in_list"]),
                position=position,
            )


def _decoded(name: object) -> str:
    assert isinstance(name, bytes)
    return name.decode("utf-8", "surrogateescape")
