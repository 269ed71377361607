"""HieraDet, the image encoder of SAM 2 (Ravi et al. 2024, arXiv 2408.00714): a Hiera for images of
any size, which returns the maps of its stages.

It differs from Hiera in three ways: every stage has windows of its own size, some blocks attend to
all tokens, and windows that do not fit the grid are padded. Tokens are in the order that
window_order.py describes.

Letters in shape comments: b batch, n tokens, w windows, t tokens of a window, h heads, d channels
of a head, c channels, y, x rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UsageError
from ...zoo import Family
from .. import cpu
from ..attention import MaskUnitAttention, eager_attention, fused_attention
from ..block import HieraBlock
from ..config import MAX_TOKENS
from ..encoder import Encoder, norm_factory, split_blocks
from ..kernels.recomputing import recompute
from ..layers import PatchEmbed, init_layer
from ..probes import known_forward
from ..sizes import legal_sizes
from ..sizes.size_cache import SizeCache
from .hieradet_config import HieraDetArguments, HieraDetConfig
from .window_order import POOL, StageOrder, WindowGroup, is_nested, stage_orders


class Group(NamedTuple):
    """Consecutive blocks of one stage that see the same windows.

    Args:
        stage: The stage, counted from 0.
        windowed: Whether they attend within windows.
        blocks: Indices of the blocks.
        starts_stage: Whether the first of them is the first block of its stage.
    """

    stage: int
    windowed: bool
    blocks: list[int]
    starts_stage: bool


class HieraDet(Encoder):
    """The image encoder of SAM 2. `HieraDetConfig` documents the arguments.

    `forward` takes images of any size and returns the maps of all stages.
    """

    family: ClassVar[Family] = "hieradet"
    config_class: ClassVar[type[HieraDetConfig]] = HieraDetConfig
    _config: HieraDetConfig

    def __init__(self, **arguments: Unpack[HieraDetArguments]) -> None:
        super().__init__()
        self._config = cfg = self.config_class(**arguments)
        self.block_specs = cfg.block_specs()
        self.groups = self._group_blocks()
        self._cache = SizeCache()

        side, norm_layer = cfg.window_spec[0], norm_factory("LayerNorm")
        self.patch_embed = PatchEmbed(
            cfg.in_chans, cfg.embed_dim, cfg.patch_kernel, cfg.patch_stride, cfg.patch_padding
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.embed_dim, *cfg.global_pos_size))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, cfg.embed_dim, side, side))
        self.blocks = nn.ModuleList(
            HieraDetBlock(
                spec.dim,
                spec.dim_out,
                spec.heads,
                cfg.mlp_ratio,
                spec.drop_path,
                norm_layer,
                q_stride=spec.q_stride,
                window_size=spec.window_size,
                use_mask_unit_attn=spec.use_mask_unit_attn,
                init_values=cfg.init_values,
            )
            for spec in self.block_specs
        )
        self.init_weights()

    @property
    def config(self) -> HieraDetArguments:
        """Constructor arguments, ready for JSON."""
        arguments: HieraDetArguments = self._config.to_json()  # type: ignore[assignment]
        return arguments

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map of every stage, channels last.

        Args:
            x: Images [b, chans, y, x] of any size, normalised.

        Returns:
            [b, y / 4, x / 4, c], [b, y / 8, x / 8, 2c], ... for the usual patch stride. The first
            is rounded up, the others down.

        Raises:
            UsageError: The input has other channels, is too small, or too large.
        """
        return self.encode(x, collect=True)[1]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map of the last stage. [b, chans, y, x] -> [b, y / 32, x / 32, c]

        Raises:
            UsageError: As for `forward`.
        """
        return self.forward(x)[-1]

    def encode(
        self, x: torch.Tensor, *, collect: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the tokens after the last block, [b, n, c] in window-major order; and, with
        `collect`, the map of every stage, [b, y, x, c].

        Raises:
            UsageError: As for `forward`.
        """
        return self._run(x, self.stage_ends if collect else (), len(self.blocks) - 1)

    def maps_after(self, x: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Return the map after each of some blocks, see `Encoder.maps_after`."""
        return self._run(x, blocks, max(blocks))[1]

    def keep_blocks(self, count: int) -> None:
        """Remove all blocks but the first `count`."""
        super().keep_blocks(count)
        self.groups = self._group_blocks()

    def _run(
        self, x: torch.Tensor, taps: Sequence[int], last: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the tokens after the block `last`, and the map after each of the blocks `taps`."""
        grid = self.check_input(x)
        orders = self.stage_orders(grid, x.device)
        x = self.patch_embed(x)
        x = x + self._position(grid).to(x.dtype)
        x = x.index_select(1, orders[0].cells)
        maps: list[torch.Tensor] = []
        for group in self.groups:
            for part in split_blocks(group.blocks, taps, last):
                x = self._run_part(group, part, x, orders)
                if part[-1] in taps:
                    maps.append(orders[group.stage].to_grid(x))
        return x, maps

    def embedding(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean over the last stage's map. SAM 2 has no final norm. -> [b, c]"""
        return ends[-1].mean((1, 2))

    def stage_maps(
        self, ends: list[torch.Tensor], *, size: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Return the stage maps, which `encode` has collected. [b, y, x, c] each"""
        return ends

    def get_pos_embed(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return the position embedding of a grid of tokens in grid order, [1, n, c].

        It is a global map, interpolated as in the released models (bicubic, without antialiasing),
        plus the tiled embedding of a window.
        """
        side = self.pos_embed_window.shape[-1]
        x = F.interpolate(self.pos_embed.float(), size=grid, mode="bicubic")
        tiles = [-(-size // side) for size in grid]
        window = self.pos_embed_window.tile(1, 1, *tiles)[..., : grid[0], : grid[1]]
        return (x.to(window.dtype) + window).flatten(2).transpose(1, 2)

    def stage_orders(
        self, grid: tuple[int, int], device: torch.device | None = None
    ) -> list[StageOrder]:
        """Return the token order of every stage. It is kept for the next input of this size."""
        sides = self._config.window_spec
        return self._cache.order((grid, device), lambda: stage_orders(grid, sides, device))

    def no_weight_decay(self) -> list[str]:
        """Return the names of parameters that get no weight decay. One-dimensional parameters never
        get any and are not listed."""
        return ["pos_embed", "pos_embed_window"]

    def train(self, mode: bool = True) -> HieraDet:
        """Set training or evaluation mode, and forget position embeddings that were kept."""
        self._cache.forget_positions()
        return super().train(mode)

    def init_weights(self) -> None:
        """Initialise as Hiera's; on the meta device, values come from a checkpoint."""
        if self.pos_embed.is_meta:
            return
        for embedding in (self.pos_embed, self.pos_embed_window):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.apply(init_layer)

    def _position(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return `get_pos_embed`. Without gradients, it is kept for the next input of this size."""
        parameters = (self.pos_embed, self.pos_embed_window)
        return self._cache.position(grid, parameters, lambda: self.get_pos_embed(grid))

    def _run_part(
        self, group: Group, part: Sequence[int], x: torch.Tensor, orders: list[StageOrder]
    ) -> torch.Tensor:
        """Run some consecutive blocks of a group."""
        starts_stage = group.starts_stage and part[0] == group.blocks[0]
        before, after = orders[group.stage - starts_stage], orders[group.stage]
        blocks = [self.blocks[number] for number in part]
        if not group.windowed or before.is_whole:
            x = self.run_blocks(blocks, x, windowed=group.windowed)
        else:
            for number, block in enumerate(blocks):
                windows = (before if number == 0 else after).groups
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = recompute(self.grad_checkpointing, block, x, windows)
                else:
                    x = block(x, windows)
        # Where windows change, the first block of the stage is a group of its own.
        return x.index_select(1, after.reorder) if starts_stage and after.reorder is not None else x

    def _group_blocks(self) -> list[Group]:
        """Split the blocks where the stage, its windows or the kind of attention change."""
        groups: list[Group] = []
        for number, spec in enumerate(self.block_specs):
            first = spec.q_stride > 1
            last = groups[-1] if groups else None
            new_windows = (
                last is not None
                and last.starts_stage
                and not is_nested(self._config.window_spec, spec.stage)
            )
            same = last is not None and (last.stage, last.windowed) == (
                spec.stage,
                spec.use_mask_unit_attn,
            )
            if last is not None and same and not new_windows:
                last.blocks.append(number)
            else:
                groups.append(Group(spec.stage, spec.use_mask_unit_attn, [number], first))
        return groups

    def check_input(self, x: torch.Tensor) -> tuple[int, int]:
        """Return the grid of tokens for an input.

        Raises:
            UsageError: See `forward`.
        """
        chans, least = self._config.in_chans, self._config.least_size()
        fits = x.dim() == 4 and x.shape[1] == chans
        if not fits or x.shape[2] < least[0] or x.shape[3] < least[1]:
            raise UsageError(
                f"input has shape {tuple(x.shape)}",
                f"expected [batch, {chans}, y, x] with at least {least[0]}x{least[1]} pixels",
            )
        height, width = legal_sizes.constant(x.shape[2:])
        grid = self._config.grid_of((height, width))
        if grid[0] * grid[1] > MAX_TOKENS:
            raise UsageError(
                f"an input of {height}x{width} pixels has {grid[0] * grid[1]} tokens",
                f"use at most {MAX_TOKENS}: a smaller image",
            )
        return grid


@known_forward
class HieraDetBlock(HieraBlock):
    """A block of Hiera that also takes windows which are not whole."""

    def forward(
        self, x: torch.Tensor, windows: Sequence[WindowGroup] | None = None
    ) -> torch.Tensor:
        """[b, n, dim] -> [b, n', dim_out], window-major.

        Args:
            x: Tokens.
            windows: Groups of windows before the block; None if all windows are whole.
        """
        if windows is None:
            return super().forward(x)
        x_norm = self.norm1(x)
        x = self._padded_shortcut(x, x_norm, windows)
        x = x + self.drop(self.ls1(self._padded_attention(x_norm, windows)), 0)
        out: torch.Tensor = x + self.drop(self.ls2(self.mlp(self.norm2(x))), 1)
        return out

    def _padded_shortcut(
        self, x: torch.Tensor, x_norm: torch.Tensor, windows: Sequence[WindowGroup]
    ) -> torch.Tensor:
        """Return the residual, widened and pooled like the output of the attention."""
        if self.attn.q_stride == 1:
            return x
        x = cpu.linear(self.proj, x_norm)
        parts = zip(x.split([g.count * g.tokens for g in windows], 1), windows, strict=True)
        # b (w s t) c -> b (w t) c
        pooled = [
            pool_window(part.unflatten(1, (group.count, -1)), group, 2).flatten(1, 2)
            for part, group in parts
        ]
        return torch.cat(pooled, 1)

    def _padded_attention(
        self, x_norm: torch.Tensor, windows: Sequence[WindowGroup]
    ) -> torch.Tensor:
        """b (w t) c -> b (w t') c', within windows that are padded with zeros.

        Padded tokens take part in the attention, as in the released models: their keys and values
        are those of a token of zeros. Their own outputs are not needed.
        """
        attn = self.attn
        attend = fused_attention if attn.implementation == "fused" else eager_attention
        qkv = cpu.linear(attn.qkv, x_norm)
        zero_k, zero_v = zero_keys_values(attn, x_norm, qkv.dtype)
        whole = attn.q_stride * attn.window_size
        done = []
        for part, group in zip(
            qkv.split([g.count * g.tokens for g in windows], 1), windows, strict=True
        ):
            # b (w t) c -> (b w) t 3 h d -> 3 (b w) h t d
            part = part.reshape(-1, group.tokens, 3, attn.heads, attn.head_dim)
            q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
            q = pool_window(q, group, 2) if attn.q_stride > 1 else q
            if missing := whole - group.tokens:
                shape = (k.shape[0], attn.heads, missing, attn.head_dim)
                k = torch.cat([k, zero_k.expand(shape)], 2)
                v = torch.cat([v, zero_v.expand(shape)], 2)
            if q.shape[2]:
                out = attend(q, k, v, attn.scale)
                # (b w) h t d -> b (w t) (h d)
                done.append(out.transpose(1, 2).reshape(x_norm.shape[0], -1, attn.dim_out))
        return cpu.linear(attn.proj, torch.cat(done, 1))


def zero_keys_values(
    attn: MaskUnitAttention, x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key and the value of a padded token, beside the tokens `x`.

    -> two of [1, heads, 1, channels of a head]
    """
    zero = cpu.linear(attn.qkv, x.new_zeros(1, attn.dim)).to(dtype)
    _, key, value = zero.view(3, 1, attn.heads, 1, attn.head_dim).unbind(0)
    return key, value


def pool_window(x: torch.Tensor, group: WindowGroup, dim: int) -> torch.Tensor:
    """Take the maximum of every 2x2 pool of the tokens of windows, along a dimension.

    Rows and columns that the pool loses come last, see window_order.py.
    """
    pooled = group.pooled().tokens
    return x.narrow(dim, 0, POOL**2 * pooled).unflatten(dim, (POOL**2, pooled)).amax(dim)
