"""Class names of ImageNet-1k and Kinetics-400, and of files with one name per line.

class_names.json holds the names as torchvision's weights list them (`meta["categories"]`), and the
WordNet IDs of ImageNet-1k, which are in the order of its classes.
"""

from __future__ import annotations

import ast
import csv
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..plain_data import MAX_YAML_BYTES, TABLE_PREAMBLE, decode_text, parse_yaml

MAX_LABELS_BYTES = 8 << 20
MAX_HEADER = 1 << 16  # characters of a table's first line
MAX_LITERAL_BYTES = 1 << 20  # Python needs 250 times as much memory to read a literal
NUMBERED = re.compile(r"(\d{1,6})\s*[\s:,;=|]\s*(\S.*)")  # `3 cat`, `3: cat`, `3,cat`
NUMBERED_LAST = re.compile(r"(\S.*)[\t:,;=|] *(\d{1,6})")  # `cat,3`
WITH_WNID = re.compile(r"(n\d{8})[\s,;]+(\S.*)")  # `n01440764 tench, Tinca tinca`
NOT_READ = (".pbtxt", ".prototxt", ".textproto")  # their lines are not names
YAML_ENDINGS = (".yaml", ".yml")
# Keys under which a dictionary holds class names: config.json, COCO, Ultralytics' data.yaml.
NAME_KEYS = (
    "id2label", "label2id", "class_to_idx", "class_names", "label_names", "classes", "names",
    "categories", "labels",
)  # fmt: skip
# Words of a header above class names, and above their numbers.
NAME_WORDS = (
    "name", "names", "class_name", "label_name", "display_name", "label", "labels", "class",
    "classes", "category", "description", "desc",
)  # fmt: skip
NUMBER_WORDS = ("id", "index", "idx", "class_id", "class_index", "class_idx", "label_id", "number")
LABEL_SETS = {1000: "imagenet1k", 400: "kinetics400"}  # by number of classes


def class_names(classes: str) -> tuple[str, ...]:
    """Return the names of `imagenet1k`, `imagenet1k_wnids` or `kinetics400`, in the order of class
    indices."""
    return _label_sets()[classes]


def for_classes(num_classes: int, known: Sequence[str] | None = None) -> Sequence[str] | None:
    """Return class names for a model.

    Args:
        num_classes: Number of classes of the model.
        known: The model's own names. They are ignored if their number differs.

    Returns:
        The model's own names, else those of the label set with the same number of classes,
        else None.
    """
    if known is not None and len(known) == num_classes:
        return known
    return class_names(LABEL_SETS[num_classes]) if num_classes in LABEL_SETS else None


def read_labels(path: str | Path) -> list[str]:
    """Read class names from a file, in the order of class indices.

    The file has one name per line, which a class number or a WordNet ID may precede, or which a
    number may follow after a comma; with or without a header. Or it is a JSON or Python list of
    names, or a dictionary that maps numbers to names or names to numbers, also within a dictionary
    of other things, such as config.json. A .csv may have more columns, if a header names them.

    Raises:
        UsageError: The file cannot be read, is empty, or its numbers are not those of classes.
    """
    try:
        text = _read_text(Path(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _parse(text, path)


def parse_labels(content: bytes, name: str) -> list[str]:
    """Read class names from the content of a file; see `read_labels`.

    Args:
        content: The content.
        name: Its name, for messages.

    Raises:
        UsageError: It is not a text file, or empty, or its numbers are not those of classes.
    """
    try:
        text = _checked_text(content)
    except ValueError as error:
        raise _unreadable(name, error) from error
    return _parse(text, name)


def _parse(text: str, name: str | Path) -> list[str]:
    ending = Path(name).suffix.lower()
    if ending in NOT_READ:
        raise UsageError(f"labels {name}: {ending} is not read", "write one class name per line")
    try:
        names = _names_in(text, ending)
    except (
        ValueError, TypeError, SyntaxError, RecursionError, MemoryError, csv.Error,
    ) as error:  # fmt: skip
        raise _unreadable(name, error) from error
    if not names:
        raise UsageError(f"labels {name} are empty", "write one class name per line")
    return names


def _names_in(text: str, ending: str) -> list[str]:
    if ending in YAML_ENDINGS:
        if len(text) > MAX_YAML_BYTES:  # which PyYAML takes minutes for
            raise ValueError(f"it is larger than {MAX_YAML_BYTES >> 20} MiB")
        return _from_value(parse_yaml(text))
    if text.lstrip()[:1] in ("{", "["):
        return _from_literal(text)
    preamble = TABLE_PREAMBLE.match(text)
    text = text[preamble.end() :] if preamble else text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = list(itertools.dropwhile(lambda line: line.startswith("# "), lines))
    if lines and all(line.startswith("- ") for line in lines):  # a list in YAML
        lines = [line[2:].strip() for line in lines]
    return _from_table(lines, ending) or _from_lines(lines)


def _unreadable(name: str | Path, error: BaseException) -> UsageError:
    reason = getattr(error, "strerror", None) or first_line(error)
    if isinstance(error, UnicodeError):
        return UsageError(f"labels {name} cannot be read ({reason})", "save it as UTF-8")
    hint = "give a text file with one class name per line"
    return UsageError(f"labels {name} cannot be read ({reason})", hint)


def _read_text(path: Path) -> str:
    """Read a file. Devices can be endless and pipes can wait for ever, so these are refused.

    Raises:
        OSError, ValueError: It cannot be read, or is not a text file of a usual size.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > MAX_LABELS_BYTES:
        raise ValueError("it is too large")
    return _checked_text(path.read_bytes())


def _checked_text(content: bytes) -> str:
    """Return the content of a file as text.

    Raises:
        ValueError: It is not a text file of a usual size.
    """
    if len(content) > MAX_LABELS_BYTES:
        raise ValueError("it is too large")
    return decode_text(content)


def _from_literal(text: str) -> list[str]:
    """Return the names in a value in JSON or Python, or in lines of JSON."""
    try:
        return _from_value(json.loads(text))
    except json.JSONDecodeError:
        pass
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines):
        return _from_value([json.loads(line) for line in lines])
    return _from_value(_python_literal(text.strip()))


def _from_value(value: Any) -> list[str]:
    """Return the names of a list, or of a dictionary that gives each name or number its class.

    Raises:
        TypeError, ValueError: It is neither, or its items are no names.
    """
    if not isinstance(value, dict | list | tuple):  # a set has no order
        raise TypeError("it holds no list or dictionary of names")
    if isinstance(value, dict):
        key = next((key for key in NAME_KEYS if isinstance(value.get(key), dict | list)), None)
        if key is not None:
            return _from_value(value[key])
        if objects := _objects_of_table(value):
            return _from_objects(objects)
        by_name = all(_is_int(v) for v in value.values())  # torchvision's class_to_idx
        pairs = ((v, k) for k, v in value.items()) if by_name else value.items()
        return _in_order([(_class_number(number), name) for number, name in pairs])
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _from_objects(value)
    return [_name_of(item) for item in value]


def _objects_of_table(value: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Return the rows of a table as pandas writes it: orient="split", "table", "columns" or
    "index", whose keys are the numbers where there are no others; [] if it is none.

    Raises:
        TypeError: Its rows are not of one kind.
    """
    data, columns = value.get("data"), value.get("columns")
    if isinstance(data, list) and isinstance(columns, list):
        return [dict(zip(columns, row, strict=False)) for row in data]
    if isinstance(data, list) and "schema" in value:
        return [row for row in data if isinstance(row, dict)]
    parts = list(value.values())
    if not parts or not all(isinstance(part, dict) for part in parts):
        return []
    rows: dict[Any, dict[Any, Any]] = value
    if any(key in NAME_WORDS for key in value):
        rows = {key: {column: value[column].get(key) for column in value} for key in parts[0]}
    if not all(any(key in row for key in NAME_WORDS) for row in rows.values()):
        return []
    if any(key in NUMBER_WORDS for row in rows.values() for key in row):
        return list(rows.values())
    return [{NUMBER_WORDS[0]: key, **row} for key, row in rows.items()]


def _from_objects(objects: Sequence[dict[Any, Any]]) -> list[str]:
    """`[{"id": 1, "name": "cat"}]` -> ["cat"]

    Raises:
        ValueError: An object has no name, or their numbers do not count the classes.
    """
    pairs = []
    for position, item in enumerate(objects):
        name = next((item[key] for key in NAME_WORDS if key in item), None)
        if not isinstance(name, str):
            raise ValueError(f"{item!r:.40} has no name")
        number = next((item[key] for key in NUMBER_WORDS if key in item), position)
        pairs.append((_class_number(number), name))
    first = 1 if min(number for number, _ in pairs) == 1 else 0
    return _in_order([(number - first, name) for number, name in pairs])


def _from_table(lines: Sequence[str], ending: str) -> list[str]:
    """Return the names in a table whose header names their column; [] if it does not.

    Raises:
        ValueError: The numbers beside them do not count the classes.
        csv.Error: A quote is never closed.
    """
    first = lines[:1] if lines and len(lines[0]) <= MAX_HEADER else []
    for separator in ",;\t|":
        read = functools.partial(csv.reader, delimiter=separator, skipinitialspace=True)
        header = [_header_word(cell) for row in read(first) for cell in row]
        named = [i for i, word in enumerate(header) if word in NAME_WORDS]
        numbered = [i for i, word in enumerate(header) if word in NUMBER_WORDS]
        if not named or not numbered:
            continue
        rows = list(read(lines[1:]))
        if {len(row) for row in rows} == {len(header)}:
            name = min(named, key=lambda i: NAME_WORDS.index(header[i]))
            return _from_objects(
                [{"name": row[name].strip(), "id": row[numbered[0]].strip()} for row in rows]
            )
    is_header = ending == ".csv" and len(lines) > 1 and _unquoted(lines[0]).lower() in NAME_WORDS
    return [_unquoted(line) for line in lines[1:]] if is_header else []


def _header_word(cell: str) -> str:
    """`Class ID` -> `class_id`"""
    return re.sub(r"[\W_]+", "_", cell.strip().lower())


def _python_literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_BYTES:
        raise ValueError("it is not JSON, and is too large for a list in Python")
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is neither JSON nor a list or dictionary in Python") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _class_number(value: object) -> int:
    if _is_int(value) or (isinstance(value, str) and re.fullmatch(r"\d{1,9}", value)):
        return int(value)  # type: ignore[call-overload]
    raise TypeError(f"{value!r:.40} is not a class number")


def _from_lines(lines: Sequence[str]) -> list[str]:
    """Return the names of lines, without numbers, WordNet IDs, quotes and a header."""
    for pattern in (NUMBERED, NUMBERED_LAST, WITH_WNID):
        for body in (lines, lines[1:]):  # the first line may be a header
            matches = [pattern.fullmatch(line) for line in body]
            if len(body) > 1 and all(matches):
                pairs = [(match[1], match[2]) for match in matches if match]
                if pattern is NUMBERED_LAST:
                    pairs = [(number, name) for name, number in pairs]
                pairs = [(number, _unquoted(name.strip())) for number, name in pairs]
                if pattern is WITH_WNID:
                    return [name for _, name in pairs]
                numbers = sorted(int(number) for number, _ in pairs)
                if numbers == list(range(numbers[0], numbers[0] + len(pairs))) and numbers[0] < 2:
                    return _in_order([(int(n) - numbers[0], name) for n, name in pairs])
    return [_unquoted(line) for line in lines]


def _in_order(pairs: Sequence[tuple[int, Any]]) -> list[str]:
    """Return names in the order of their numbers, which must be 0, 1, 2 and so on.

    Raises:
        ValueError: They are not.
    """
    ordered = sorted(pairs, key=lambda pair: pair[0])
    if [number for number, _ in ordered] != list(range(len(ordered))):
        raise ValueError("the class numbers are not 0, 1, 2 and so on")
    return [_name_of(name) for _, name in ordered]


def _name_of(item: Any) -> str:
    """Return the name of an entry: text, or a pair of a WordNet ID and a name, as in Keras."""
    if isinstance(item, list | tuple) and item:
        item = item[-1]
    if not isinstance(item, str):
        raise TypeError(f"{item!r:.40} is not a class name")
    return item


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


@functools.cache
def _label_sets() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("class_names.json").read_text(encoding="utf-8")
    return {name: tuple(names) for name, names in json.loads(text).items()}
