"""Models by name: `create_model`, and the 20 functions of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .. import zoo
from ..errors import CheckpointError, UsageError, did_you_mean
from ..weights import download, load
from ..zoo import labels
from . import pretrained
from .backbone import FeatureBackbone
from .hiera import Hiera, HieraEncoder
from .mae import MaskedAutoencoderHiera
from .pos_embed import ResampleRule


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    features_only: bool = False,
    resample: ResampleRule = "absolute-window",
    **config: Any,
) -> HieraEncoder | FeatureBackbone:
    """A model from the zoo, the hub or a file.

    Args:
        name: a zoo name (`hiera_base_224`), one with its checkpoint (`hiera_base_224.mae_in1k`), or
            a hub repository, folder or file, which always brings its weights.
        pretrained: load weights; otherwise they are newly initialised.
        checkpoint: which: a tag of the model, a hub repository, URL, folder or file. The last four
            load even without `pretrained`.
        strict: every parameter must be in the checkpoint (but for a replaced head).
        features_only: return stage maps, channels first (see `FeatureBackbone`).
        resample: how position embeddings come to another `input_size`: `absolute-window`, or plain
            `bicubic` (see positions.py).
        config: constructor arguments that differ from the zoo's, e.g. `num_classes=10`,
            `input_size=(384, 384)`.

    Raises:
        UsageError: unknown model or checkpoint.
        CheckpointError, HubError: see `weights.read`.
    """
    row, choice = (
        find_entry(name),
        zoo.split_tag(name)[1] if checkpoint is None else str(checkpoint),
    )
    if row is None:
        model = from_checkpoint(
            load.read_checkpoint(name), strict=strict, resample=resample, **config
        )
    else:
        wanted = pretrained or choice not in (None, *row.checkpoints)
        loaded = _read_for(row, choice) if wanted else None
        model = from_zoo(row, loaded, strict=strict, resample=resample, **config)
    return FeatureBackbone(model) if features_only else model


def create_classifier(name: str | None, checkpoint: str | Path | None = None) -> Hiera:
    """A classifier with its weights, for prediction.

    Args:
        name: as for `create_model`, or None for the model that `checkpoint` was saved from.
        checkpoint: in place of the model's own weights.

    Raises:
        UsageError: unknown model, or an autoencoder (found before weights are read).
        CheckpointError: it has no classifier (pre-trained only); see `weights.read`.
        HubError: it cannot be fetched.
    """
    row = None if name is None else find_entry(name)
    if row is not None and row.autoencoder:
        raise UsageError(
            f"{row.name} is an autoencoder: it reconstructs, it does not classify",
            f"use {row.name.removeprefix('mae_')}",
        )
    loaded = _read_chosen(row, name, checkpoint)
    if not loaded.num_classes:
        raise CheckpointError(
            f"{loaded.source} has no classifier: it was only pre-trained",
            "fine-tune it first, or use a fine-tuned one such as hiera_base_224.mae_in1k_ft_in1k",
        )
    model = from_checkpoint(loaded) if row is None else from_zoo(row, loaded)
    assert isinstance(model, Hiera)
    return model


def create_autoencoder(
    name: str | None, checkpoint: str | Path | None = None
) -> MaskedAutoencoderHiera:
    """An autoencoder with its weights, for reconstruction. Arguments: as `create_classifier`.

    Raises:
        UsageError: unknown model, or a classifier (found before weights are read).
        CheckpointError: it has no decoder; see `weights.read`.
        HubError: it cannot be fetched.
    """
    row = None if name is None else find_entry(name)
    if row is not None and not row.autoencoder:
        raise UsageError(
            f"{row.name} is a classifier: it has no decoder to reconstruct with",
            f"use mae_{row.name}",
        )
    loaded = _read_chosen(row, name, checkpoint)
    if not loaded.is_autoencoder:
        raise CheckpointError(
            f"{loaded.source} has no decoder: it cannot reconstruct",
            "use the weights of an autoencoder such as mae_hiera_base_224",
        )
    model = from_checkpoint(loaded) if row is None else from_zoo(row, loaded)
    assert isinstance(model, MaskedAutoencoderHiera)
    return model


def create_encoder(name: str | None, checkpoint: str | Path | None = None) -> HieraEncoder:
    """A classifier or an autoencoder with its weights, for features. Arguments and errors: as
    `create_classifier`. A classifier that was only pre-trained comes without a head, and with the
    encoder's norm as its own."""
    row = None if name is None else find_entry(name)
    loaded = _read_chosen(row, name, checkpoint)
    if row is None:
        return from_checkpoint(loaded)
    if row.autoencoder or not loaded.is_autoencoder:
        return from_zoo(row, loaded)
    for part in ("weight", "bias"):
        loaded.state[f"norm.{part}"] = loaded.state[f"encoder_norm.{part}"]
    return from_zoo(row, loaded, num_classes=0)


def find_entry(name: str) -> zoo.ModelEntry | None:
    """The zoo's row that a name means; None when it names a place (file, folder, repository).

    Raises:
        UsageError: neither.
    """
    base, tag = zoo.split_tag(name)
    row = zoo.models().get(base)
    if row is not None and (tag is None or tag in row.checkpoints):
        return row
    return None if download.is_location(name) else zoo.get(base)


def read_weights(name: str) -> load.Checkpoint:
    """The weights that a name means: a zoo name (with its tag), or a place.

    Raises:
        UsageError: neither. CheckpointError, HubError: see `weights.read`.
    """
    row = None if Path(name).exists() else find_entry(name)
    return load.read_checkpoint(name) if row is None else _read_for(row, zoo.split_tag(name)[1])


def _read_chosen(
    row: zoo.ModelEntry | None, name: str | None, checkpoint: str | Path | None
) -> load.Checkpoint:
    """The weights that a name and `checkpoint` mean together."""
    if row is None or name is None:
        return load.read_checkpoint(checkpoint or str(name))
    return _read_for(row, zoo.split_tag(name)[1] if checkpoint is None else str(checkpoint))


def _read_for(row: zoo.ModelEntry, choice: str | None) -> load.Checkpoint:
    """A tag's weights, or those of a place."""
    if choice is not None and choice not in row.checkpoints and download.is_location(choice):
        return load.read_checkpoint(choice)
    return load.read_released(row, choice)


def list_models() -> list[str]:
    """Names of all models."""
    return zoo.names()


def from_zoo(
    row: zoo.ModelEntry,
    checkpoint: load.Checkpoint | None = None,
    strict: bool = True,
    resample: ResampleRule = "absolute-window",
    **config: Any,
) -> HieraEncoder:
    """Build a zoo row, with a checkpoint's weights or newly initialised."""
    cls = MaskedAutoencoderHiera if row.autoencoder else Hiera
    model: HieraEncoder
    if checkpoint is None:
        model, card = cls(**{**row.config, **config}), {}
    else:
        model = pretrained.build(
            cls,
            row.config,
            checkpoint,
            overrides=config,
            name=row.name,
            strict=strict,
            resample=resample,
        )
        card = checkpoint.card
    model.card = {**card_of(row, None if checkpoint is None else checkpoint.source), **card}
    return model


def from_checkpoint(
    checkpoint: load.Checkpoint,
    strict: bool = True,
    resample: ResampleRule = "absolute-window",
    **config: Any,
) -> HieraEncoder:
    """Build the model that a checkpoint was saved from."""
    cls = MaskedAutoencoderHiera if checkpoint.is_autoencoder else Hiera
    arguments = pretrained.architecture(checkpoint)
    model = pretrained.build(
        cls, arguments, checkpoint, overrides=config, strict=strict, resample=resample
    )
    row = load.identify_model(checkpoint.state)
    known = card_of(row, checkpoint.source) if row else {"source": checkpoint.source}
    model.card = {**known, **checkpoint.card}
    return model


def card_of(row: zoo.ModelEntry, source: str | None = None) -> dict[str, Any]:
    """What a model carries besides its weights: name, preprocessing, licence, origin."""
    card: dict[str, Any] = {"model": row.name, "preprocessing": row.preprocessing}
    if isinstance(row.classes, list):
        card |= {"classes": row.classes}
    if source is not None:
        card |= {"source": source}
    if source is not None and source.startswith(row.name + "."):
        card |= {"licence": row.licence}
    return card


def class_names_of(model: nn.Module) -> list[str] | None:
    """Names of a classifier's classes, where they are known."""
    head = getattr(model, "head", None)
    if not hasattr(head, "projection"):
        return None
    count: int = head.projection.out_features  # type: ignore[union-attr]
    known = getattr(model, "card", {}).get("classes")
    names = labels.for_classes(count, known)
    return None if names is None else list(names)


def _zoo_function(row: zoo.ModelEntry) -> Callable[..., HieraEncoder]:
    def build(
        pretrained: bool = False,
        checkpoint: str | None = row.default,
        strict: bool = True,
        resample: ResampleRule = "absolute-window",
        **config: Any,
    ) -> HieraEncoder:
        if pretrained:
            loaded = load.read_released(row, checkpoint)
            return from_zoo(row, loaded, strict=strict, resample=resample, **config)
        return from_zoo(row, **config)

    build.__name__ = build.__qualname__ = row.name
    build.__doc__ = f"""{row.name}: see the model table in the README.

    Args:
        pretrained: load the released weights.
        checkpoint: which of them: {", ".join(row.checkpoints)}.
        strict: every parameter must be in the checkpoint (but for a replaced head).
        resample: as for `create_model`.
        config: constructor arguments that differ, e.g. `num_classes=10`.
    """
    build.checkpoints = {  # type: ignore[attr-defined]
        tag: str(w.bundled_path or download.url_of(w.file)) for tag, w in row.checkpoints.items()
    }
    build.default = row.default  # type: ignore[attr-defined]
    return build


functions: dict[str, Callable[..., HieraEncoder]] = {
    row.name: _zoo_function(row) for row in zoo.models().values()
}


def __getattr__(name: str) -> Any:
    if name in functions:
        return functions[name]
    hint = did_you_mean(name, functions)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} {hint}".rstrip())
