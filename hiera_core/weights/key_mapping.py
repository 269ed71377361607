"""Key mapping between the parameter naming schemes that Hiera implementations use.

`reference` is the naming of hiera-transformer and of this toolkit. The tables below map the naming
schemes of timm and transformers to it; each row is (their prefix, our prefix). Tensors need no
transpose or reshape.

The image encoder of SAM 2 has names of its own in transformers, and in Meta's files (`sam2`), where
it is a part of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from ..errors import CheckpointError
from .state_dict import TRANSFORMERS_ENCODER, unwrap_names

Naming = Literal["reference", "timm", "transformers", "sam2"]
T = TypeVar("T")

TIMM = (
    ("head.norm.", "norm."),
    ("head.fc.", "head.projection."),
)
TRANSFORMERS = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("pooler.layernorm.", "norm."),
    ("classifier.", "head.projection."),
    ("multiscale_fusion.multi_scale_fusion_heads.", "multi_scale_fusion_heads."),
    ("decoder.decoder_embeddings.", "decoder_embed."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_position_embeddings", "decoder_pos_embed"),
    ("decoder.decoder_block.layers.", "decoder_blocks."),
    ("decoder.decoder_norm.", "decoder_norm."),
    ("decoder.decoder_pred.", "decoder_pred."),
)
# Norms that transformers' HieraBackbone applies to its maps. Maps are not normalised here, so these
# are left out. (As of transformers 5.24, its `forward` does not bring the tokens into the order of
# windows, as that of HieraModel does, so its maps are not those of the weights in any case.)
TRANSFORMERS_MAP_NORMS = "hidden_states_norms."
TRANSFORMERS_BLOCK = (("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."))
# Within a block of SAM 2's encoder.
SAM2_META = (("mlp.layers.0.", "mlp.fc1."), ("mlp.layers.1.", "mlp.fc2."))
SAM2_TRANSFORMERS = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("mlp.proj_in.", "mlp.fc1."),
    ("mlp.proj_out.", "mlp.fc2."),
)
SAM2_PATCHES = (("patch_embed.projection.", "patch_embed.proj."),)
SAM2_TRUNK = "image_encoder.trunk."  # prefix of the encoder in Meta's files
SAM2_EMBEDDING = "pos_embed_window"  # only SAM 2's encoder has this parameter
_BLOCK = re.compile(r"(blocks\.\d{1,4}\.)(.+)")
_STAGE = re.compile(r"encoder\.stages\.(\d{1,4})\.layers\.(\d{1,4})\.(.+)")
_DECODER_BLOCK = re.compile(r"(decoder_blocks\.\d{1,4}\.)(.+)")


def detect_naming(names: Iterable[str]) -> Naming:
    """Return the naming that a checkpoint uses.

    Args:
        names: Names of its parameters.

    Raises:
        CheckpointError: These are not the parameters of a Hiera.
    """
    names = [name.removeprefix(TRANSFORMERS_ENCODER) for name in names]
    if SAM2_EMBEDDING in names:
        return _detect_sam2_naming(names)
    if any(name.startswith("encoder.stages.") for name in names):
        return "transformers"
    if any(name.startswith(("head.fc.", "head.norm.")) for name in names):
        return "timm"
    if "patch_embed.proj.weight" in names and any(name.startswith("blocks.0.") for name in names):
        return "reference"
    found = ", ".join(sorted(names)[:3]) or "no tensors"
    raise CheckpointError(
        f"this is not a Hiera checkpoint (it holds {found}, ...)",
        "give a file of hiera-transformer, timm or transformers",
    )


def to_reference(state: Mapping[str, T]) -> tuple[dict[str, T], Naming]:
    """Rename parameters from any naming to the reference's.

    Args:
        state: Parameters (or anything else) by name.

    Returns:
        The same values under their new names, and the naming that `state` uses.

    Raises:
        CheckpointError: These are not the parameters of a Hiera.
    """
    state = unwrap_names(state)
    naming = detect_naming(state)
    if SAM2_EMBEDDING in state:
        return _from_sam2(state), naming
    if naming == "reference":
        return dict(state), naming
    if naming == "timm":
        return {_rename(name, TIMM): value for name, value in state.items()}, naming
    renamed = _from_transformers(
        {name.removeprefix(TRANSFORMERS_ENCODER): value for name, value in state.items()}
    )
    return renamed, naming


def from_reference(
    state: Mapping[str, T], naming: Naming, stages: Sequence[int] = ()
) -> dict[str, T]:
    """Rename parameters from the reference's naming to another.

    Args:
        state: Parameters (or anything else) by name.
        naming: The new naming.
        stages: Number of blocks in each stage. transformers counts blocks within their stage.
    """
    if naming == "reference":
        return dict(state)
    if SAM2_EMBEDDING in state:
        return {_to_sam2(name, naming): value for name, value in state.items()}
    if naming == "timm":
        to_timm = _inverse(TIMM)
        return {_rename(name, to_timm): value for name, value in state.items()}
    layers = [(stage, layer) for stage, depth in enumerate(stages) for layer in range(depth)]
    # Without head or decoder, this is transformers' HieraModel. Its other classes hold one, under
    # the name `hiera`.
    has_head = any(name.startswith(("head.", "decoder_")) for name in state)
    prefix = TRANSFORMERS_ENCODER if has_head else ""
    return {_to_transformers(name, layers, prefix): value for name, value in state.items()}


def _detect_sam2_naming(names: Iterable[str]) -> Naming:
    names = list(names)
    if "patch_embed.projection.weight" in names:
        return "transformers"
    if any(name.startswith("head.") for name in names):
        return "timm"
    return "sam2" if any(".mlp.layers." in name for name in names) else "reference"


def _from_sam2(state: Mapping[str, T]) -> dict[str, T]:
    """Rename the parameters of SAM 2's encoder from any naming. timm adds a head, which is left
    out: the encoder has none."""
    tables = (*SAM2_META, *SAM2_TRANSFORMERS)
    renamed = {}
    for name, value in state.items():
        if match := _BLOCK.fullmatch(name):
            name = match[1] + _rename(match[2], tables)
        if not name.startswith("head."):
            renamed[_rename(name, SAM2_PATCHES)] = value
    return renamed


def _to_sam2(name: str, naming: Naming) -> str:
    """`blocks.0.mlp.fc1.bias` -> `image_encoder.trunk.blocks.0.mlp.layers.0.bias`"""
    if naming == "timm":
        return name
    table = SAM2_META if naming == "sam2" else SAM2_TRANSFORMERS
    if match := _BLOCK.fullmatch(name):
        name = match[1] + _rename(match[2], _inverse(table))
    return SAM2_TRUNK + name if naming == "sam2" else _rename(name, _inverse(SAM2_PATCHES))


def _to_transformers(name: str, layers: Sequence[tuple[int, int]], prefix: str) -> str:
    """`blocks.3.norm1.bias` -> `hiera.encoder.stages.1.layers.1.layernorm_before.bias`

    Args:
        name: The reference's name.
        layers: Stage of each block, and its index within the stage.
        prefix: Prefix of the encoder's names.
    """
    kind, _, rest = name.partition(".")
    if kind in ("blocks", "decoder_blocks"):
        number, rest = rest.split(".", 1)
        rest = _rename(rest, _inverse(TRANSFORMERS_BLOCK))
        if kind == "decoder_blocks":
            return f"decoder.decoder_block.layers.{number}.{rest}"
        stage, layer = layers[int(number)]
        return f"{prefix}encoder.stages.{stage}.layers.{layer}.{rest}"
    theirs = _rename(name, _inverse(TRANSFORMERS))
    return prefix + theirs if theirs.startswith(("embeddings.", "pooler.")) else theirs


def _from_transformers(state: Mapping[str, T]) -> dict[str, T]:
    state = {k: v for k, v in state.items() if not k.startswith(TRANSFORMERS_MAP_NORMS)}
    depths: dict[int, int] = {}
    for name in state:
        if match := _STAGE.match(name):
            stage, layer = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), layer + 1)
    first_blocks = {stage: sum(depths.get(s, 0) for s in range(stage)) for stage in depths}
    renamed = {}
    for name, value in state.items():
        if match := _STAGE.match(name):
            block = first_blocks[int(match[1])] + int(match[2])
            name = f"blocks.{block}.{_rename(match[3], TRANSFORMERS_BLOCK)}"
        else:
            name = _rename(name, TRANSFORMERS)
            if match := _DECODER_BLOCK.match(name):
                name = match[1] + _rename(match[2], TRANSFORMERS_BLOCK)
        renamed[name] = value
    if "decoder_pos_embed" in renamed:  # an autoencoder's last norm has another name
        renamed = {_rename(name, (("norm.", "encoder_norm."),)): v for name, v in renamed.items()}
    return renamed


def _inverse(table: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(after, before) for before, after in table]


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """Replace the prefix of a name, with the first (before, after) of the table that applies."""
    for before, after in table:
        if name.startswith(before):
            return after + name[len(before) :]
    return name
