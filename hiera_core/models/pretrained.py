"""Building a model class from a checkpoint, and saving it: `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin

from ..errors import CheckpointError
from ..weights import files, load
from . import pos_embed
from .config import HieraConfig

M = TypeVar("M", bound=torch.nn.Module)
# timm's absolute-window models; their embedding does not tell the size they were trained at.
ABSOLUTE_WINDOW = {"abs_win_pos_embed": True, "input_size": (256, 256)}
CARD_NAME = "hiera.json"  # what config.json has no place for: an extra key breaks the reference


class PretrainedMixin(
    PyTorchModelHubMixin,
    library_name="hiera",
    paper_url="https://arxiv.org/abs/2306.00989",
    tags=["hiera"],
):
    """hub loading, saving and pushing; stricter than the hub's own mixin, and whole or nothing."""

    card: dict[str, Any]  # classes, preprocessing and provenance, as hiera.json holds them

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        resample: pos_embed.ResampleRule = "absolute-window",
        map_location: str | torch.device | None = None,
        **options: Any,
    ) -> Self:
        """Build the model of a hub repository, folder or file, in any dialect.

        Args:
            pretrained_model_name_or_path: `facebook/hiera_base_224.mae_in1k_ft_in1k`, a folder, a
                file or a URL.
            strict: every parameter must be there (but for a replaced head).
            resample: how position embeddings come to another `input_size`: `absolute-window`, or
                plain `bicubic` (see positions.py).
            map_location: the device to put the model on.
            options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` for the
                hub; the rest overrides constructor arguments, e.g. `num_classes`.

        Raises:
            CheckpointError: it does not fit, or its architecture cannot be told.
            HubError: it cannot be fetched.
        """
        for_hub = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        fetch = {k: options.pop(k) for k in for_hub if k in options}
        checkpoint = load.read_checkpoint(pretrained_model_name_or_path, **fetch)
        config = architecture(checkpoint, classifier=not hasattr(cls, "forward_decoder"))
        model = build(  # type: ignore[type-var]
            cls, config, checkpoint, overrides=options, strict=strict, resample=resample
        )
        if checkpoint.card:
            model.card = dict(checkpoint.card)
        return model if map_location is None else model.to(map_location)  # type: ignore[attr-defined]

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by `save_pretrained` and `push_to_hub`."""
        state = self.state_dict()  # type: ignore[attr-defined]
        files.write_safetensors(save_directory / "model.safetensors", state)
        files.write_json(save_directory / "config.json", self.config)  # type: ignore[attr-defined]
        if card := getattr(self, "card", None):
            files.write_json(save_directory / CARD_NAME, card)


def architecture(checkpoint: load.Checkpoint, classifier: bool = False) -> dict[str, Any]:
    """Constructor arguments of a checkpoint's model: from its config, else from its shapes.

    With `classifier`, an autoencoder's are turned into those of its classifier: no decoder, and
    one more pool.

    Raises:
        CheckpointError: it has no config and looks like no model of the zoo.
    """
    config, row = checkpoint.config, load.identify_model(checkpoint.state)
    if config is None and row is not None:
        config = _told_by_shapes(row.config, checkpoint.state)
    if config is None:
        raise CheckpointError(
            f"{checkpoint.source} has no config.json and the shapes of no released model",
            "name its architecture with --model, or keep the config.json it was saved with",
        )
    if classifier and checkpoint.is_autoencoder:
        kept = {k: v for k, v in config.items() if not k.startswith("decoder_")}
        if isinstance(kept.get("stages"), list | tuple):  # else building it says what is wrong
            kept["q_pool"] = len(kept["stages"]) - 1
        config = kept
    return config


def _told_by_shapes(config: dict[str, Any], state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A zoo row's arguments, and what weights made elsewhere differ in: their input size, or the
    absolute-window form."""
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
    """A model on the meta device, the checkpoint's tensors for it (memory-mapped), and the
    constructor arguments. Position embeddings made for another input size are resampled.

    Raises:
        CheckpointError: the checkpoint does not fit; see `weights.fit`.
        ConfigError: no such input size, with the nearest legal ones.
    """
    arguments = {**config, **(overrides or {})}
    if checkpoint.num_classes and "num_classes" not in (overrides or {}):
        arguments["num_classes"] = checkpoint.num_classes
    model = _on_meta(cls, arguments, checkpoint, bool(overrides))
    built: HieraConfig = model._config  # type: ignore[assignment]
    likely = [(checkpoint.config or config).get("input_size"), built.input_size]
    made_for = pos_embed.input_size_of(checkpoint.state, likely, built.patch_stride)
    state = pos_embed.resample(checkpoint.state, made_for or built.input_size, built, resample)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = load.fit(
        dataclasses.replace(checkpoint, state=state),
        expected,
        name=name or f"this {cls.__name__}",
        strict=strict,
    )
    return model, found, arguments


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
    """A model with a checkpoint's weights.

    Without memory or time for an initialisation that would be overwritten: the model is built on
    the meta device and takes the (memory-mapped) tensors themselves. Only where the checkpoint
    leaves parameters open is it built for real.

    Raises:
        CheckpointError: the checkpoint does not fit; see `weights.fit`.
    """
    model, found, arguments = match(
        cls,
        config,
        checkpoint,
        overrides=overrides,
        name=name,
        strict=strict,
        resample=resample,
    )
    if found.missing:
        model = cls(**arguments)
        model.load_state_dict(found.state, strict=False)
        return model
    model.load_state_dict(found.state, strict=True, assign=True)
    return model.to(torch.float32)


def _on_meta(
    cls: type[M], arguments: dict[str, Any], checkpoint: load.Checkpoint, overridden: bool
) -> M:
    """The model without storage. When config.json is what cannot be built, say so."""
    try:
        with torch.device("meta"):
            return cls(**arguments)
    except Exception as error:  # a foreign config.json can hold anything
        if checkpoint.config is None:
            raise
        if overridden:  # are they to blame?
            _on_meta(cls, checkpoint.config, checkpoint, False)
            raise
        raise CheckpointError(
            f"{checkpoint.source}: config.json describes no {cls.__name__} ({error})",
            "it must hold the constructor arguments, as save_pretrained writes them",
        ) from error
