"""Models outside the zoo that a benchmark is given: their architecture, read from their checkpoint.

Workers build them from this description, so each checkpoint is read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import zoo
from ..models import factory
from ..models.encoder import Encoder
from ..weights import names

# Whose recipe and kind stand for a checkpoint that resembles no model in the zoo: by whether it is
# an autoencoder, and the number of dimensions of its input.
SAM2 = "sam2_hiera_tiny"
NEAREST = {
    (False, 2): "hiera_base_224",
    (False, 3): "hiera_base_16x224",
    (True, 2): "mae_hiera_base_224",
    (True, 3): "mae_hiera_base_16x224",
}
Description = dict[str, Any]  # plain data, for JSON


def describe_models(given: Sequence[str]) -> dict[str, Description | None]:
    """Return the description of each checkpoint, and None for models in the zoo.

    Args:
        given: What `--model` of `hiera predict` takes. The zoo comes first; `./name` is a folder.

    Raises:
        UsageError: A name is neither a model in the zoo nor a location.
        CheckpointError, HubError: A checkpoint cannot be read, or its architecture is unknown.
    """
    return {name: None if names.find_entry(name) else _describe(name) for name in given}


def entry_of(description: Description) -> zoo.ModelEntry:
    """Return a description in the form of the zoo's entries.

    Its name is that of the model in the zoo that has most in common with it.
    """
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    nearest = zoo.get(description["nearest"])
    kind = zoo.get(NEAREST[False, 3 if len(config["input_size"]) == 3 else 2]).kind
    return dataclasses.replace(
        nearest,
        config=config,
        kind=kind,
        params=description["params"],
        preprocessing=description["preprocessing"],
        speed=None,
    )


def _describe(name: str) -> Description:
    model: Encoder = factory.create_encoder(name)
    config: dict[str, Any] = dict(model.config)
    known = factory.class_of(model.family, hasattr(model, "decoder_blocks")).config_class
    nearest = _nearest(model)
    # Peers do not know all arguments, and need those that the zoo gives.
    defaults = {field.name: field.default for field in dataclasses.fields(known)}
    wanted = zoo.get(nearest).config
    return {
        "nearest": nearest,
        "config": {k: v for k, v in config.items() if k in wanted or v != defaults.get(k)},
        "preprocessing": model.card.get("preprocessing") or {},
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def _nearest(model: Encoder) -> str:
    """Return the model in the zoo of the same widths, depths and kind of input, or one of the same
    kind."""
    is_autoencoder = hasattr(model, "decoder_blocks")
    config: dict[str, Any] = dict(model.config)
    dims = 3 if len(config["input_size"]) == 3 else 2
    for entry in zoo.models().values():
        if (
            entry.family == model.family
            and entry.autoencoder == is_autoencoder
            and zoo.block_dims(entry.config) == zoo.block_dims(config)
            and len(entry.config["input_size"]) == dims
            and bool(entry.config.get("abs_win_pos_embed")) == bool(config.get("abs_win_pos_embed"))
        ):
            return entry.name
    return SAM2 if model.family == "hieradet" else NEAREST[is_autoencoder, dims]
