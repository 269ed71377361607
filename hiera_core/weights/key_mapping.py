"""Parameter names of the four Hieras. Renaming is all it takes: no transposes, no reshapes.

`reference` is hiera-transformer's naming and ours. timm's and transformers' are translated by the
tables below; each row is (theirs, ours), a prefix or an infix of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from ..errors import CheckpointError

Naming = Literal["reference", "timm", "transformers"]
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
TRANSFORMERS_BLOCK = (("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."))
_STAGE = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)")


def detect_naming(names: Iterable[str]) -> Naming:
    """Which Hiera wrote these names.

    Raises:
        CheckpointError: no Hiera did.
    """
    names = [name.removeprefix("hiera.") for name in names]
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
    """Any dialect to the reference's names, and which one it was."""
    dialect = detect_naming(state)
    if dialect == "reference":
        return dict(state), dialect
    if dialect == "timm":
        return {_rename(name, TIMM): value for name, value in state.items()}, dialect
    renamed = _from_transformers({n.removeprefix("hiera."): v for n, v in state.items()})
    return renamed, dialect


def from_reference(
    state: Mapping[str, T], dialect: Naming, stages: Sequence[int] = ()
) -> dict[str, T]:
    """The reference's names to another dialect's.

    Args:
        stages: blocks of each stage, which transformers counts apart.
    """
    if dialect == "reference":
        return dict(state)
    if dialect == "timm":
        back = [(ours, theirs) for theirs, ours in TIMM]
        return {_rename(name, back): value for name, value in state.items()}
    places = [(stage, layer) for stage, depth in enumerate(stages) for layer in range(depth)]
    # A model without a head is a HieraModel: the others hold one, as `hiera`.
    bare = not any(name.startswith(("head.", "decoder_")) for name in state)
    return {_to_transformers(n, places, "" if bare else "hiera."): v for n, v in state.items()}


def _to_transformers(name: str, places: Sequence[tuple[int, int]], prefix: str) -> str:
    """`blocks.3.norm1.bias` -> `hiera.encoder.stages.1.layers.1.layernorm_before.bias`"""
    kind, _, rest = name.partition(".")
    if kind in ("blocks", "decoder_blocks"):
        number, rest = rest.split(".", 1)
        rest = _rename(rest, [(ours, theirs) for theirs, ours in TRANSFORMERS_BLOCK])
        if kind == "decoder_blocks":
            return f"decoder.decoder_block.layers.{number}.{rest}"
        stage, layer = places[int(number)]
        return f"{prefix}encoder.stages.{stage}.layers.{layer}.{rest}"
    theirs = _rename(name, [(ours, theirs) for theirs, ours in TRANSFORMERS])
    return prefix + theirs if theirs.startswith(("embeddings.", "pooler.")) else theirs


def _from_transformers(state: Mapping[str, T]) -> dict[str, T]:
    depths: dict[int, int] = {}
    for name in state:
        if match := _STAGE.match(name):
            stage, layer = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), layer + 1)
    starts = {stage: sum(depths.get(s, 0) for s in range(stage)) for stage in depths}
    renamed = {}
    for name, value in state.items():
        if match := _STAGE.match(name):
            block = starts[int(match[1])] + int(match[2])
            name = f"blocks.{block}.{_rename(match[3], TRANSFORMERS_BLOCK)}"
        else:
            name = _rename(name, TRANSFORMERS)
            if name.startswith("decoder_blocks."):
                head, number, rest = name.split(".", 2)
                name = f"{head}.{number}.{_rename(rest, TRANSFORMERS_BLOCK)}"
        renamed[name] = value
    if "decoder_pos_embed" in renamed:  # an autoencoder's last norm has a name of its own
        renamed = {_rename(name, (("norm.", "encoder_norm."),)): v for name, v in renamed.items()}
    return renamed


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    for before, after in table:
        if name.startswith(before):
            return after + name[len(before) :]
    return name
