"""From the model options to what a command works with."""

from __future__ import annotations

from typing import Any

from hiera_core import hub
from hiera_core.errors import UsageError
from hiera_core.records import Kind

from .errors import say


def classifier(model: str | None, checkpoint: str | None, random_init: bool) -> Any:
    """What `Predictor` takes as its model: a name, a built model, a function of the input's kind,
    or None where the input decides.

    Raises:
        UsageError, CheckpointError, HubError: as `factory.create_classifier`.
    """
    from hiera_core import factory
    from hiera_core.predictor import DEFAULT_MODELS

    if random_init:
        import torch

        if checkpoint is not None or (model is not None and hub.is_place(model)):
            raise UsageError("--random-init takes no weights", "give a name from `hiera models`")
        say("--random-init: weights are random, the outputs mean nothing")

        def build(kind: Kind) -> Any:
            torch.manual_seed(0)  # but the same in every run
            return factory.create_model(model or DEFAULT_MODELS[kind])

        return build if model is None else build("image")
    if checkpoint is None:
        return model
    return factory.create_classifier(model, checkpoint)
