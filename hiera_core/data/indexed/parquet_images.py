"""Images in Parquet files, here or at a remote place.

A Parquet file is read by row groups, of a hundred images and more, which is far too much for one
image of a shuffled order. So the encoded images are copied once, one behind another, to a file
beside the index, where each of them is read at its position. This takes as much space on the disk
as the images; `datasets` does the same with Arrow files.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from ...errors import OutputError, UsageError, first_line
from ...places.remote_requests import with_retries
from ..remote.web_ranges import open_files
from .index_cache import CONTENT_ENDING, IndexRequest, stamp_of
from .parquet_columns import BYTES, PATH, Columns, find_columns, holds_bytes
from .remote_shards import RangeFile, as_usage_errors, version_of
from .sample_index import IndexWriter, SampleIndex

ROWS = 32  # that are read at a time
MAX_IMAGE = 512 << 20  # bytes
log = logging.getLogger("hiera")


@dataclass(frozen=True)
class TableFile:
    """A Parquet file.

    Args:
        name: Its path or URL.
        version: What changes when it does.
        fetch: Brings it to this machine, and returns its path; None: it is read where it is.
        public_only: Refuse servers in private networks.
    """

    name: str
    version: Sequence[str | int]
    fetch: Callable[[], Path] | None = None
    public_only: bool = False

    @classmethod
    def at(cls, place: str, *, public_only: bool = False) -> Self:
        """Return the file at a path or URL. `public_only`: see `TableFile`.

        Raises:
            UsageError: It does not exist, or cannot be reached.
        """
        if "://" in place:
            version = version_of(place, public_only=public_only)
            return cls(place, version, public_only=public_only)
        try:
            return cls(place, [place, *stamp_of(Path(place))])
        except OSError as error:
            reason = f"{place} cannot be read ({error.strerror})"
            raise UsageError(reason, "check the path") from error


def index_parquet(
    files: Sequence[TableFile], labelled: bool, image: str | None = None, label: str | None = None
) -> SampleIndex:
    """Index the images of Parquet files, and copy them to a file beside the index.

    Args:
        files: The files, in order.
        labelled: Whether labels are read.
        image, label: Names of the columns; None: see `find_columns`.

    Raises:
        UsageError: A file cannot be read, columns are missing, or a row lacks its label; or pyarrow
            is not installed.
        OutputError: The disk has no space for the images.
    """
    _import_pyarrow()
    name = f"{files[0].name} and {len(files) - 1} more Parquet files"
    stamp = [[[file.name, *file.version] for file in files], image, label]

    def build(writer: IndexWriter) -> None:
        folder = request.path.parent
        path = folder / f"{request.path.stem}-{secrets.token_hex(4)}{CONTENT_ENDING}"
        try:
            total = sum(_size_of(file, labelled, image, label) for file in files)
            _check_space(folder, total)
            log.info("copying %.3g MB of images to %s, which is done once", total / 1e6, folder)
            with path.open("xb") as content:
                for file in files:
                    _copy(writer, file, content, image, label)
            writer.facts()  # checks the labels
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OutputError(
                f"{folder} cannot be written ({error.strerror or error})",
                "name another folder in HIERA_INDEX_FOLDER",
            ) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        writer.content = str(path)

    parts = [[file.name for file in files], image, label]
    request = IndexRequest("parquet", name, labelled, stamp, build, always_kept=True, parts=parts)
    return request.open()


def holds_images(file: TableFile) -> bool:
    """Return whether a column of a Parquet file may hold encoded images.

    Raises:
        UsageError: See `index_parquet`.
    """
    with _opened(file) as table:
        return any(holds_bytes(field.type) for field in table.schema_arrow)


def _copy(
    writer: IndexWriter, file: TableFile, content: IO[bytes], image: str | None, label: str | None
) -> None:
    """Add the rows of a Parquet file to an index, and its images to a file."""
    with _opened(file) as table:
        columns = _columns_of(file.name, table, writer.labelled, image, label)
        if writer.count and writer.classes != _classes(columns):
            raise UsageError(f"{file.name} has other classes than the first file", "write it again")
        writer.classes = _classes(columns)
        names = [columns.image, *([columns.label] if columns.label else [])]
        place, row = writer.add_place(file.name), 0
        for values in _batches(file.name, table, names):
            for found, *labels in zip(*values, strict=True):
                data, ending = _image_of(file.name, row, found)
                word = _label_of(file.name, row, labels[0], columns) if labels else None
                try:
                    writer.add(place, f"{row}{ending}", word, content.tell(), len(data))
                except UsageError as error:
                    reason = f"{file.name}: row {row}: {error.message}"
                    raise UsageError(reason, error.hint) from error
                _write(content, data)
                row += 1


def _batches(file: str, table: Any, names: Sequence[str]) -> Iterator[list[list[Any]]]:
    """Yield the values of columns, some rows at a time.

    Raises:
        UsageError: A page is damaged, for which pyarrow has no error of its own.
    """
    try:
        for batch in table.iter_batches(ROWS, columns=names):
            yield [batch.column(name).to_pylist() for name in names]
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UsageError(f"{file} cannot be read ({reason})", "get it again")


def _write(content: IO[bytes], data: bytes) -> None:
    try:
        content.write(data)
    except OSError as error:
        raise OutputError(
            f"{content.name} cannot be written ({error.strerror or error})",
            "free some space, or name another folder in HIERA_INDEX_FOLDER",
        ) from error


def _image_of(file: str, row: int, found: Any) -> tuple[bytes, str]:
    """Return the encoded image of a row, b"" if there is none, and the extension of its file."""
    path = None
    if isinstance(found, dict):
        found, path = found.get(BYTES), found.get(PATH)
        if found is None and path:
            raise UsageError(
                f"{file}: row {row} holds a path instead of an image",
                "write the data set again, with its images in it",
            )
    if found is not None and len(found) > MAX_IMAGE:
        raise UsageError(f"{file}: row {row} is larger than {MAX_IMAGE >> 20} MiB", "leave it out")
    ending = Path(path).suffix.lower() if isinstance(path, str) else ""
    return found or b"", ending


def _label_of(file: str, row: int, found: Any, columns: Columns) -> str | int:
    """Return the label of a row: a class index, or a name."""
    if isinstance(found, str) and found.strip():
        return found.strip()
    is_number = isinstance(found, int) and found >= 0
    if columns.classes is not None and is_number and found >= len(columns.classes):
        is_number = False
    if not is_number:
        raise UsageError(
            f"{file}: row {row} has no label ({columns.label}: {found!r:.40})",
            "name another split or column (?label=COLUMN), or data with labels",
        )
    return int(found)


def _classes(columns: Columns) -> list[str] | None:
    return None if columns.classes is None else [*columns.classes]


def _columns_of(
    file: str, table: Any, labelled: bool, image: str | None, label: str | None
) -> Columns:
    try:
        return find_columns(table.schema_arrow, labelled, image, label)
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", error.hint) from error


def _size_of(file: TableFile, labelled: bool, image: str | None, label: str | None) -> int:
    """Return the size of the images of a Parquet file, as its footer says."""
    with _opened(file) as table:
        column = _columns_of(file.name, table, labelled, image, label).image
        total = 0
        for group in range(table.metadata.num_row_groups):
            found = table.metadata.row_group(group)
            for number in range(found.num_columns):
                chunk = found.column(number)
                if chunk.path_in_schema.partition(".")[0] == column:
                    total += chunk.total_uncompressed_size
        return total


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"{folder} has {free / 1e9:.3g} GB free, and the images take {size / 1e9:.3g} GB",
            "name another folder in HIERA_INDEX_FOLDER",
        )


@contextlib.contextmanager
def _opened(file: TableFile) -> Iterator[Any]:
    """Open a Parquet file, and convert the errors of reading it."""
    pa, pq = _import_pyarrow()
    try:
        if file.fetch is None and "://" in file.name:
            with as_usage_errors(file.name), pq.ParquetFile(_remote(file)) as table:
                yield table
        else:
            path = file.name if file.fetch is None else file.fetch()
            try:
                table = pq.ParquetFile(path)
            except OSError as error:
                raise _unreadable(file.name, error) from error
            with table:
                yield table
    except pa.ArrowException as error:
        raise _unreadable(file.name, error) from error


def _remote(file: TableFile) -> RangeFile:
    system, path = open_files(file.name, public_only=file.public_only)
    info = with_retries(lambda: system.info(path), file.name)
    return RangeFile(system, path, int(info.get("size") or 0))


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "Parquet files need pyarrow, which is not installed",
            "pip install 'hiera-toolkit[parquet]'",
        ) from error
    return pa, pq
