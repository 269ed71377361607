"""Inference on a stream of inputs: predict, features, reconstruct, evaluate.

`Embedder`, `Classifier` and `Decoder` compute on columns of a table; see `columns.callables`. They
are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .columns.callables import Classifier as Classifier
    from .columns.callables import Decoder as Decoder
    from .columns.callables import Embedder as Embedder

__all__ = ["Classifier", "Decoder", "Embedder"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(".columns.callables", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
