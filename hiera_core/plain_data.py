"""Plain data as text: strict JSON is written, and YAML is read within limits.

The files may come from somebody else, or not be what they were meant to be: a device, a picture.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 20
SIZES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
SURROGATE = re.compile("[\ud800-\udfff]")  # halves of characters, which UTF-8 cannot encode
# Those that do not stand for bytes of a name that is not UTF-8 (`os.fsdecode`).
NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
PROBED_BYTES = 1 << 12  # in which UTF-16 is looked for
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",  # the mark says in which order the bytes are
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f]")  # characters that texts do not hold
# What may come before the header of a table: which separator it has (Excel), or what its rows were
# (PowerShell's Export-Csv).
TABLE_PREAMBLE = re.compile(r"\ufeff?(?:\"?sep=(.)\"?|\"?#TYPE [^\r\n]*)\r?\n")
MAX_YAML_VALUES = 100_000  # after aliases (`*name`) are expanded, which may be exponentially many


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return a value as JSON. NaN and infinity, which JSON does not have, become null."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def is_utf8(path: str | Path) -> bool:
    """Return whether the bytes of a path are UTF-8 text."""
    return SURROGATE.search(os.fspath(path)) is None


def valid_text(value: Any) -> Any:
    """Return a value of JSON in which U+FFFD replaces each character that UTF-8 cannot encode.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    if isinstance(value, str):
        return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {valid_text(key): valid_text(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(valid_text, value))
    return value


def valid_name(text: str) -> str:
    """Return a name or label in which U+FFFD replaces halves of characters, which JSON may hold
    (`"\\ud800"`). Bytes that are not UTF-8 stay, see `os.fsdecode`."""
    return NO_BYTE.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts: `1 input`, `2 inputs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short_number(number: float) -> str:
    """Return a number with three digits, or all of those in front of the point: 0.123, 1,234."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"


def size_text(count: float) -> str:
    """Return a number of bytes in a unit that suits it: 4 kB, 1.2 MB, 310 GB."""
    unit = next((u for u in ("GB", "MB") if count >= SIZES[u]), "kB")
    return f"{short_number(count / SIZES[unit])} {unit}"


def text_encoding(start: bytes) -> str:
    """Return the encoding of a text file, by its first bytes: UTF-8 or UTF-16, with or without a
    byte order mark. Excel ("Unicode text") and PowerShell (`>`) write UTF-16.

    UTF-16 without a mark is recognised by zeros in every second byte of most characters, if there
    is a line end, and no control character. So paths that are separated by NUL are UTF-8.

    Args:
        start: The first bytes: all, or `PROBED_BYTES`, or what has arrived.

    Returns:
        The name of the codec. It leaves a byte order mark out.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    probed = start[: min(len(start), PROBED_BYTES) // 2 * 2]
    for encoding, zeros, others in (
        ("utf-16-le", probed[1::2], probed[0::2]),
        ("utf-16-be", probed[0::2], probed[1::2]),
    ):
        if b"\0" not in others and 2 * zeros.count(0) > len(zeros):
            text = probed.decode(encoding, "replace")
            if "\n" in text and not CONTROL.search(text):
                return encoding
    return "utf-8"


def decode_text(content: bytes) -> str:
    """Return the content of a text file in UTF-8 or UTF-16, without a byte order mark.

    Raises:
        UnicodeError: It is in another encoding.
        ValueError: It is not text.
    """
    encoding = text_encoding(content)
    is_wide = encoding.startswith("utf-16")
    if not is_wide and b"\0" in content:
        raise ValueError("it is not a text file")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnicodeError(f"it is not in UTF-{16 if is_wide else 8}") from error
    if "\0" in text:
        raise ValueError("it is not a text file")
    return text


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is too large, is not text, or is not valid YAML.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"it is larger than {MAX_YAML_BYTES >> 20} MiB")
    return parse_yaml(decode_text(content))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: The text is not valid YAML, or nests or expands too far.
    """
    try:
        value = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(_describe_mark(error)) from error
    except Exception as error:  # PyYAML raises many types, such as KeyError for `!!bool x`
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _check_count(value)
    return value


def _describe_mark(error: yaml.MarkedYAMLError) -> str:
    """Return where a YAML text is not valid, and why, as far as PyYAML says."""
    mark = error.problem_mark or error.context_mark
    reason = " ".join((error.problem or error.context or "not valid YAML").split())
    return reason if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {reason}"


def _check_count(value: Any) -> None:
    """Check the number of values, those behind an alias counted wherever it stands.

    Raises:
        ValueError: There are too many, or a value contains itself.
    """
    count, remaining = 0, [value]
    while remaining:
        item = remaining.pop()
        count += 1
        if count > MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {MAX_YAML_VALUES:,} values")
        if isinstance(item, dict):
            remaining += item.values()
        elif isinstance(item, list | tuple | set):
            remaining += item


def _with_nulls(value: Any) -> Any:
    """Replace numbers that are not finite by None, also in lists and dictionaries."""
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
