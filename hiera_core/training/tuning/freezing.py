"""`freeze:` in a recipe: embeddings and the first blocks stay as they are."""

from __future__ import annotations

from ...errors import UsageError
from ...models.hiera import HieraEncoder
from ...models.layers import DropPath
from ..optimizer import layer_index


def freeze_blocks(model: HieraEncoder, freeze: int | str) -> None:
    """Stop training the patch embedding, the position embeddings and the first blocks.

    Frozen blocks compute as in evaluation: they have no drop path.

    Args:
        model: The model.
        freeze: Number of blocks; "encoder": all of them, so that only the last norm and the head
            are trained.

    Raises:
        UsageError: The model has fewer blocks.
    """
    depth = len(model.blocks)
    count = depth if freeze == "encoder" else int(freeze)
    if count > depth:
        raise UsageError(
            f"freeze is {count}, and the model has {depth} blocks", "give fewer, or encoder"
        )
    for name, parameter in model.named_parameters():
        if layer_index(name, depth + 1) <= count:
            parameter.requires_grad_(False)
    for block in model.blocks[:count]:
        for module in block.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
