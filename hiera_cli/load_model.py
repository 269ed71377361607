"""Turn --model, --checkpoint and --random-init into a model, and --labels into class names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.errors import InputError, UsageError
from hiera_core.records import Kind
from hiera_core.weights import names
from hiera_core.zoo.input_sizes import full_size
from hiera_core.zoo.labels import parse_labels, read_labels

from .exit_codes import print_message

if TYPE_CHECKING:
    from hiera_core.inference.pipeline import GivenModel
    from hiera_core.models.encoder import Encoder

DEFAULTS: dict[Kind, str] = {"image": zoo.DEFAULT_IMAGE_MODEL, "video": zoo.DEFAULT_VIDEO_MODEL}
Task = Literal["classifier", "autoencoder", "encoder"]


def check_model_name(name: str | None) -> zoo.ModelEntry | None:
    """Return the zoo's entry that --model names; None if it names a location, or is not given.

    This does not import torch, so that a mistyped name is reported at once.

    Raises:
        UsageError: The name is "", or neither a model in the zoo nor a location.
    """
    return None if name is None else names.find_entry(name)


def models_by_kind(
    name: str | None, checkpoint: str | None, *, single_frames: bool = False
) -> dict[str, str]:
    """Return the name of the model that classifies images and videos, as records have it. It is
    empty if only the weights themselves say so.

    Args:
        name: Value of --model.
        checkpoint: Value of --checkpoint.
        single_frames: Whether videos go to the image model.
    """
    entry = check_model_name(name)
    if checkpoint is not None or (name is not None and entry is None):
        return {}
    image = entry.name if entry else zoo.DEFAULT_IMAGE_MODEL
    video = image if entry or single_frames else zoo.DEFAULT_VIDEO_MODEL
    return {"image": image, "video": video}


def load_model(
    task: Task,
    name: str | None,
    checkpoint: str | None,
    random_init: bool,
    size: tuple[int, ...] | None = None,
) -> GivenModel:
    """Return the model of a command, in a form that a `Pipeline` accepts.

    This is a model that the pipeline may change, its name, a function that builds a model for a
    kind of input, or None for the default model of each kind.

    Args:
        task: What the model must be able to do. A `Pipeline` checks this for a model with random
            weights, or one that it loads by its name.
        name: Value of --model.
        checkpoint: Value of --checkpoint.
        random_init: Value of --random-init.
        size: Value of --size, for an encoder.

    Raises:
        UsageError, CheckpointError, HubError: See `factory.create_classifier`.
    """
    if random_init:
        return _random_model(task, name, checkpoint, size)
    if checkpoint is None and size is None:
        return name
    from hiera_core.inference.pipeline import Owned
    from hiera_core.models import factory

    if size is not None:
        if name is not None or checkpoint is not None:
            return Owned(factory.create_encoder(name, checkpoint, size))
        return lambda kind: factory.create_encoder(DEFAULTS[kind], None, size)
    assert checkpoint is not None

    create: dict[Task, Callable[[str | None, str], Encoder]] = {
        "classifier": factory.create_classifier,
        "autoencoder": factory.create_autoencoder,
        "encoder": factory.create_encoder,
    }
    return Owned(create[task](name, checkpoint))


def row_model(name: str | None, checkpoint: str | None, random_init: bool) -> str | None:
    """Return --model in the form that `callables.OnColumns` takes, which loads it in each worker.

    Raises:
        UsageError: --random-init goes with weights.
    """
    if not random_init:
        return name
    entry = None if name is None else names.find_entry(name)
    if checkpoint is not None or (name is not None and entry is None):
        raise UsageError("--random-init takes no weights", "give a name from `hiera models`")
    print_message("--random-init: weights are random, the outputs mean nothing")
    return None if entry is None else entry.name


def _random_model(
    task: Task, name: str | None, checkpoint: str | None, size: tuple[int, ...] | None
) -> GivenModel:
    """Return a model with random weights, or, without a name, a function that builds one."""
    if checkpoint is not None or (name is not None and names.find_entry(name) is None):
        raise UsageError("--random-init takes no weights", "give a name from `hiera models`")
    print_message("--random-init: weights are random, the outputs mean nothing")
    from hiera_core.inference.pipeline import Owned
    from hiera_core.models import factory

    prefix = "mae_" if task == "autoencoder" else ""

    def build(kind: Kind) -> Encoder:
        import torch

        chosen = name or prefix + DEFAULTS[kind]
        torch.manual_seed(0)  # every run gets the same weights
        if size is None:
            return factory.create_model(chosen)
        dims = len(zoo.get(chosen).config["input_size"])
        return factory.create_model(chosen, input_size=full_size(size, dims))

    return build if name is None else Owned(build("image"))


def read_label_file(text: str) -> list[str]:
    """Return class names in the order of class indices; see `read_labels`.

    Args:
        text: A path, or a URL of the web or a remote place.

    Raises:
        UsageError: It cannot be read, is empty, or its numbers are not those of classes.
    """
    source = sources.from_name(text)
    if source.url is None:
        return read_labels(source.path or text)
    try:
        content = source.content()
    except InputError as error:
        raise UsageError(f"labels {text} cannot be read ({error.message})", error.hint) from error
    return parse_labels(content.read_bytes() if isinstance(content, Path) else content, text)
