"""Hiera, the hierarchical vision transformer (Ryali et al. 2023, arXiv 2306.00989).

Read from the top: the encoder that the classifier and the masked autoencoder share, the classifier.
The block is in block.py. Tokens are in window-major order between patch embedding and output: see
token_layout.py.

Letters in shape comments: b batch, n tokens, w windows (mask units), k kept windows, t tokens of a
window, c channels.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Self, Unpack, overload

import torch
from torch import nn

from ..errors import UsageError, check_type
from .block import HieraBlock
from .config import MAX_TOKENS, BlockSpec, HieraArguments, HieraConfig
from .encoder import Encoder, norm_factory, split_blocks
from .layers import (
    Head,
    PatchEmbed,
    init_classifier,
    init_head,
)
from .masking import (
    VisibleUnits,
    check_visible,
    draw_units,
    gather_windows,
    visible_from_units,
    visible_units,
)
from .pos_embed import absolute_window, resize
from .sizes import legal_sizes
from .sizes.size_cache import SizeCache
from .token_layout import TokenLayout

AXES = ("frames", "y", "x")  # names of the dimensions of an input, for messages


class BlockGroup(NamedTuple):
    """Consecutive blocks of one stage with one kind of attention."""

    stage: int
    windowed: bool
    blocks: tuple[int, ...]  # indices of the blocks


class HieraEncoder(Encoder):
    """Patch embedding, position embedding and blocks: the part that all Hieras share."""

    config_class: ClassVar[type[HieraConfig]] = HieraConfig
    _config: HieraConfig

    def __init__(
        self,
        *args: object,
        config: dict[str, object] | None = None,
        **kwargs: Unpack[HieraArguments],
    ) -> None:
        super().__init__()
        self._config = cfg = self.config_class.from_arguments(args, kwargs, config)
        self.layout = cfg.layout
        self._cache = SizeCache()
        self.block_specs = cfg.block_specs()
        self.block_groups = group_blocks(self.block_specs)
        self.norm_layer = norm_factory(cfg.norm_layer)

        self.patch_embed = PatchEmbed(
            cfg.in_chans, cfg.embed_dim, cfg.patch_kernel, cfg.patch_stride, cfg.patch_padding
        )
        if cfg.sep_pos_embed:
            frames, *space = cfg.tokens
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, math.prod(space), cfg.embed_dim))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, frames, cfg.embed_dim))
        elif cfg.abs_win_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, cfg.embed_dim, *cfg.global_pos_size))
            self.pos_embed_win = nn.Parameter(torch.zeros(1, cfg.embed_dim, *cfg.mask_unit_size))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(cfg.tokens), cfg.embed_dim))
        # Names of the position embeddings. They are attributes, but not always parameters:
        # functional calls, parametrizations, pruning, FSDP and DataParallel replace them.
        self._embeddings = tuple(name for name, _ in self.named_parameters(recurse=False))

        self.blocks = nn.ModuleList(
            HieraBlock.from_spec(spec, cfg, self.norm_layer) for spec in self.block_specs
        )

    # Properties under the reference's names ----------------------------------------------------

    @property
    def config(self) -> HieraArguments:
        """Constructor arguments, ready for JSON."""
        arguments: HieraArguments = self._config.to_json()  # type: ignore[assignment]
        return arguments

    @property
    def tokens_spatial_shape(self) -> list[int]:
        return list(self.layout.grid)

    @property
    def mask_spatial_shape(self) -> list[int]:
        return list(self.layout.unit_grid)

    def no_weight_decay(self) -> list[str]:
        """Return the names of parameters that get no weight decay. One-dimensional parameters never
        get any and are not listed."""
        return [*self._embeddings]

    # Masks ---------------------------------------------------------------------------------------

    def get_random_mask(self, x: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Return a random mask, [b, mask units] bool, True = visible.

        int(units * (1 - mask_ratio)) units stay visible. The same seed gives the reference's mask.
        """
        return self.random_visible(x, mask_ratio).mask

    def random_visible(self, x: torch.Tensor, mask_ratio: float) -> VisibleUnits:
        """Draw visible units for a batch of inputs [b, chans, *size]."""
        layout = self.layout_of(x)
        units = draw_units(x.shape[0], layout.windows, mask_ratio, device=x.device)
        return visible_from_units(units, layout)

    def visible_units(
        self,
        mask: torch.Tensor | None = None,
        keep_ids: torch.Tensor | None = None,
        check_ids: bool = True,
        *,
        layout: TokenLayout | None = None,
    ) -> VisibleUnits | None:
        """Return the visible units of a call, see `masking.visible_units`.

        `layout` is the token order of the inputs, if they are not of the model's `input_size`.
        """
        return visible_units(mask, keep_ids, layout or self.layout, check_ids)

    # Forward --------------------------------------------------------------------------------------

    def layout_of(self, x: torch.Tensor) -> TokenLayout:
        """Return the token order for a batch of inputs [b, chans, *size].

        It is kept for the next inputs of this size.

        Raises:
            UsageError: The model does not take such inputs.
        """
        size = self._check_input(x)
        if size == self._config.input_size:
            return self.layout
        return self._cache.order(size, lambda: self._config.layout_of(size))

    def get_pos_embed(self, grid: Sequence[int] | None = None) -> torch.Tensor:
        """Return the position embedding in grid order, [1, n, c].

        Args:
            grid: Number of tokens along each dimension, if it is not that of the model's
                `input_size`. A learned embedding is then resized by the absolute-window rule, see
                pos_embed.py.
        """
        own, unit = self.layout.grid, self._config.mask_unit_size
        grid = own if grid is None else tuple(grid)
        if self._config.abs_win_pos_embed:
            return absolute_window(self.pos_embed, self.pos_embed_win, grid)
        if not self._config.sep_pos_embed:
            return resize(self.pos_embed, own, grid, unit)
        spatial = resize(self.pos_embed_spatial, own[1:], grid[1:], unit[1:])
        temporal = resize(self.pos_embed_temporal, own[:1], grid[:1])
        return spatial.repeat(1, grid[0], 1) + temporal.repeat_interleave(
            math.prod(grid[1:]), dim=1
        )

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, and forget position embeddings that were kept."""
        self._cache.forget_positions()
        return super().train(mode)

    def encode(
        self, x: torch.Tensor, visible: VisibleUnits | None = None, collect: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the tokens after the last block, and after each stage.

        [b, chans, *size] -> [b, (w t), c], and a list of such tensors

        Args:
            x: Inputs.
            visible: Only these k of the w windows go through the blocks.
            collect: Keep the tokens of each stage, which costs memory; otherwise the list is empty.

        Raises:
            UsageError: The input or the mask does not fit the model.
        """
        return self._run(x, self.stage_ends if collect else (), len(self.blocks) - 1, visible)

    def maps_after(self, x: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Return the map after each of some blocks, see `Encoder.maps_after`."""
        layout = self.layout_of(x)
        _, ends = self._run(x, blocks, max(blocks))
        stages = [self.block_specs[number].stage for number in blocks]
        return [
            layout.to_grid(end, min(stage, self.q_pool))
            for end, stage in zip(ends, stages, strict=True)
        ]

    def keep_blocks(self, count: int) -> None:
        """Remove all blocks but the first `count`."""
        super().keep_blocks(count)
        self.block_groups = group_blocks(self.block_specs)

    def _run(
        self,
        x: torch.Tensor,
        taps: Sequence[int],
        last: int,
        visible: VisibleUnits | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the tokens after the block `last`, and after each of the blocks `taps`."""
        layout = self.layout_of(x)
        if visible is not None:
            check_visible(visible, x)
        mask = None if visible is None else visible.mask.view(-1, 1, *layout.unit_grid)
        x = layout.to_windows(self.patch_embed(x, mask) + self._position(layout))
        if visible is not None:
            x = gather_windows(x, visible.windows, layout.windows)
        ends: list[torch.Tensor] = []
        for group in self.block_groups:
            for part in split_blocks(group.blocks, taps, last):
                blocks = [self.blocks[number] for number in part]
                x = self.run_blocks(blocks, x, windowed=group.windowed)
                if part[-1] in taps:
                    ends.append(x)
        return x, ends

    def _position(self, layout: TokenLayout) -> torch.Tensor:
        """Return `get_pos_embed`. Without gradients, what is computed for a size is kept."""
        if layout is self.layout and not self._config.abs_win_pos_embed:
            return self.get_pos_embed()
        parameters = [getattr(self, name) for name in self._embeddings]
        grid = layout.grid
        return self._cache.position(grid, parameters, lambda: self.get_pos_embed(grid))

    @overload
    def forward_features(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_intermediates: Literal[False] = False,
        *,
        keep_ids: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    @overload
    def forward_features(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        return_intermediates: Literal[True],
        keep_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

    def forward_features(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_intermediates: bool = False,
        *,
        keep_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return features in spatial order, before normalisation, pooling and head.

        Args:
            x, mask, keep_ids: As for `Hiera.forward`.
            return_intermediates: Also return the maps of all stages.

        Returns:
            The last stage's map [b, *grid, c], e.g. [b, 7, 7, 768] for images and [b, 8, 7, 7, 768]
            for video. With a mask, [b, k, *unit, c] for the visible units, in the order of the
            tokens. With `return_intermediates`, a pair of that and the list of all stage maps.

        Raises:
            UsageError: The input or the mask does not fit the model.
        """
        layout = self.layout_of(x)
        visible = self.visible_units(mask, keep_ids, layout=layout)
        x, ends = self.encode(x, visible, collect=return_intermediates)
        masked = visible is not None
        if not return_intermediates:
            return self._as_map(x, self.block_specs[-1].stage, masked, layout)
        maps = [self._as_map(end, stage, masked, layout) for stage, end in enumerate(ends)]
        return maps[-1], maps

    def stage_maps(
        self, ends: list[torch.Tensor], masked: bool = False, *, size: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Return stage maps in grid order from the tokens that `encode` collected.

        [b, *grid, c] each; if masked, [b, k, *unit, c]. `size` is the size of the inputs, if it is
        not the `input_size` of the model.
        """
        own = size is None or tuple(size) == self._config.input_size
        layout = self.layout if own else self._config.layout_of(size or ())
        return [self._as_map(x, stage, masked, layout) for stage, x in enumerate(ends)]

    def _as_map(
        self, x: torch.Tensor, stage: int, masked: bool, layout: TokenLayout
    ) -> torch.Tensor:
        arrange = layout.to_units if masked else layout.to_grid
        return arrange(x, min(stage, self.q_pool))

    def _check_input(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the size of the inputs.

        Raises:
            UsageError: See `layout_of`.
        """
        check_type("the input", x, torch.Tensor, "a tensor: model(model.transform(image))")
        config, size = self._config, legal_sizes.constant(x.shape[2:])
        expected = (config.in_chans, *config.input_size)
        if tuple(x.shape[1:]) == expected:
            return size
        if not config.takes_any_size:
            raise UsageError(
                f"input has shape {tuple(x.shape)}",
                f"expected [batch, {', '.join(map(str, expected))}]; build the model with another "
                "input_size or in_chans for other inputs, or with dynamic_size=True for inputs of "
                "any legal size",
            )
        steps = config.size_multiple
        if x.dim() != 2 + len(steps) or x.shape[1] != config.in_chans:
            raise UsageError(
                f"input has shape {tuple(x.shape)}",
                f"expected [batch, {config.in_chans}, {', '.join(AXES[-len(steps) :])}]",
            )
        if (dim := legal_sizes.illegal_dimension(size, steps)) is not None:
            raise UsageError(
                f"input has shape {tuple(x.shape)}: {size[dim]} is not a multiple of {steps[dim]} "
                "(patch stride x mask unit)",
                f"the nearest legal size is {legal_sizes.nearest_whole(size, steps)}",
            )
        if math.prod(config.tokens_of(size)) > MAX_TOKENS:
            raise UsageError(
                f"input has shape {tuple(x.shape)}, which is too large",
                f"use inputs of at most {MAX_TOKENS} tokens",
            )
        return size


class Hiera(HieraEncoder):
    """The classifier. `HieraConfig` documents the arguments; names, order and defaults are the
    reference's.

    `forward` returns class probabilities in evaluation mode and logits in training mode.
    """

    logits_in_evaluation: bool = False  # see `return_logits`

    def __init__(
        self,
        *args: object,
        config: dict[str, object] | None = None,
        **kwargs: Unpack[HieraArguments],
    ) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.norm = self.norm_layer(self.num_features)
        self.head = self._make_head(self._config.num_classes)
        self.init_weights()

    @overload
    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_intermediates: Literal[False] = False,
        *,
        keep_ids: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        return_intermediates: Literal[True],
        keep_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_intermediates: bool = False,
        *,
        keep_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Classify a batch.

        Args:
            x: Inputs, [b, chans, *size].
            mask: [b, mask units] or [b, *unit grid] bool, True = visible; every row keeps the same
                number of units.
            return_intermediates: Also return the map of every stage, channels last.
            keep_ids: In place of a mask, the numbers of the visible units in row-major order of the
                grid, [b, k] integers. This form compiles without a graph break.

        Returns:
            Probabilities (logits in training mode), [b, classes]. With a mask, the tokens of the
            visible units before normalisation, in the reference's order, [b, n, c]. With
            `return_intermediates`, a pair of that and a list of stage maps [b, *grid, c] (with a
            mask [b, k, *unit, c]).

        Raises:
            UsageError: The input or the mask does not fit the model.
        """
        x = x[0] if isinstance(x, list) else x  # SlowFast's training passes a list of one
        layout = self.layout_of(x)
        visible = self.visible_units(mask, keep_ids, layout=layout)
        x, ends = self.encode(x, visible, collect=return_intermediates)
        masked = visible is not None
        out = layout.reference_order(x, self.q_pool) if masked else self.head(self.pool(x))
        if not return_intermediates:
            return out
        return out, [self._as_map(end, stage, masked, layout) for stage, end in enumerate(ends)]

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits in either mode. [b, chans, *size] -> [b, classes]"""
        x = self.pool(self.encode(x)[0])
        return self.head.forward_logits(x) if isinstance(self.head, Head) else x

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised mean over tokens. [b, n, c] -> [b, c]"""
        pooled: torch.Tensor = self.norm(x.mean(dim=1))
        return pooled

    def embedding(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the input of the head: the last stage, pooled and normalised. -> [b, c]"""
        return self.pool(ends[-1])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the output for the last map, as `forward` does for an input.

        Args:
            x: The last map [b, *grid, c], or its tokens [b, n, c].
            pre_logits: Return the input of the head, [b, c].
        """
        pooled = self.pool(x.flatten(1, -2))
        output: torch.Tensor = pooled if pre_logits else self.head(pooled)
        return output

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the head, or an identity if there is no head."""
        return self.head.projection if isinstance(self.head, Head) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a newly initialised one for `num_classes`; 0 removes the head.

        Args:
            num_classes: Number of classes.
            global_pool: timm's argument. All Hieras take the mean over tokens: "avg".

        Raises:
            UsageError: `global_pool` is another one.
        """
        if global_pool not in (None, "avg"):
            raise UsageError(f"global_pool is {global_pool!r:.60}", "use 'avg' or None")
        self._config = type(self._config)(**{**vars(self._config), "num_classes": num_classes})
        parameter = next(self.parameters())
        self.head = self._make_head(num_classes)
        init_head(self.head, self._config.head_init_scale)
        self.head.train(self.training).to(parameter.device, parameter.dtype)

    def return_logits(self) -> None:
        """Return logits in evaluation mode, too, as models of timm do."""
        self.logits_in_evaluation = True
        if isinstance(self.head, Head):
            self.head.act_func = nn.Identity()

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = Head(self.num_features, num_classes, dropout_rate=self._config.head_dropout)
        if self.logits_in_evaluation:
            head.act_func = nn.Identity()
        return head

    def init_weights(self) -> None:
        """Initialise as the reference does; on the meta device, values come from a checkpoint."""
        if not self.patch_embed.proj.weight.is_meta:
            init_classifier(self, self._embeddings, self._config.head_init_scale)


def group_blocks(specs: list[BlockSpec]) -> list[BlockGroup]:
    """Split the blocks where the stage or the kind of attention changes."""
    kinds = itertools.groupby(
        range(len(specs)), lambda number: (specs[number].stage, specs[number].use_mask_unit_attn)
    )
    return [BlockGroup(stage, windowed, tuple(numbers)) for (stage, windowed), numbers in kinds]


Hiera.__signature__ = inspect.signature(HieraConfig)  # type: ignore[attr-defined]
