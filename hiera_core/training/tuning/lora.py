"""`lora:` in a recipe: low-rank adapters (Hu et al. 2021), in the form of the library PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from ...weights import files
from ..settings.recipe_parts import LoraSettings

FOLDER, ADAPTER, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
LAYERS = {
    "attention": r"blocks\.\d+\.attn\.(qkv|proj)",
    "all": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
}
TRAINED_WHOLE = ("norm", "head")  # they are new for the classes of the data
NAME = "default"  # of the adapter, within the model
PREFIX = "base_model.model."  # of the names in PEFT's files


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Add adapters to a classifier, in place, and stop training the weights beside them.

    The last norm and the head stay trainable.

    Raises:
        UsageError: PEFT is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise UsageError("lora needs PEFT", "pip install 'hiera-toolkit[lora]'") from error
    inject_adapter_in_model(_config(settings), model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.partition(".")[0] in TRAINED_WHOLE)


def merge(state: Mapping[str, torch.Tensor], settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Return the weights with their adapters added, under the names of a model without adapters.

    Args:
        state: Whole tensors of a model with adapters.
        settings: Those of the adapters.
    """
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if rest == "weight":
            down = state[f"{layer}.lora_A.{NAME}.weight"].float()
            up = state[f"{layer}.lora_B.{NAME}.weight"].float()
            update = (up @ down) * (settings.alpha / settings.rank)
            tensor = (tensor.float() + update).to(tensor.dtype)
        merged[f"{layer}.{rest}" if rest else name] = tensor
    return merged


def save_adapter(
    folder: Path, state: Mapping[str, torch.Tensor], settings: LoraSettings, base: str
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads: the low-rank matrices, the last
    norm and the head.

    Args:
        folder: The folder for adapter_model.safetensors and adapter_config.json.
        state: Whole tensors of a model with adapters.
        settings: Those of the adapters.
        base: The weights that the adapter belongs to, for its configuration.

    Raises:
        OutputError: A file cannot be written.
    """
    tensors = {
        PREFIX + name.replace(f".{NAME}.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" in name or name.partition(".")[0] in TRAINED_WHOLE
    }
    config = _config(settings, base)
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    files.write_safetensors(folder / ADAPTER, tensors)
    files.write_json(folder / CONFIG, {**values, "inference_mode": True})


def _config(settings: LoraSettings, base: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank
        target_modules=LAYERS[settings.layers],
        modules_to_save=None if base is None else list(TRAINED_WHOLE),
        base_model_name_or_path=base,
    )
