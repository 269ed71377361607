"""Public functions and classes are typed: nothing that a user gets or gives is `Any`.

types_of_calls.py beside this file holds calls whose types mypy checks in CI.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_core import zoo
from hiera_core.models.config import (
    AutoencoderArguments,
    AutoencoderConfig,
    HieraArguments,
    HieraConfig,
)
from hiera_core.models.sam2.hieradet_config import HieraDetArguments, HieraDetConfig


def holds_any(hint: object) -> bool:
    """Whether a type is `Any`, or has it as an argument at any depth."""
    return hint is Any or any(holds_any(part) for part in typing.get_args(hint))


def signatures(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the function, or the public methods and properties of the class."""
    if not inspect.isclass(thing):
        yield thing.__name__, thing
        return
    ours = [c for c in thing.__mro__ if c.__module__.startswith("hiera_core.")]
    for cls in ours:
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)  # of a classmethod
            public = name == "__init__" or not name.startswith("_")
            if public and inspect.isfunction(function) and name not in INTERNAL:
                yield f"{cls.__name__}.{name}", function


# Hooks of the pipelines, which users do not call.
INTERNAL = ("make_runner", "compiled", "mismatch", "finish_image", "finish_video", "runner")


@pytest.mark.parametrize("name", [n for n in hiera_core.__all__ if n != "__version__"])
def test_public_signatures_have_no_any(name: str) -> None:
    thing = getattr(hiera_core, name)
    for label, function in signatures(thing):
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
        missing = [p for p in parameters if p not in hints and p not in ("self", "cls")]
        assert not missing, f"{label}: {missing} have no type"
        bad = [p for p, hint in hints.items() if holds_any(hint)]
        assert not bad, f"{label}: {bad} are Any"
    if dataclasses.is_dataclass(thing) or typing.is_typeddict(thing):
        bad = [k for k, hint in typing.get_type_hints(thing).items() if holds_any(hint)]
        assert not bad, f"{name}: {bad} are Any"


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (HieraArguments, HieraConfig),
        (AutoencoderArguments, AutoencoderConfig),
        (HieraDetArguments, HieraDetConfig),
    ],
)
def test_typed_arguments_are_the_fields_of_the_config(arguments: Any, config: Any) -> None:
    hints = typing.get_type_hints(arguments)
    assert hints == {f.name: typing.get_type_hints(config)[f.name] for f in fields(config)}


def fields(config: Any) -> tuple[Any, ...]:
    return dataclasses.fields(config)


def test_type_checkers_know_every_public_name() -> None:
    """The names under TYPE_CHECKING are those that are resolved when the program runs."""
    text = Path(hiera_core.__file__).read_text()
    declared = text.split("if TYPE_CHECKING:", 1)[1].split("_PUBLIC = {", 1)[0]
    for name in hiera_core.__all__:
        assert (
            name == "__version__"
            or f"import {name} as {name}\n" in declared
            or (name in zoo.names() and f"    {name}: ModelFunction\n" in declared)
        ), name


def test_positional_arguments_work() -> None:
    model = hiera_core.Hiera((64, 64), 3, 16, 1, 10, (1, 1, 2, 1))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
