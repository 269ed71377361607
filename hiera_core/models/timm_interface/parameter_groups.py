"""Which layer each parameter belongs to, as timm's learning rates by layer expect it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A group of timm: a regular expression, and what its matches are numbered by. With None, these are
# the numbers that the expression captures.
Group = tuple[str, tuple[int, ...] | None]

WITH_THE_LAST = (99999,)  # timm's mark for "in the same layer as the group before"


def group_matcher(
    stages: Sequence[int], coarse: bool = False, prefix: str = ""
) -> dict[str, str | list[Group]]:
    """Return timm's description of layers: embeddings, then each block; then the final norm, in the
    layer of the last block. All others, such as a head, form the last layer.

    Args:
        stages: The stage of each block.
        coarse: Each stage is one layer, in place of each block.
        prefix: What comes before the names of the parameters.
    """
    start = f"^{re.escape(prefix)}"
    blocks: list[Group] = [(rf"{start}blocks\.(\d+)\.", None)]
    if coarse:
        blocks = []
        for stage in sorted(set(stages)):
            numbers = "|".join(str(i) for i, other in enumerate(stages) if other == stage)
            blocks.append((rf"{start}blocks\.(?:{numbers})\.", (stage,)))
    norm: Group = (rf"{start}(?:norm|encoder_norm)\.", WITH_THE_LAST)
    return {"stem": rf"{start}(?:pos_embed|patch_embed)", "blocks": [*blocks, norm]}
