"""Check the shapes of parameters that are looked at before a model is chosen, and adapt those that
have a rule for it.

Once there is a model, `load.fit` compares every shape with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch

from ..errors import CheckpointError

log = logging.getLogger("hiera")

# Patterns of names in the reference's naming, and how many dimensions such a tensor may have.
DIMENSIONS = {
    r"patch_embed\.proj\.weight": (3, 4, 5),  # one to three dimensions, and channels in and out
    r"pos_embed": (3, 4),  # 4 in absolute-window embeddings
    r"pos_embed_win(dow)?": (4,),
    r"(pos_embed_(spatial|temporal)|decoder_pos_embed)": (3,),
    r"(.+\.)?(attn\.proj|mlp\.fc2|head\.projection)\.weight": (2,),
    r"(.+\.)?(attn\.proj|mlp\.fc2|head\.projection)\.bias": (1,),
    r"(.+\.)?ls[12]\.gamma": (1,),
}
NEVER_EMPTY = re.compile(r"patch_embed\..+|.*pos_embed.*")
# Parameters that come together.
PARTNERS = {
    "pos_embed_win": "pos_embed",
    "pos_embed_window": "pos_embed",
    "pos_embed_spatial": "pos_embed_temporal",
}


def check_shapes(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check the number of dimensions of the parameters in `DIMENSIONS`.

    Args:
        state: Parameters, in the reference's naming.
        source: The checkpoint, for messages.

    Raises:
        CheckpointError: One has another number of dimensions, or is empty, or its partner is
            missing.
    """
    for name, tensor in state.items():
        allowed = next((n for p, n in DIMENSIONS.items() if re.fullmatch(p, name)), None)
        wrong = allowed is not None and tensor.dim() not in allowed
        if wrong or (NEVER_EMPTY.fullmatch(name) and not tensor.numel()):
            raise _not_a_hiera(source, f"{name} has the shape {tuple(tensor.shape)}")
    for name, partner in PARTNERS.items():
        if name in state and partner not in state:
            raise _not_a_hiera(source, f"{name} is there without {partner}")
    if "pos_embed_win" in state and state["pos_embed"].dim() != 4:
        shape = tuple(state["pos_embed"].shape)
        raise _not_a_hiera(source, f"pos_embed has the shape {shape} beside pos_embed_win")


def _not_a_hiera(source: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not hold the weights of a Hiera: {reason}", "use another file"
    )


def adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Return patch embedding weights for another number of input channels, by timm's rule.

    A single channel gets the sum of all channels. More channels are repetitions of the old ones,
    scaled so that activations keep their magnitude. [dim, old, *kernel] -> [dim, channels, *kernel]
    """
    old = weight.shape[1]
    if old == channels:
        return weight
    log.info("patch embedding adapted from %d to %d input channels", old, channels)
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = [1, -(-channels // old)] + [1] * (weight.dim() - 2)
    return weight.repeat(repeats)[:, :channels] * (old / channels)
