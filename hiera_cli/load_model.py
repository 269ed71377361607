"""From the model options to what a command works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.records import Kind
from hiera_core.weights import download

from .exit_codes import print_message

Task = Literal["classifier", "autoencoder", "encoder"]


def check_model_name(name: str | None) -> zoo.ModelEntry | None:
    """The zoo's row that --model names, if it names one. Finds a mistyped name before torch is
    imported.

    Raises:
        UsageError: neither a model nor a place.
    """
    if name is None or download.is_location(name):
        return None
    return zoo.get(zoo.split_tag(name)[0])


def load_model(task: Task, name: str | None, checkpoint: str | None, random_init: bool) -> Any:
    """What a `Pipeline` takes as its model: a name, a built model, a function of the input's kind,
    or None where the input decides.

    Raises:
        UsageError, CheckpointError, HubError: as `factory.create_classifier`.
    """
    from hiera_core.models import factory

    create: dict[Task, Callable[..., Any]] = {
        "classifier": factory.create_classifier,
        "autoencoder": factory.create_autoencoder,
        "encoder": factory.create_encoder,
    }
    if random_init:
        if checkpoint is not None or (name is not None and download.is_location(name)):
            raise UsageError("--random-init takes no weights", "give a name from `hiera models`")
        print_message("--random-init: weights are random, the outputs mean nothing")
        front = "mae_" if task == "autoencoder" else ""
        defaults = {"image": zoo.DEFAULT_IMAGE_MODEL, "video": zoo.DEFAULT_VIDEO_MODEL}

        def build(kind: Kind) -> Any:
            import torch

            torch.manual_seed(0)  # but the same in every run
            return factory.create_model(name or front + defaults[kind])

        return build if name is None else build("image")
    if checkpoint is None:
        return name
    return create[task](name, checkpoint)
