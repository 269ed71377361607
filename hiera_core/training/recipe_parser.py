"""Dataclasses from what YAML holds, with every key and value checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal

from ..errors import UsageError, did_you_mean


def build(cls: Any, values: Any, where: str = "") -> Any:
    """A dataclass from a dictionary, every value turned into its field's type.

    Raises:
        UsageError: an unknown key (the hint names the near one), a missing or a wrong value.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'the recipe'} is {values!r}", "give `key: value` lines")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            hint = did_you_mean(str(key), types) or f"keys are {', '.join(types)}"
            raise UsageError(f"unknown key {_path(where, key)!r}", hint)
    for spec in dataclasses.fields(cls):
        unset = spec.default is spec.default_factory is dataclasses.MISSING
        if unset and spec.name not in values:
            raise UsageError(f"the recipe lacks {_path(where, spec.name)!r}", "set it")
    return cls(**{k: _typed(types[k], v, _path(where, k)) for k, v in values.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is UnionType:
            return _typed_union(choices, value, where)
        if origin is Literal:
            return choices[choices.index(value)]
        if origin is tuple:
            return tuple(_typed(t, v, where) for t, v in zip(choices, value, strict=True))
        if kind is float and not isinstance(value, bool):
            return float(value)  # also of "1e-3", which YAML takes for text
        if kind is int and not isinstance(value, bool) and float(value) == int(value):
            return int(value)
        if isinstance(value, origin or kind):
            return value
    except (TypeError, ValueError):
        pass
    raise UsageError(f"{where} is {value!r}", f"expected {_say(kind)}")


def _typed_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in choices:
        return None
    if isinstance(value, str) and str in choices:
        return value
    others = [c for c in choices if c not in (NoneType, str)]
    return _typed(others[0] if others else str, value, where)


def _say(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return str(getattr(kind, "__name__", kind)) if not typing.get_args(kind) else str(kind)


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
