"""Models by name: `create_model`, and one function for each model in the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack, overload

from .. import zoo
from ..errors import CheckpointError, NoClassifierError, UsageError, did_you_mean
from ..weights import download, load, names
from ..zoo.input_sizes import full_size
from . import pretrained as builder
from .config import AutoencoderArguments
from .encoder import Encoder
from .feature_backbone import FeatureBackbone
from .hiera import Hiera, HieraEncoder
from .mae import MaskedAutoencoderHiera
from .pos_embed import ResampleRule
from .sam2.hieradet import HieraDet
from .sam2.hieradet_config import HieraDetArguments

ModelClass = type[Hiera] | type[MaskedAutoencoderHiera] | type[HieraDet]
Sam2Name = Literal[
    "sam2_hiera_tiny", "sam2_hiera_small", "sam2_hiera_base_plus", "sam2_hiera_large"
]


class ModelArguments(AutoencoderArguments, total=False):
    """Constructor arguments of all models, for type checkers."""

    window_spec: tuple[int, ...]
    global_att_blocks: tuple[int, ...]


@overload
def create_model(  # type: ignore[overload-overlap]  # these names are str, too
    name: Sam2Name,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    features_only: Literal[False] = False,
    **config: Unpack[HieraDetArguments],
) -> HieraDet: ...


@overload
def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    features_only: Literal[False] = False,
    resample: ResampleRule = "absolute-window",
    **config: Unpack[AutoencoderArguments],
) -> HieraEncoder: ...


@overload
def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    *,
    features_only: Literal[True],
    resample: ResampleRule = "absolute-window",
    out_indices: int | Sequence[int] | None = None,
    **config: Unpack[AutoencoderArguments],
) -> FeatureBackbone: ...


@overload
def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    features_only: bool = False,
    resample: ResampleRule = "absolute-window",
    out_indices: int | Sequence[int] | None = None,
    **config: Unpack[AutoencoderArguments],
) -> HieraEncoder | FeatureBackbone: ...


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strict: bool = True,
    features_only: bool = False,
    resample: ResampleRule = "absolute-window",
    out_indices: int | Sequence[int] | None = None,
    **config: Unpack[ModelArguments],
) -> Encoder | FeatureBackbone:
    """Create a model from the zoo, the hub or a file.

    >>> model = hiera_core.create_model("hiera_base_224", pretrained=True)

    Args:
        name: A zoo name (`hiera_base_224`), a zoo name with its checkpoint
            (`hiera_base_224.mae_in1k`), or a hub repository, folder or file, which always brings
            its weights. A folder that is named like a model in the zoo needs `./` before its name.
        pretrained: Load weights; otherwise they are newly initialised.
        checkpoint: Which weights: a tag of the model, a hub repository, URL, folder or file. The
            last four are loaded even without `pretrained`.
        strict: Whether every parameter must be in the checkpoint (except those of a replaced head).
        features_only: Return a `FeatureBackbone`: stage maps, channels first.
        resample: How position embeddings are resized to another `input_size`: `absolute-window`,
            or plain `bicubic` (see pos_embed.py).
        out_indices: Which maps a backbone returns, as timm reads it: numbers of stages from 0, or
            from the end if negative; a number n for the last n; None for all.
        config: Constructor arguments that differ from the zoo's, e.g. `num_classes=10`,
            `input_size=(384, 384)`, or `dynamic_size=True` for inputs of any legal size.

    Returns:
        A `Hiera`, a `MaskedAutoencoderHiera`, or, for SAM 2's image encoder, a `HieraDet`.

    Raises:
        UsageError: The model or the checkpoint is unknown, or there is no such map.
        CheckpointError, HubError: See `read_checkpoint`.
    """
    if out_indices is not None and not features_only:
        raise UsageError("out_indices is for a backbone", "add features_only=True")
    entry = names.find_entry(name)
    if checkpoint is not None:
        names.check_not_empty(checkpoint)
    if entry is None:
        loaded = _read_weights(None, name, checkpoint)
        model = from_checkpoint(loaded, strict=strict, resample=resample, **config)
    else:
        wanted = pretrained or checkpoint not in (None, *entry.checkpoints)
        found = _read_weights(entry, name, checkpoint) if wanted else None
        model = from_zoo(entry, found, strict=strict, resample=resample, **config)
    return FeatureBackbone(model, out_indices) if features_only else model


def create_classifier(name: str | None, checkpoint: str | Path | None = None) -> Hiera:
    """Create a classifier with its weights, for prediction.

    Args:
        name: As for `create_model`, or None for the model that `checkpoint` was saved from.
        checkpoint: Weights in place of the model's own.

    Raises:
        UsageError: The model is unknown, or is an autoencoder (checked before weights are read).
        NoClassifierError: The weights were only pre-trained.
        CheckpointError: See `read_checkpoint`.
        HubError: The weights cannot be fetched.
    """
    entry = None if name is None else names.find_entry(name)
    zoo.check_is_hiera(None if entry is None else entry.family, str(name))
    if entry is not None and entry.autoencoder:
        raise UsageError(
            f"{entry.name} is an autoencoder: it reconstructs, it does not classify",
            f"use {entry.name.removeprefix('mae_')}",
        )
    loaded = _read_weights(entry, name, checkpoint)
    zoo.check_is_hiera(loaded.family, loaded.source)
    if not loaded.num_classes:
        raise NoClassifierError(
            f"{loaded.source} has no classifier: it was only pre-trained",
            "fine-tune it first, or use a fine-tuned one such as hiera_base_224.mae_in1k_ft_in1k",
        )
    model = from_checkpoint(loaded) if entry is None else from_zoo(entry, loaded)
    assert isinstance(model, Hiera)
    return model


def create_autoencoder(
    name: str | None, checkpoint: str | Path | None = None
) -> MaskedAutoencoderHiera:
    """Create an autoencoder with its weights, for reconstruction.

    Args:
        name, checkpoint: As for `create_classifier`.

    Raises:
        UsageError: The model is unknown, or is a classifier (checked before weights are read).
        CheckpointError: The weights have no decoder; see `read_checkpoint`.
        HubError: The weights cannot be fetched.
    """
    entry = None if name is None else names.find_entry(name)
    zoo.check_is_hiera(None if entry is None else entry.family, str(name))
    if entry is not None and not entry.autoencoder:
        has_autoencoder = f"mae_{entry.name}" in zoo.models()
        raise UsageError(
            f"{entry.name} is a classifier: it has no decoder to reconstruct with",
            f"use {f'mae_{entry.name}' if has_autoencoder else 'mae_hiera_base_224'}",
        )
    loaded = _read_weights(entry, name, checkpoint)
    zoo.check_is_hiera(loaded.family, loaded.source)
    if not loaded.is_autoencoder:
        raise CheckpointError(
            f"{loaded.source} has no decoder: it cannot reconstruct",
            "use the weights of an autoencoder such as mae_hiera_base_224",
        )
    model = from_checkpoint(loaded) if entry is None else from_zoo(entry, loaded)
    assert isinstance(model, MaskedAutoencoderHiera)
    return model


def create_encoder(
    name: str | None,
    checkpoint: str | Path | None = None,
    size: Sequence[int] | None = None,
) -> Encoder:
    """Create a classifier, an autoencoder or SAM 2's encoder with its weights, for features.

    If a classifier gets the weights of an autoencoder, it has no head, and the encoder's norm
    becomes its own norm.

    Args:
        name, checkpoint: As for `create_classifier`.
        size: Another input size, see `full_size`; None for that of the model.

    Raises:
        UsageError: The model does not take inputs of this size; see also `create_classifier`.
        CheckpointError, HubError: As for `create_classifier`.
    """
    entry = None if name is None else names.find_entry(name)
    loaded = _read_weights(entry, name, checkpoint)
    own = builder.architecture(loaded) if entry is None else entry.config
    config: dict[str, Any] = {}
    if size is not None:
        config["input_size"] = full_size(tuple(size), len(own["input_size"]))
    if entry is None:
        return from_checkpoint(loaded, **config)
    if loaded.is_headless and not entry.autoencoder:
        return from_zoo(entry, loaded, num_classes=0, **config)
    if entry.autoencoder or not loaded.is_autoencoder:
        return from_zoo(entry, loaded, **config)
    for part in ("weight", "bias"):
        if f"encoder_norm.{part}" not in loaded.state:
            raise CheckpointError(
                f"{loaded.source} has a decoder, but no encoder_norm.{part}", "use another file"
            )
        loaded.state[f"norm.{part}"] = loaded.state[f"encoder_norm.{part}"]
    return from_zoo(entry, loaded, num_classes=0, **config)


def list_models() -> list[str]:
    """Return the names of all models in the zoo."""
    return zoo.names()


def model_class(entry: zoo.ModelEntry) -> ModelClass:
    """Return the class of a model in the zoo."""
    return class_of(entry.family, entry.autoencoder)


def class_of(family: zoo.Family, autoencoder: bool) -> ModelClass:
    """Return the class of a family's encoder or classifier, or of its autoencoder."""
    if family == "hieradet":
        return HieraDet
    return MaskedAutoencoderHiera if autoencoder else Hiera


def from_zoo(
    entry: zoo.ModelEntry,
    checkpoint: load.Checkpoint | None = None,
    strict: bool = True,
    resample: ResampleRule = "absolute-window",
    **config: Any,
) -> Encoder:
    """Build a model from the zoo, with the weights of a checkpoint or newly initialised."""
    cls = model_class(entry)
    config = _without_dynamic_size(cls, config)
    model: Encoder
    if checkpoint is None:
        model, card = cls(**{**entry.config, **config}), {}
    else:
        model = builder.build(
            cls,
            entry.config,
            checkpoint,
            overrides=config,
            name=entry.name,
            strict=strict,
            resample=resample,
        )
        card = checkpoint.card
    # A classifier may begin with the weights of an autoencoder, but it keeps its own name.
    card = {**card_of(entry, None if checkpoint is None else checkpoint.source), **card}
    model.card = {**card, "model": entry.name}
    return model


def from_checkpoint(
    checkpoint: load.Checkpoint,
    strict: bool = True,
    resample: ResampleRule = "absolute-window",
    **config: Any,
) -> Encoder:
    """Build the model that a checkpoint was saved from."""
    cls = class_of(checkpoint.family, checkpoint.is_autoencoder)
    config = _without_dynamic_size(cls, config)
    arguments = builder.architecture(checkpoint)
    model: Encoder = builder.build(
        cls, arguments, checkpoint, overrides=config, strict=strict, resample=resample
    )
    entry = load.identify_model(checkpoint.state)
    known = card_of(entry, checkpoint.source) if entry else {"source": checkpoint.source}
    model.card = {**known, **checkpoint.card}
    return model


def _without_dynamic_size(cls: ModelClass, config: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without `dynamic_size` for SAM 2's encoder, which takes any size anyway."""
    known = cls is not HieraDet
    return {name: value for name, value in config.items() if known or name != "dynamic_size"}


def card_of(entry: zoo.ModelEntry, source: str | None = None) -> dict[str, Any]:
    """Return the metadata of a model: name, preprocessing, classes, licence, source."""
    card: dict[str, Any] = {"model": entry.name, "preprocessing": entry.preprocessing}
    if isinstance(entry.classes, list) and entry.classes:
        card |= {"classes": entry.classes}
    if source is not None:
        card |= {"source": source}
    if source is not None and source.startswith(entry.name + "."):
        card |= {"licence": entry.licence}
    return card


class ModelFunction(Protocol):
    """A function that builds one model from the zoo, such as `hiera_core.hiera_base_224`.

    Attributes:
        checkpoints: File or URL of each checkpoint, by tag.
        default: The tag that `pretrained=True` loads.
    """

    __name__: str
    checkpoints: Mapping[str, str]
    default: str | None

    def __call__(
        self,
        pretrained: bool = False,
        checkpoint: str | None = ...,
        strict: bool = True,
        resample: ResampleRule = "absolute-window",
        **config: Unpack[AutoencoderArguments],
    ) -> HieraEncoder: ...


def _model_function(entry: zoo.ModelEntry) -> ModelFunction:
    def build(
        pretrained: bool = False,
        checkpoint: str | None = entry.default,
        strict: bool = True,
        resample: ResampleRule = "absolute-window",
        **config: Unpack[ModelArguments],
    ) -> Encoder:
        if pretrained:
            loaded = load.read_released(entry, checkpoint)
            return from_zoo(entry, loaded, strict=strict, resample=resample, **config)
        return from_zoo(entry, **config)

    function: Any = build
    function.__name__ = function.__qualname__ = entry.name
    function.__doc__ = f"""Create {entry.name}: see the model table in the README.

    Args:
        pretrained: Load the released weights.
        checkpoint: Which of them: {", ".join(entry.checkpoints)}.
        strict: Whether every parameter must be in the checkpoint (except those of a replaced head).
        resample: As for `create_model`.
        config: Constructor arguments that differ, e.g. `num_classes=10`.
    """
    function.checkpoints = {
        tag: str(found.bundled_path or _url_of(found)) for tag, found in entry.checkpoints.items()
    }
    function.default = entry.default
    return function


def _read_weights(
    entry: zoo.ModelEntry | None, name: str | Path | None, checkpoint: str | Path | None
) -> load.Checkpoint:
    """Return the weights that a name and a `checkpoint` select together."""
    chosen = name if checkpoint is None else checkpoint
    if chosen is None:
        raise UsageError("no model and no checkpoint", "give one of them")
    if checkpoint is None or name is None:
        return load.read_weights(chosen)
    if entry is None:
        return load.describe_as(load.read_weights(checkpoint), name)
    is_tag = checkpoint in entry.checkpoints
    if not is_tag and (names.is_location(checkpoint) or names.is_in_zoo(checkpoint)):
        return load.read_weights(checkpoint)
    names.check_not_empty(checkpoint)
    return load.read_released(entry, str(checkpoint))


def _url_of(checkpoint: zoo.CheckpointEntry) -> str:
    """Return the URL of a checkpoint's file, or of its repository if it has no file."""
    hub = f"https://huggingface.co/{checkpoint.hub}"
    return download.url_of(checkpoint.file) if checkpoint.file else hub


functions: dict[str, ModelFunction] = {
    entry.name: _model_function(entry) for entry in zoo.models().values()
}


def __getattr__(name: str) -> ModelFunction:
    if name in functions:
        return functions[name]
    hint = did_you_mean(name, functions)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} {hint}".rstrip())
