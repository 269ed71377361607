"""Build a model from a checkpoint, and save it: `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import torch
from huggingface_hub import PyTorchModelHubMixin

from ..data.transforms import MediaInputs
from ..errors import CheckpointError
from ..weights import files, load, names
from ..zoo import labels
from . import pos_embed
from .config import AutoencoderArguments, HieraConfig

M = TypeVar("M", bound=torch.nn.Module)
# Arguments of timm's absolute-window models. Their position embedding does not show the input size
# that they were trained with.
ABSOLUTE_WINDOW = {"abs_win_pos_embed": True, "input_size": (256, 256)}
LAYER_SCALE = 1e-5  # initial value in timm's models; loaded weights replace it
# File for everything that is not a constructor argument. The reference fails on other keys in
# config.json.
CARD_NAME = "hiera.json"


class PretrainedOptions(AutoencoderArguments, total=False):
    """Keyword arguments of `from_pretrained`: options of the hub, and constructor arguments."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool


class PretrainedMixin(
    PyTorchModelHubMixin,
    library_name="hiera",
    paper_url="https://arxiv.org/abs/2306.00989",
    tags=["hiera"],
):
    """Methods that load a model from, and save it to, folders and the hub.

    Unlike the mixin of huggingface_hub, they check that all parameters are present, and write files
    atomically.

    Attributes:
        card: Classes, preprocessing and provenance of the model, which hiera.json stores.
    """

    card: dict[str, Any]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of the outputs. None for a model without a head, such
        as an autoencoder, and if the names are unknown."""
        projection = getattr(getattr(self, "head", None), "projection", None)
        if projection is None:
            return None
        known = getattr(self, "card", {}).get("classes")
        found = labels.for_classes(projection.out_features, known)
        return None if found is None else list(found)

    def transform(self, source: MediaInputs) -> torch.Tensor:
        """Return the tensor that the model takes, from an image, a video or several of them.

        >>> probabilities = model(model.transform("photo.jpg"))

        It is resized, cropped and normalised as in the model's evaluation (`transform_for`), with
        the preprocessing that came with the weights. It is on the device of the model, and has its
        dtype.

        Args:
            source: A path, a PIL image, an array, a tensor, bytes or an open file, see
                `memory.as_pixels`; or several of them. For a model of videos, arrays are clips
                [frames, height, width, channels]; of a longer video, the centre clip is taken.

        Returns:
            [n, chans, *size]; n is 1 for a single input.

        Raises:
            InputError: An input cannot be read, or is of the other kind.
            UsageError: An input is of another type, or the model takes signals.
        """
        from ..data.model_input import model_input  # here, because it imports decoders

        return model_input(self, source)  # type: ignore[arg-type]  # the mixin is no module

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin takes any keyword argument
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        resample: pos_embed.ResampleRule = "absolute-window",
        map_location: str | torch.device | None = None,
        **options: Unpack[PretrainedOptions],
    ) -> Self:
        """Build a model with the weights of a zoo model, hub repository, folder, file or URL.

        Checkpoints of the reference, timm, transformers and this toolkit are read.

        Args:
            pretrained_model_name_or_path: For example `facebook/hiera_base_224.mae_in1k_ft_in1k`.
                A folder that is named like a model in the zoo needs `./` before its name.
            strict: Whether every parameter must be in the checkpoint (except a replaced head).
            resample: How position embeddings are resampled to another `input_size`:
                `absolute-window`, or plain `bicubic` (see pos_embed.py).
            map_location: Device of the model.
            options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` are
                for the hub. All others override constructor arguments, such as `num_classes`.

        Raises:
            CheckpointError: The checkpoint does not fit, or its architecture is unknown.
            HubError: It cannot be downloaded.
        """
        names.check_not_empty(pretrained_model_name_or_path)
        arguments: dict[str, Any] = {**options}
        hub_names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        hub_options = {name: arguments.pop(name) for name in hub_names if name in arguments}
        checkpoint = load.read_weights(pretrained_model_name_or_path, **hub_options)
        config = architecture(checkpoint, classifier=not hasattr(cls, "forward_decoder"))
        model = build(  # type: ignore[type-var]
            cls, config, checkpoint, overrides=arguments, strict=strict, resample=resample
        )
        if checkpoint.card:
            model.card = dict(checkpoint.card)
            if checkpoint.is_autoencoder and not hasattr(cls, "forward_decoder"):
                # A classifier with the weights of an autoencoder has a name of its own.
                name = str(model.card.get("model", "")).removeprefix("mae_")
                model.card |= {"model": name} if name else {}
        return model if map_location is None else model.to(map_location)  # type: ignore[attr-defined]

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files of a model; `save_pretrained` and `push_to_hub` call this."""
        state = self.state_dict()  # type: ignore[attr-defined]
        files.write_safetensors(save_directory / "model.safetensors", state)
        files.write_json(save_directory / "config.json", self.config)  # type: ignore[attr-defined]
        if card := getattr(self, "card", None):
            files.write_json(save_directory / CARD_NAME, card)


def architecture(checkpoint: load.Checkpoint, classifier: bool = False) -> dict[str, Any]:
    """Return the constructor arguments of a checkpoint's model, from its config or its shapes.

    Args:
        checkpoint: The checkpoint.
        classifier: Return the arguments of a classifier, even if this is an autoencoder: without
            decoder, and with one more pool.

    Raises:
        CheckpointError: It has no config, and its shapes match no model in the zoo.
    """
    config, entry = checkpoint.config, load.identify_model(checkpoint.state)
    if config is None and entry is not None:
        config = _config_from_shapes(entry.config, checkpoint.state)
    if config is None:
        raise CheckpointError(
            f"{checkpoint.source} has no config.json and the shapes of no released model",
            "name its architecture with --model, or keep the config.json it was saved with",
        )
    if checkpoint.is_autoencoder and not classifier:
        return config
    kept = {k: v for k, v in config.items() if not k.startswith("decoder_")}
    if checkpoint.is_autoencoder and isinstance(kept.get("stages"), list | tuple):
        kept["q_pool"] = len(kept["stages"]) - 1  # without stages, building it reports the error
    if checkpoint.is_headless:
        kept["num_classes"] = 0
    return kept


def _config_from_shapes(
    config: dict[str, Any], state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the arguments of a model in the zoo, adapted to the shapes of weights.

    Weights from elsewhere can differ in their input size, have absolute-window embeddings or layer
    scale, or widen without a projection.
    """
    traits = load.traits_of(state)
    if traits["hieradet"]:
        return config
    scale = config.get("init_values") or LAYER_SCALE
    config = {
        **config,
        "init_values": scale if traits["layer_scale"] else None,
        "use_expand_proj": traits["use_expand_proj"],
    }
    window = state.get("pos_embed_win")
    if window is not None:
        return {**config, **ABSOLUTE_WINDOW, "global_pos_size": tuple(state["pos_embed"].shape[2:])}
    stride = config.get("patch_stride", HieraConfig.patch_stride)
    size = pos_embed.input_size_of(state, [config["input_size"]], stride)
    return {**config, "input_size": size or config["input_size"]}


def match(
    cls: type[M],
    config: dict[str, Any],
    checkpoint: load.Checkpoint,
    *,
    overrides: dict[str, Any] | None = None,
    name: str | None = None,
    strict: bool = True,
    resample: pos_embed.ResampleRule = "absolute-window",
) -> tuple[M, load.Fit, dict[str, Any]]:
    """Fit a checkpoint to a model that is built without storage.

    Position embeddings for another input size are resampled.

    Args:
        cls: Class of the model.
        config: Constructor arguments, see `architecture`.
        checkpoint: The weights.
        overrides: Constructor arguments to change.
        name: Name of the model, for messages.
        strict: See `load.fit`.
        resample: See `pos_embed.resample`.

    Returns:
        The model on the meta device, the checkpoint's tensors for it (memory-mapped), and all
        constructor arguments.

    Raises:
        CheckpointError: The checkpoint does not fit; see `load.fit`.
        ConfigError: The input size is not valid. The message names the nearest legal sizes.
    """
    check_family(cls, checkpoint, name)
    arguments = {**config, **(overrides or {})}
    if checkpoint.num_classes and "num_classes" not in (overrides or {}):
        arguments["num_classes"] = checkpoint.num_classes
    model = _on_meta(cls, arguments, checkpoint, bool(overrides))
    state = checkpoint.state
    target = model._config
    if isinstance(target, HieraConfig):
        state = _resample(checkpoint, config, target, overrides or {}, resample)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    fitted = load.fit(
        dataclasses.replace(checkpoint, state=state),
        expected,
        name=name or f"this {cls.__name__}",
        strict=strict,
    )
    return model, fitted, arguments


def check_family(
    cls: type[torch.nn.Module], checkpoint: load.Checkpoint, name: str | None = None
) -> None:
    """Check that weights are those of a Hiera, or of SAM 2's encoder, as the class expects.

    Args:
        cls: Class of the model.
        checkpoint: The weights.
        name: Name of the model, for messages.

    Raises:
        CheckpointError: They are those of the other.
    """
    if checkpoint.family == getattr(cls, "family", checkpoint.family):
        return
    entry = load.identify_model(checkpoint.state)
    is_sam2 = checkpoint.family == "hieradet"
    what = "of the image encoder of SAM 2" if is_sam2 else "of a Hiera"
    model = entry.name if entry else "the model it was saved from"
    raise CheckpointError(
        f"{checkpoint.source} does not fit {name or cls.__name__}: it holds the weights {what}",
        f"use {model}",
    )


def _resample(
    checkpoint: load.Checkpoint,
    config: Mapping[str, Any],
    target: HieraConfig,
    overrides: Mapping[str, Any],
    rule: pos_embed.ResampleRule,
) -> dict[str, torch.Tensor]:
    """Return the weights of a Hiera with position embeddings for the input size of `target`."""
    known = (checkpoint.config or config).get("input_size")
    if "input_size" in overrides:
        made_for = _size_before_resampling(checkpoint, known, target)
    else:
        likely = [known, target.input_size]
        made_for = pos_embed.input_size_of(checkpoint.state, likely, target.patch_stride)
    return pos_embed.resample(checkpoint.state, made_for or target.input_size, target, rule)


def _size_before_resampling(
    checkpoint: load.Checkpoint, known: Any, target: HieraConfig
) -> tuple[int, ...] | None:
    """Return the input size that weights were made for, if the user asks for another one.

    Raises:
        CheckpointError: The embedding fits the size that the user asks for, and a square, too, and
            nothing says which of them the weights were made for.
    """
    state, stride = checkpoint.state, target.patch_stride
    made_for = pos_embed.input_size_of(state, [known], stride)
    fits_target = pos_embed.input_size_of(state, [target.input_size], stride) == target.input_size
    if made_for is None or not fits_target or made_for in (known, target.input_size):
        return target.input_size if made_for is None and fits_target else made_for
    if list(made_for) == list(known or ()):
        return made_for
    sizes = ("x".join(map(str, size)) for size in (made_for, target.input_size))
    raise CheckpointError(
        "{} does not say whether its position embedding is for {} or {} pixels".format(
            checkpoint.source, *sizes
        ),
        "keep the config.json that it was saved with, or write one with its input_size beside it",
    )


def build(
    cls: type[M],
    config: dict[str, Any],
    checkpoint: load.Checkpoint,
    *,
    overrides: dict[str, Any] | None = None,
    name: str | None = None,
    strict: bool = True,
    resample: pos_embed.ResampleRule = "absolute-window",
) -> M:
    """Build a model with the weights of a checkpoint.

    The model is built on the meta device, and its parameters become the memory-mapped tensors. So
    no time or memory is spent on an initialisation that would be overwritten. Only if the
    checkpoint lacks parameters is the model initialised.

    Args:
        cls, config, checkpoint, overrides, name, strict, resample: See `match`.

    Raises:
        CheckpointError: The checkpoint does not fit; see `load.fit`.
        ConfigError: The input size is not valid. The message names the nearest legal sizes.
    """
    # The model is in fp32, so embeddings in half precision are not rounded again if resampled.
    state = {
        name: tensor.float() if "pos_embed" in name else tensor
        for name, tensor in checkpoint.state.items()
    }
    model, fitted, arguments = match(
        cls,
        config,
        dataclasses.replace(checkpoint, state=state),
        overrides=overrides,
        name=name,
        strict=strict,
        resample=resample,
    )
    if fitted.missing:
        model = cls(**arguments)
        model.load_state_dict(fitted.state, strict=False)
        return model
    model.load_state_dict(fitted.state, strict=True, assign=True)
    return model.to(torch.float32)


def _on_meta(
    cls: type[M], arguments: dict[str, Any], checkpoint: load.Checkpoint, overridden: bool
) -> M:
    """Build a model without storage.

    Args:
        cls: Class of the model.
        arguments: Constructor arguments.
        checkpoint: Where the arguments come from.
        overridden: Whether the user has changed some of them.

    Raises:
        CheckpointError: The arguments in config.json are not valid. Other errors pass through.
    """
    try:
        with torch.device("meta"):
            return cls(**arguments)
    except Exception as error:  # the config.json of another library can hold anything
        if checkpoint.config is None:
            raise
        if overridden:  # if config.json alone cannot be built either, that error is raised
            _on_meta(cls, checkpoint.config, checkpoint, False)
            raise
        raise CheckpointError(
            f"{checkpoint.source}: config.json describes no {cls.__name__} ({error})",
            "it must hold the constructor arguments, as save_pretrained writes them",
        ) from error
