"""What all encoders have in common: Hiera, its autoencoder, and the image encoder of SAM 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypedDict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..records import Kind
from ..zoo import Family
from . import cpu
from .attention import Implementation, MaskUnitAttention
from .config import BlockSpec
from .pretrained import PretrainedMixin

NormLayer = Callable[[int], nn.Module]


class EncoderArguments(TypedDict, total=False):
    """Constructor arguments that all encoders have."""

    input_size: tuple[int, ...]
    in_chans: int


class Encoder(nn.Module, PretrainedMixin):
    """Base class of the models: what features, conversion and serving need of them.

    Attributes:
        block_specs: Specification of every block.
        grad_checkpointing: Whether blocks are recomputed in the backward pass.
    """

    family: ClassVar[Family] = "hiera"
    _config: Any  # `HieraConfig` or `HieraDetConfig`
    block_specs: list[BlockSpec]
    blocks: nn.ModuleList
    grad_checkpointing: bool = False

    @property
    def config(self) -> EncoderArguments:
        """Constructor arguments, ready for JSON."""
        raise NotImplementedError

    def encode(
        self, x: torch.Tensor, *, collect: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the tokens after the last block, and, with `collect`, those after each stage. Both
        are in the model's own order."""
        raise NotImplementedError

    def embedding(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return one vector for each input, from the tokens that `encode` collected. -> [b, c]"""
        raise NotImplementedError

    def stage_maps(self, ends: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return stage maps in grid order from the tokens that `encode` collected. [b, *grid, c]"""
        raise NotImplementedError

    def input_kind(self) -> Kind:
        """Return the kind of input: "image" or "video".

        Raises:
            UsageError: The model takes one-dimensional signals.
        """
        dims = len(self._config.input_size)
        if dims == 1:
            raise UsageError("this model takes signals", "use one for images or videos")
        return "video" if dims == 3 else "image"

    @property
    def stage_ends(self) -> list[int]:
        """Index of the last block of each stage."""
        return [sum(self._config.stages[: i + 1]) - 1 for i in range(len(self._config.stages))]

    @property
    def q_pool(self) -> int:
        """Number of stage transitions that pool."""
        pools: int = self._config.q_pool
        return pools

    def reduction(self, stage: int) -> tuple[int, ...]:
        """Return how many pixels (or frames) a cell of the stage's map covers along each dimension.

        Stages are counted from 0.
        """
        pools = min(stage, self.q_pool)
        pairs = zip(self._config.patch_stride, self._config.q_stride, strict=True)
        return tuple(patch * q**pools for patch, q in pairs)

    def set_attention(self, implementation: Implementation) -> None:
        """Choose `fused` attention (one kernel, the default) or `eager` (explicit softmax).

        Raises:
            UsageError: The name is unknown.
        """
        if implementation not in ("fused", "eager"):
            raise UsageError(f"unknown attention {implementation!r}", "use 'fused' or 'eager'")
        for module in self.modules():
            if isinstance(module, MaskUnitAttention):
                module.implementation = implementation

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def run_blocks(
        self, blocks: Sequence[nn.Module], x: torch.Tensor, *, windowed: bool
    ) -> torch.Tensor:
        """Return `x` after all blocks. b (w t) c -> b (w t') c'

        Args:
            blocks: Consecutive blocks.
            x: Tokens in window-major order.
            windowed: Whether all blocks attend within windows.
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return cpu.run_blocks(blocks, x, windowed=windowed)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def norm_factory(norm: str | NormLayer) -> NormLayer:
    """Return a constructor of norms: a class of torch.nn with eps 1e-6, or the given callable."""
    if callable(norm):
        return norm
    return partial(getattr(nn, norm), eps=1e-6)
