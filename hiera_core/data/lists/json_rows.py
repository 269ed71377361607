"""The rows of a list of files in JSON or JSON lines.

A list in JSON is an array of paths, of arrays or of objects; an object of columns or of rows, as
pandas writes tables, also with the paths as their index; an object that gives each path its label,
or each class its paths; COCO's `images`, whose labels are the categories of their `annotations`; or
the files of the VGG Image Annotator, whose labels are attributes of files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import first_line
from ...plain_data import decode_text, size_text, valid_name
from ..media_types import ENDINGS, JSON_LINE_ENDINGS
from .list_rows import (
    MAX_COLUMNS,
    MAX_LINE,
    PARTS,
    PROBED_ROWS,
    ListError,
    Row,
    numbered_lines,
)

MAX_JSON_BYTES = 512 << 20  # COCO's largest file has 450 MB; a text of JSON lines may be longer
COCO_HEADER = ("file_name", "category")
PATH_KEY = "path"  # of paths that are keys of an object
VIA_FILES, VIA_LABELS = "_via_img_metadata", "file_attributes"  # VGG Image Annotator
HINT = "give an array of paths, or of objects with a path and a label"


class JsonRows:
    """The rows of a list in JSON. They can be gone through again.

    Where the rows are objects, the first row is a header: the keys.

    Args:
        path: The list. In JSON lines, each line is a row, and one at a time is in memory.
        is_path_key: Whether a key is one of paths.
        is_label_key: Whether a key is one of labels.
        labelled: Whether the labels of COCO's images are needed.

    Attributes:
        has_header: Whether the first row is a header; None if that is to be found out.

    Raises:
        ListError: It cannot be read, is not JSON, or is no list of files.
    """

    def __init__(
        self,
        path: Path,
        is_path_key: Callable[[str], bool],
        is_label_key: Callable[[str], bool],
        labelled: bool = True,
    ) -> None:
        self.path, self._labelled = path, labelled
        self._is_path_key, self._is_label_key = is_path_key, is_label_key
        self._unit = "line" if self._has_lines() else "entry"
        self._read = None if self._unit == "line" else self._entries_of(_read_json(path))
        first = list(itertools.islice(self._entries(), PROBED_ROWS))
        objects = [entry for _, entry in first if isinstance(entry, Mapping)]
        self.has_header = True if objects else False if _are_texts(first) else None
        # In lines of JSON, the first ones show which keys there are.
        probed = objects if self._unit == "line" else [e for _, e in self._entries()]
        keys = (key for entry in probed if isinstance(entry, Mapping) for key in entry)
        self._keys = tuple(dict.fromkeys(keys))
        _check_width(len(self._keys))

    def __iter__(self) -> Iterator[Row]:
        if self._keys:
            yield Row(0, self._keys, self._unit)
        for number, entry in self._entries():
            cells = tuple([_as_cell(value).strip() for value in self._values(number, entry)])
            if any(cells) or _has_values(entry):
                yield Row(number, cells, self._unit)

    def _values(self, number: int, entry: Any) -> Sequence[Any]:
        """Return the values of an entry, one for each column.

        Raises:
            ListError: It is another kind of entry than the first one.
        """
        if isinstance(entry, Mapping) and self._keys:
            return [entry.get(key) for key in self._keys]
        if not self._keys and isinstance(entry, str):
            return [entry]
        if not self._keys and isinstance(entry, list):
            _check_width(len(entry))
            return entry
        raise ListError(f": {self._unit} {number} is no path ({entry!r:.60})", HINT)

    def _entries(self) -> Iterator[tuple[int, Any]]:
        """Yield each entry and its number, counted from 1."""
        if self._read is not None:
            yield from enumerate(self._read, start=1)
            return
        for number, line in numbered_lines(self.path):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = first_line(error)
                    message = f": line {number} is not valid JSON ({reason})"
                    raise ListError(message, "write a JSON value on each line") from error

    def _has_lines(self) -> bool:
        """Return whether each line is a JSON value."""
        if self.path.suffix.lower() in JSON_LINE_ENDINGS:
            return True
        try:
            lines = (line for _, line in numbered_lines(self.path) if line.strip())
            first = list(itertools.islice(lines, 2))
        except ListError:  # JSON in one line may be long
            return False
        return len(first) == 2 and all(map(_is_json, first))

    def _entries_of(self, value: Any) -> Sequence[Any]:
        """Return the rows that a value in JSON means.

        Raises:
            ListError: It means none.
        """
        if isinstance(value, list):
            return value
        if isinstance(value, dict) and value:
            keys = ("images", "data", "columns", "index")
            images, data, columns, index = (value.get(key) for key in keys)
            if _are_objects(images):
                return self._entries_of_coco(value, images)
            if _are_objects(data):  # pandas: orient="table"
                return data
            if isinstance(data, list) and isinstance(columns, list):  # orient="split"
                if not _are_files(index) or any(map(self._is_path_key, map(str, columns))):
                    return [columns, *data]
                return [[PATH_KEY, *columns], *map(_behind, index, data)]
            if isinstance(data, list) and _are_files(index):  # of a single column
                return [*map(_behind, index, data)]
            if isinstance(value.get(VIA_FILES), dict):
                value = value[VIA_FILES]
            return self._entries_of_columns(value)
        raise ListError(" is no list of files", HINT)

    def _entries_of_columns(self, value: dict[str, Any]) -> Sequence[Any]:
        """Return the rows of an object of columns, of rows, of labels by path, or of paths by
        class."""
        parts = list(value.values())
        tables = [part for part in parts if _are_objects(part)]
        if len(tables) == 1 and not any(map(self._is_path_key, value)):  # beside other facts
            return tables[0]
        if all(isinstance(part, dict | list) for part in parts):
            if any(map(self._is_path_key, value)):  # pandas: orient="columns", "list"
                _check_width(len(value))
                columns = [part if isinstance(part, dict) else _numbered(part) for part in parts]
                rows = dict.fromkeys(key for column in columns for key in column)
                named = list(zip(value, columns, strict=True))
                return [{key: column.get(row) for key, column in named} for row in rows]
            if all(isinstance(part, dict) for part in parts):  # pandas: orient="index"
                if not _are_files(parts[0]):
                    return self._with_paths(value)
                named = list(value.items())
                files = dict.fromkeys(file for part in parts for file in part)
                return self._with_paths(
                    {file: {key: part.get(file) for key, part in named} for file in files}
                )
        if all(_are_names(part) for part in parts):  # the paths of each class
            self._check_classes(value)
            return [[path, label] for label, paths in value.items() for path in paths]
        if not any(isinstance(part, dict | list) for part in parts):
            if any(map(self._is_path_key, value)):
                return [value]
            # The label of each path.
            return [list(item) for item in value.items()]
        raise ListError(" is no list of files", HINT)

    def _check_classes(self, names: Collection[str]) -> None:
        """Check that lists of paths have the names of classes, if labels are needed.

        Raises:
            ListError: They have those of parts of a data set, such as `train` and `val`.
        """
        if self._labelled and {name.lower() for name in names} <= PARTS:
            listed = ", ".join(map(repr, names))
            raise ListError(f" has parts of a data set ({listed}), and no classes", HINT)

    def _with_paths(self, rows: dict[str, dict[str, Any]]) -> Sequence[Any]:
        """Return the rows of an object of rows. If its keys are files, and the rows name none, each
        row gets its key. Of the VGG Image Annotator's files, the attributes are the columns."""
        if all(isinstance(row.get(VIA_LABELS), dict) for row in rows.values()):
            return [{PATH_KEY: row.get("filename"), **row[VIA_LABELS]} for row in rows.values()]
        keys = dict.fromkeys(str(key) for row in rows.values() for key in row)
        if not _are_files(rows) or any(map(self._is_path_key, keys)):
            return list(rows.values())
        # `{"a.jpg": {"cat": 3}}` says nothing about classes.
        known = any(map(self._is_label_key, keys))
        return [{PATH_KEY: file, **(row if known else {})} for file, row in rows.items()]

    def _entries_of_coco(self, value: dict[str, Any], images: list[Any]) -> Sequence[Any]:
        """Return the file of each image in COCO's format, and its category, if there are
        annotations and labels are needed.

        Raises:
            ListError: An image has annotations of several categories.
        """
        annotations = value.get("annotations")
        is_coco = all(isinstance(one, dict) and COCO_HEADER[0] in one for one in images)
        if not (is_coco and self._labelled and isinstance(annotations, list)):
            return images
        try:
            names = {one["id"]: one["name"] for one in value.get("categories") or ()}
            found: dict[Any, dict[Any, None]] = {}
            for one in annotations:
                found.setdefault(one["image_id"], {})[one["category_id"]] = None
            rows = []
            for image in images:
                file, labels = image[COCO_HEADER[0]], list(found.get(image["id"], ()))
                if len(labels) > 1:
                    first, second = (repr(names.get(label, label)) for label in labels[:2])
                    message = f": {file} has annotations of several categories ({first}, {second})"
                    raise ListError(message, "a classifier needs one class for each image")
                label = names.get(labels[0], labels[0]) if labels else None
                rows.append(dict(zip(COCO_HEADER, (file, label), strict=True)))
        except (LookupError, TypeError, AttributeError) as error:
            raise ListError(" is not in COCO's format", HINT) from error
        return rows


def _read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        ListError: It cannot be read, or is too large.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            message = f" is too large for JSON ({size_text(size)})"
            raise ListError(message, "write JSON lines: an object on each line of a .jsonl file")
        return json.loads(decode_text(path.read_bytes()))
    except OSError as error:
        raise ListError(f" cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise ListError(f" cannot be read ({error})", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ListError(f" is not valid JSON ({first_line(error)})", HINT) from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return len(text) < MAX_LINE


def _check_width(count: int) -> None:
    """Check the number of columns.

    Raises:
        ListError: There are more than a list has.
    """
    if count > MAX_COLUMNS:
        raise ListError(f" has {count} columns, more than {MAX_COLUMNS}", HINT)


def _numbered(values: Sequence[Any]) -> dict[Any, Any]:
    """`["a", "b"]` -> `{"0": "a", "1": "b"}`"""
    return {str(number): value for number, value in enumerate(values)}


def _has_values(entry: Any) -> bool:
    """Return whether an entry is an object that is not empty. Its keys may be other ones."""
    return isinstance(entry, Mapping) and not all(one in (None, "") for one in entry.values())


def _are_texts(entries: Collection[tuple[int, Any]]) -> bool:
    return all(isinstance(entry, str) for _, entry in entries)


def _are_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(item, Mapping) for item in value)


def _behind(file: str, cells: Any) -> list[Any]:
    return [file, *(cells if isinstance(cells, list) else [cells])]


def _are_files(names: Any) -> TypeGuard[Collection[str]]:
    """Return whether these are names of files, by their extensions."""
    if not isinstance(names, Mapping | list) or not names:
        return False
    return all(isinstance(one, str) and Path(one).suffix.lower() in ENDINGS for one in names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _as_cell(value: Any) -> str:
    """Return a value as a cell of a table: "" for null, and for what is neither a text, a number
    nor the only one of a list. An object such as `{"path": "a.png", "bytes": null}` is its path."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, str):
        return valid_name(value)
    return json.dumps(value) if isinstance(value, bool | int | float) else ""
