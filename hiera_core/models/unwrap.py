"""The Hiera inside the wrappers of PyTorch and PEFT."""

from __future__ import annotations

from ..wrappers import find_inside, no_hiera
from .encoder import Encoder


def unwrap_model(model: object) -> Encoder:
    """Return the Hiera inside of a wrapper, or the model itself if it has none.

    The wrappers are those of torch.compile, DataParallel, DDP, FSDP, averaged weights and PEFT. A
    model that is compiled, or has adapters, shares its parameters with the one that is returned;
    adapters stay active.

    Raises:
        UsageError: There is no Hiera inside. The message names the type of the model.
    """
    inner = find_model(model)
    if inner is None:
        raise no_hiera(model)
    return inner


def find_model(model: object) -> Encoder | None:
    """Return the Hiera inside of a wrapper, or None if there is none."""
    found = find_inside(model, lambda inner: isinstance(inner, Encoder))
    return found if isinstance(found, Encoder) else None
