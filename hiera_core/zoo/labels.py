"""Class names of ImageNet-1k and Kinetics-400, and of files with one name per line.

class_names.json holds the names as torchvision's weights list them (`meta["categories"]`), and the
WordNet IDs of ImageNet-1k, which are in the order of its classes.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..plain_data import utf8_text

MAX_LABELS_BYTES = 8 << 20
MAX_LITERAL_BYTES = 1 << 20  # Python needs 250 times as much memory to read a literal
NUMBERED = re.compile(r"(\d{1,6})\s*[\s:,;=|]\s*(\S.*)")  # `3 cat`, `3: cat`, `3,cat`
NUMBERED_LAST = re.compile(r"(\S.*)[\t:,;=|] *(\d{1,6})")  # `cat,3`
WITH_WNID = re.compile(r"(n\d{8})[\s,;]+(\S.*)")  # `n01440764 tench, Tinca tinca`
NOT_READ = (".pbtxt", ".prototxt", ".textproto")  # their lines are not names
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
    names, or a dictionary that maps numbers to names or names to numbers.

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
        names = _from_literal(text) if text.lstrip()[:1] in ("{", "[") else _from_lines(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise _unreadable(name, error) from error
    if not names:
        raise UsageError(f"labels {name} are empty", "write one class name per line")
    return names


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
    return utf8_text(content)


def _from_literal(text: str) -> list[str]:
    """Return the names of a list, or of a dictionary that gives each name or number its class."""
    try:
        value = json.loads(text)
    except ValueError:
        value = _python_literal(text.strip())
    if isinstance(value, dict):
        by_name = all(_is_int(v) for v in value.values())  # torchvision's class_to_idx
        pairs = ((v, k) for k, v in value.items()) if by_name else value.items()
        return _in_order([(_class_number(number), name) for number, name in pairs])
    return [_name_of(item) for item in value]


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


def _from_lines(text: str) -> list[str]:
    """Return the names of lines, without numbers, WordNet IDs, quotes and a header."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
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
