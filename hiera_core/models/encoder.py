"""What all encoders have in common: Hiera, its autoencoder, and the image encoder of SAM 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypedDict, overload

import torch
from torch import nn

from ..errors import UsageError
from ..records import Kind
from ..wrappers import find_inside, no_hiera
from ..zoo import Family
from . import cpu
from .attention import Implementation, MaskUnitAttention
from .config import BlockSpec
from .kernels.recomputing import Checkpointing, as_checkpointing, recompute
from .pretrained import PretrainedMixin
from .timm_interface.feature_info import FeatureEntry, FeatureInfo, absolute_indices
from .timm_interface.map_formats import arrange, channels_first
from .timm_interface.parameter_groups import Group, group_matcher
from .timm_interface.pretrained_config import pretrained_config

NormLayer = Callable[[int], nn.Module]


class EncoderArguments(TypedDict, total=False):
    """Constructor arguments that all encoders have."""

    input_size: tuple[int, ...]
    in_chans: int


class Encoder(nn.Module, PretrainedMixin):
    """Base class of the models: what features, conversion and serving need of them.

    Attributes:
        block_specs: Specification of every block.
        grad_checkpointing: Whether blocks are recomputed in the backward pass; `selective`:
            without their matrix products.
    """

    family: ClassVar[Family] = "hiera"
    _config: Any  # `HieraConfig` or `HieraDetConfig`
    block_specs: list[BlockSpec]
    blocks: nn.ModuleList
    grad_checkpointing: Checkpointing = False

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

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return one vector for each input. [b, chans, *size] -> [b, c]"""
        return self.embedding(self.encode(x, collect=True)[1])

    def stage_maps(
        self, ends: list[torch.Tensor], *, size: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Return stage maps in grid order from the tokens that `encode` collected. [b, *grid, c]

        `size` is the size of the inputs, if it is not the `input_size` of the model.
        """
        raise NotImplementedError

    def maps_after(self, x: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Return the map after each of some blocks, [b, *grid, c]. Later blocks do not run.

        Args:
            x: Inputs, [b, chans, *size].
            blocks: Indices of the blocks, ascending.
        """
        raise NotImplementedError

    def keep_blocks(self, count: int) -> None:
        """Remove all blocks but the first `count`."""
        if count < len(self.blocks):
            self.blocks = nn.ModuleList([*self.blocks][:count])
            self.block_specs = self.block_specs[:count]

    def no_weight_decay(self) -> list[str]:
        """Return the names of parameters that get no weight decay. One-dimensional parameters never
        get any and are not listed."""
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
    def num_features(self) -> int:
        """Number of channels after the last block."""
        return self.block_specs[-1].dim_out

    @property
    def stage_ends(self) -> list[int]:
        """Index of the last block of each stage."""
        stages = [spec.stage for spec in self.block_specs]
        return [i for i, stage in enumerate(stages) if stages[i + 1 : i + 2] != [stage]]

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

    # timm's interface --------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without a head."""
        return 0 if self.family == "hieradet" else int(self._config.num_classes)

    @property
    def head_hidden_size(self) -> int:
        """Number of channels that a head gets."""
        return self.num_features

    @property
    def feature_info(self) -> FeatureInfo:
        """What the map of each stage is."""
        ends = self.stage_ends
        entries: list[FeatureEntry] = [
            {
                "num_chs": self.block_specs[end].dim_out,
                "reduction": self.reduction(stage)[-1],
                "module": f"blocks.{end}",
                "index": stage,
            }
            for stage, end in enumerate(ends)
        ]
        return FeatureInfo(entries, range(len(ends)))

    @property
    def pretrained_cfg(self) -> dict[str, object]:
        """Preprocessing, classes and licence, under the names that timm's tools read."""
        config = self._config
        return pretrained_config(
            getattr(self, "card", {}),
            config.input_size,
            config.in_chans,
            self.num_classes,
            fixed_size=not config.takes_any_size,
        )

    @property
    def default_cfg(self) -> dict[str, object]:
        """The older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[Group]]:
        """Return which layer each parameter belongs to, for timm's learning rates by layer.

        Args:
            coarse: Each stage is one layer, in place of each block.
        """
        return group_matcher([spec.stage for spec in self.block_specs], coarse)

    @overload
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: Literal[False] = False,
        *,
        coarse: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        *,
        intermediates_only: Literal[True],
        coarse: bool = True,
    ) -> list[torch.Tensor]: ...

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        coarse: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | list[torch.Tensor]:
        """Return the maps of stages or blocks, with timm's arguments.

        Args:
            x: Inputs, [b, chans, *size].
            indices: Which maps: numbers from 0, or from the end if negative; a number n for the
                last n; None for all.
            norm: Apply the final norm to the last map of the model. The others have no norm.
            stop_early: Do not run blocks after the last map.
            output_fmt: "NCHW" or "NHWC", for videos also "NCTHW" or "NTHWC".
            intermediates_only: Return only the list of maps.
            coarse: The indices are those of stages; otherwise those of blocks.

        Returns:
            The map after the last block that ran, [b, *grid, c], as `forward_features` returns it;
            and a list of the maps, [b, c, *grid] or [b, *grid, c], in the order of the network.

        Raises:
            UsageError: The input does not fit the model, there is no such map, or the model has no
                final norm.
        """
        first = channels_first(output_fmt, len(self._config.input_size))
        ends, count = self.stage_ends, len(self.blocks)
        if coarse:
            stages = absolute_indices(indices, len(ends), argument="indices")
            wanted = {ends[stage] for stage in stages}
        else:
            wanted = set(absolute_indices(indices, count, "block", "indices"))
        final_norm = getattr(self, "norm", None)
        if norm and final_norm is None:
            raise UsageError("this model has no final norm for maps", "use norm=False")
        last = max(wanted) if stop_early else count - 1
        numbers = sorted({*wanted, last})
        after = dict(zip(numbers, self.maps_after(x, numbers), strict=True))
        maps = [after[number] for number in sorted(wanted)]
        if norm and final_norm is not None and count - 1 in wanted:
            maps[-1] = final_norm(maps[-1])
        maps = [arrange(each, first) for each in maps]
        return maps if intermediates_only else (after[last], maps)

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations.

        Args:
            enable: `selective` stores the results of matrix products and of attention, and
                recomputes the rest, which takes little time.

        Raises:
            UsageError: It is another text.
        """
        self.grad_checkpointing = as_checkpointing(enable)

    def run_blocks(
        self, blocks: Iterable[nn.Module], x: torch.Tensor, *, windowed: bool
    ) -> torch.Tensor:
        """Return `x` after all blocks. b (w t) c -> b (w t') c'

        Args:
            blocks: Consecutive blocks.
            x: Tokens in window-major order.
            windowed: Whether all blocks attend within windows.
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return cpu.run_blocks([*blocks], x, windowed=windowed)
        for block in blocks:
            x = recompute(self.grad_checkpointing, block, x)
        return x


def split_blocks(blocks: Sequence[int], taps: Sequence[int], last: int) -> list[list[int]]:
    """Split consecutive blocks after each of the blocks `taps`. Those after `last` are left out."""
    parts: list[list[int]] = []
    for number in blocks:
        if number > last:
            break
        if not parts or parts[-1][-1] in taps:
            parts.append([])
        parts[-1].append(number)
    return parts


def norm_factory(norm: str | NormLayer) -> NormLayer:
    """Return a constructor of norms: a class of torch.nn with eps 1e-6, or the given callable."""
    if callable(norm):
        return norm
    return partial(getattr(nn, norm), eps=1e-6)


def unwrap_model(model: object) -> Encoder:
    """Return the Hiera inside of a wrapper, or the model itself if it has none.

    The wrappers are those of torch.compile, DataParallel, DDP, FSDP, averaged weights and PEFT. A
    model that is compiled, or has adapters, shares its parameters with the one that is returned;
    adapters stay active.

    Raises:
        UsageError: There is no Hiera inside. The message names the type of the model.
    """
    inner = find_model(model)
    if inner is None:
        raise no_hiera(model)
    return inner


def find_model(model: object) -> Encoder | None:
    """Return the Hiera inside of a wrapper, or None if there is none."""
    found = find_inside(model, lambda inner: isinstance(inner, Encoder))
    return found if isinstance(found, Encoder) else None
