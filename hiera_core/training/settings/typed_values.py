"""Convert nested dictionaries, such as those of a YAML file, to dataclasses, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal

from ...errors import UsageError, did_you_mean

PLAIN_NAMES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    dict: "`key: value` lines",
    NoneType: "null",
}


class UnknownKeyError(UsageError):
    """A key that the recipe does not have.

    Attributes:
        key: The key, without the sections that it is in.
        similar: Whether the hint suggests a similar key of the same section.
    """

    key = ""
    similar = False


def plain(value: Any) -> Any:
    """Convert tuples to lists, including those in dictionaries."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def build_settings(cls: Any, values: Any, where: str = "") -> Any:
    """Build a dataclass from a dictionary, and convert each value to the type of its field.

    Args:
        cls: The dataclass. Its fields may be dataclasses too.
        values: The values, by field name.
        where: Dotted key of `values` in the recipe, for messages; empty for the whole recipe.

    Raises:
        UsageError: A key is unknown (the hint suggests a similar one), a required key is missing,
            or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'the recipe'} is {values!r}", "give `key: value` lines")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            similar = did_you_mean(str(key), types)
            hint = similar or f"keys are {', '.join(types)}"
            error = UnknownKeyError(f"unknown key {_path(where, key)!r}", hint)
            error.key, error.similar = str(key), bool(similar)
            raise error
    for spec in dataclasses.fields(cls):
        required = spec.default is spec.default_factory is dataclasses.MISSING
        if required and spec.name not in values:
            raise UsageError(f"the recipe has no {_path(where, spec.name)!r}", "set it")
    return cls(**{k: _convert(types[k], v, _path(where, k)) for k, v in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a value to a type: a dataclass, union, Literal, tuple or plain type."""
    if dataclasses.is_dataclass(kind):
        return build_settings(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin in (UnionType, typing.Union):  # the latter from a Literal or None
            return _convert_to_union(arguments, value, where)
        if origin is Literal:
            return arguments[arguments.index(value)]
        if origin is tuple:
            return tuple(_convert(t, v, where) for t, v in zip(arguments, value, strict=True))
        if kind is float and not isinstance(value, bool):
            return float(value)  # YAML parses "1e-3" as a string
        if kind is int and not isinstance(value, bool) and float(value) == int(value):
            return int(value)
        if isinstance(value, origin or kind):
            return value
    except UsageError:  # about a value within this one
        raise
    except (TypeError, ValueError, OverflowError):  # the last from numbers beyond any float
        pass
    raise UsageError(f"{where} is {value!r}", f"expected {_describe_type(kind)}")


def _convert_to_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert a value to a member of a union. A string stays a string if the union has `str`."""
    if value is None and NoneType in members:
        return None
    if isinstance(value, str) and str in members:
        return value
    others = [member for member in members if member not in (NoneType, str)] or [str]
    for member in others[:-1]:
        with contextlib.suppress(UsageError):
            return _convert(member, value, where)
    try:
        return _convert(others[-1], value, where)
    except UsageError as error:
        if len(others) == 1:
            raise
        expected = " or ".join(_describe_type(member) for member in others)
        raise UsageError(error.message, f"expected {expected}") from error


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        return " or ".join(map(_describe_type, arguments))
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_describe_type(arguments[0])}"
    return PLAIN_NAMES.get(origin or kind, str(getattr(kind, "__name__", kind)))


def _path(where: str, key: object) -> str:
    """Return the dotted key of `key` under `where`."""
    return f"{where}.{key}" if where else str(key)
