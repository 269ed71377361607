"""The masked autoencoder (He et al. 2021; section 4 of Ryali et al. 2023): encoder, decoder, loss.

Letters in shape comments: b batch, w windows (mask units), k kept windows, u tokens of a window at
the encoder's last resolution, m deleted tokens, n = w u tokens, c channels, p pixels of a patch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Unpack

import torch
from torch import nn

from ..errors import UsageError
from . import cpu
from .block import HieraBlock
from .config import AutoencoderArguments, AutoencoderConfig, HieraConfig
from .hiera import HieraEncoder
from .layers import conv_nd, init_autoencoder
from .masking import MASK_RATIOS, VisibleUnits, check_mask_ratio, gather_rows
from .pos_embed import resize
from .token_layout import TokenLayout


class DeletedTokens(NamedTuple):
    """Tokens of masked units: their cells in the grid and their positions in window-major order."""

    cells: torch.Tensor  # [b, m], ascending
    positions: torch.Tensor  # [b, m], of the same tokens


class MaskedAutoencoderHiera(HieraEncoder):
    """Hiera as a masked autoencoder: it sees some mask units and predicts the pixels of the others.

    `AutoencoderConfig` documents the arguments. Multi-scale fusion brings every stage to the last
    resolution; the decoder is a plain transformer over all tokens.
    """

    config_class: ClassVar[type[HieraConfig]] = AutoencoderConfig
    _config: AutoencoderConfig

    @property
    def config(self) -> AutoencoderArguments:
        """Constructor arguments, ready for JSON."""
        arguments: AutoencoderArguments = self._config.to_json()  # type: ignore[assignment]
        return arguments

    def __init__(
        self,
        *args: object,
        config: dict[str, object] | None = None,
        **kwargs: Unpack[AutoencoderArguments],
    ) -> None:
        super().__init__(*args, config=config, **kwargs)  # type: ignore[misc]
        cfg, layout = self._config, self.layout
        dim, dec = self.block_specs[-1].dim_out, cfg.decoder_embed_dim
        self.encoder_norm = self.norm_layer(dim)
        self.multi_scale_fusion_heads = nn.ModuleList(
            self._fusion_head(stage, dim) for stage in range(cfg.q_pool)
        )
        self.multi_scale_fusion_heads.append(nn.Identity())  # the last stage needs none

        tokens = math.prod(layout.grid_after(cfg.q_pool))
        self.decoder_embed = nn.Linear(dim, dec)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, dec))
        self.decoder_blocks = nn.ModuleList(
            HieraBlock(dec, dec, cfg.decoder_num_heads, cfg.mlp_ratio, norm_layer=self.norm_layer)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = self.norm_layer(dec)
        # Side of a predicted patch in pixels. Patches are square, as in the released models.
        self.pred_stride = cfg.patch_stride[-1] * cfg.q_stride[-1] ** cfg.q_pool
        patch_dims = min(2, len(cfg.q_stride))  # video predicts one frame per token
        self.decoder_pred = nn.Linear(dec, self.pred_stride**patch_dims * cfg.in_chans)
        self.init_weights()

    def forward(
        self,
        x: torch.Tensor,
        mask_ratio: float = MASK_RATIOS["image"],
        mask: torch.Tensor | None = None,
        *,
        keep_ids: torch.Tensor | None = None,
        check_ids: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, encode and decode a batch, and compare the predictions with the pixels.

        Args:
            x: Inputs [b, chans, *size], normalised as in the model's preprocessing.
            mask_ratio: Share of mask units that are deleted, in (0, 1). The default is for images,
                as in the reference; callers use 0.9 for video.
            mask: Fixed mask in place of a random one: [b, mask units] or [b, *unit grid] bool,
                True = visible; every row keeps the same number of units.
            keep_ids: The same as the numbers of the visible units in row-major order of the grid,
                [b, k] integers. This form compiles without a graph break.
            check_ids: Check the values of `keep_ids`, which synchronises a GPU. Training draws them
                itself and leaves this out.

        Returns:
            loss: Mean squared error over deleted tokens, a scalar.
            preds, labels: [b * m, p] for deleted tokens, in grid order. p runs over (channel, y, x)
                for images and (y, x, channel) for video: a quirk of the released weights.
            mask: [b, mask units] bool, True = visible.

        Raises:
            UsageError: The ratio leaves no visible or no masked unit, mask and keep_ids are both
                given, or one of them or the input does not fit the model.
        """
        latent, visible = self.forward_encoder(
            x, mask_ratio, mask, keep_ids=keep_ids, check_ids=check_ids
        )
        deleted = self.deleted_tokens(visible)
        preds = self.forward_decoder(latent, visible, deleted).flatten(0, 1)
        labels = self.pixel_labels(x)
        labels = gather_rows(labels, deleted.cells).flatten(0, 1)
        labels = normalise_patches(labels)
        return reconstruction_error(preds, labels).mean(), preds, labels, visible.mask

    def forward_encoder(
        self,
        x: torch.Tensor,
        mask_ratio: float = MASK_RATIOS["image"],
        mask: torch.Tensor | None = None,
        *,
        keep_ids: torch.Tensor | None = None,
        check_ids: bool = True,
    ) -> tuple[torch.Tensor, VisibleUnits]:
        """Return the fused, normalised tokens of the visible units, and which units these are.

        [b, chans, *size] -> [b, k, u, c]

        Arguments and errors are those of `forward`.
        """
        layout = self.layout_of(x)
        visible = self.visible_units(mask, keep_ids, check_ids, layout=layout)
        if visible is None:
            check_mask_ratio(mask_ratio, layout.windows)
            visible = self.random_visible(x, mask_ratio)
        elif visible.windows.shape[1] == layout.windows:
            raise UsageError("the mask deletes no unit", "mask at least one")
        _, ends = self.encode(x, visible, collect=True)
        return self.fuse(ends), visible

    def fuse(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the normalised sum of all stages at the last resolution. -> [b, k, u, c]"""
        # The resolution is constant after the last pool; of those stages only the last one counts.
        maps = self.stage_maps(ends[: self.q_pool], masked=True)
        units = self.layout.unit_after(self.q_pool)
        fused = ends[-1].unflatten(1, (-1, math.prod(units)))
        for head, stage_map in zip(self.multi_scale_fusion_heads, maps, strict=False):
            fused = fused + self._fuse(head, stage_map)
        latent: torch.Tensor = self.encoder_norm(fused)
        return latent

    def embedding(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the input of the decoder, averaged over tokens. -> [b, c]"""
        return self.fuse(ends).flatten(1, 2).mean(1)

    def forward_decoder(
        self, latent: torch.Tensor, visible: VisibleUnits, deleted: DeletedTokens | None = None
    ) -> torch.Tensor:
        """Return predictions in grid order: for the deleted tokens [b, m, p], or, if `deleted` is
        None, for all tokens [b, n, p].

        Args:
            latent: Tokens of the visible units, [b, k, u, c].
            visible: Which units these are.
            deleted: The tokens to predict.
        """
        (batch, _, u, _), layout = latent.shape, visible.layout
        x = cpu.linear(self.decoder_embed, latent)
        # Mask tokens everywhere, then the visible tokens at their positions. -> b w u c
        full = self.mask_token.to(x.dtype).expand(batch, layout.windows, u, -1)
        index = visible.windows[:, :, None, None].expand(-1, -1, u, x.shape[-1])
        x = full.scatter(1, index, x).flatten(1, 2)
        # Attention is global, so the tokens stay window-major and the embedding is permuted.
        x = x + layout.to_windows(self._decoder_position(layout), self.q_pool)
        x = self.run_blocks(self.decoder_blocks, x, windowed=False)
        if deleted is None:
            x = layout.to_grid(x, self.q_pool).flatten(1, -2)
        else:
            x = gather_rows(x, deleted.positions)
        return cpu.linear(self.decoder_pred, self.decoder_norm(x))

    def decode_all(
        self, x: torch.Tensor, *, keep_ids: torch.Tensor, check_ids: bool = True
    ) -> torch.Tensor:
        """Return predictions for all tokens, visible or not, in grid order. -> [b, n, p]

        Arguments and errors are those of `forward`.
        """
        latent, visible = self.forward_encoder(x, keep_ids=keep_ids, check_ids=check_ids)
        return self.forward_decoder(latent, visible)

    def deleted_tokens(self, visible: VisibleUnits) -> DeletedTokens:
        """Return the tokens of the masked units, in grid order."""
        kept, layout = visible.windows.shape[1], visible.layout
        seen = torch.zeros_like(visible.mask, dtype=torch.uint8).scatter(1, visible.windows, 1)
        # The stable sort puts the masked windows first, in ascending order. -> b (w - k)
        windows = seen.argsort(dim=1, stable=True)[:, : layout.windows - kept]
        cells = layout.cell_of_token(self.q_pool, windows.device)  # w u
        u = cells.shape[1]
        positions = windows[..., None] * u + torch.arange(u, device=windows.device)
        cells, order = cells[windows].flatten(1).sort(dim=1)
        return DeletedTokens(cells, positions.flatten(1).gather(1, order))

    # Labels -----------------------------------------------------------------------------------

    def pixel_labels(self, x: torch.Tensor) -> torch.Tensor:
        """Cut the input into the patches that are predicted. [b, chans, *size] -> [b, n, p]

        For video, only the first frame of each token is kept, and a patch is flattened as
        (y, x, channel); for images as (channel, y, x). The released weights were trained this way.
        """
        size, dims = self.pred_stride, len(self._config.input_size)
        if dims == 3:
            x = x[:, :, :: self._config.patch_stride[0]]
        for dim in range(2 + max(0, dims - 2), 2 + dims):
            x = x.unfold(dim, size, size)
        # b c *grid *patch -> b *grid c *patch, or b *grid *patch c
        x = x.movedim(1, -1 if dims == 3 else 1 + dims)
        return x.flatten(1, dims).flatten(2)

    def pixels_of(
        self, patches: torch.Tensor, *, size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the inverse of `pixel_labels`. [b, n, p] -> [b, chans, *size]

        `size` is the size of the inputs, if it is not the `input_size` of the model.

        For video, these are the predicted frames, one for each step of the token grid
        in time.
        """
        dims = len(self._config.input_size)
        patch = (self.pred_stride,) * min(2, dims)
        layout = self._config.layout_of(size or self._config.input_size)
        x = patches.unflatten(1, layout.grid_after(self.q_pool))
        if dims == 3:
            x = x.unflatten(-1, (*patch, -1)).movedim(-1, 1)
        else:
            x = x.unflatten(-1, (-1, *patch)).movedim(1 + dims, 1)
        # b c [t] gy gx y x -> b c [t] (gy y) (gx x)
        lead = x.dim() - 2 * len(patch)
        grid_axes = range(lead, lead + len(patch))
        x = x.permute(*range(lead), *(axis for g in grid_axes for axis in (g, g + len(patch))))
        for dim in range(lead, lead + len(patch)):
            x = x.flatten(dim, dim + 1)
        return x

    def get_pixel_label_2d(
        self, input_img: torch.Tensor, mask: torch.Tensor, norm: bool = True
    ) -> torch.Tensor:
        """Return labels of masked tokens. [b, 3, y, x] -> [m, p]

        In this function of the reference, True in `mask` [b, n] means masked.
        """
        labels = self.pixel_labels(input_img)[mask]
        return normalise_patches(labels) if norm else labels

    def get_pixel_label_3d(
        self, input_vid: torch.Tensor, mask: torch.Tensor, norm: bool = True
    ) -> torch.Tensor:
        """Return labels of masked tokens of clips. [b, 3, t, y, x] -> [m, p]"""
        return self.get_pixel_label_2d(input_vid, mask, norm)

    # Parts ------------------------------------------------------------------------------------

    def _decoder_position(self, layout: TokenLayout) -> torch.Tensor:
        """Return the decoder's position embedding in grid order, [1, n, c].

        For inputs that are not of the model's `input_size`, it is interpolated as a whole, because
        the decoder attends globally.
        """
        embed = self.decoder_pos_embed
        old, new = (each.grid_after(self.q_pool) for each in (self.layout, layout))
        if old == new:
            return embed
        return self._cache.position(("decoder", new), [embed], lambda: resize(embed, old, new))

    def _fusion_head(self, stage: int, dim: int) -> nn.Module:
        """Return a convolution from a stage's resolution to the last one, within a mask unit."""
        last = self.layout.unit_after(self.q_pool)
        here = self.layout.unit_after(stage)
        kernel = tuple(a // b for a, b in zip(here, last, strict=True))
        width = [spec.dim_out for spec in self.block_specs if spec.stage == stage][-1]
        return conv_nd(len(kernel))(width, dim, kernel_size=kernel, stride=kernel)

    def _fuse(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """b k *unit c -> b k u c, with u in the window-major order of the last stage."""
        batch, kept = x.shape[:2]
        x = head(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1)  # (b k) *unit c
        x = x.unflatten(0, (batch, kept))
        return self.layout.from_units(x, self.q_pool)

    def init_weights(self) -> None:
        """Initialise as MAE does; on the meta device, values come from a checkpoint."""
        if not self.patch_embed.proj.weight.is_meta:
            init_autoencoder(self, (*self._embeddings, "mask_token", "decoder_pos_embed"))


def reconstruction_error(preds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each pixel; its mean is the loss. [..., p] -> [..., p]"""
    return (preds - labels).square()


def normalise_patches(patches: torch.Tensor) -> torch.Tensor:
    """Scale each patch to mean 0 and (unbiased) variance 1, with eps 1e-6. [..., p] -> [..., p]"""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of each patch. [..., p] -> two of [..., 1]"""
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return mean, (var + 1.0e-6) ** 0.5


MaskedAutoencoderHiera.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    AutoencoderConfig
)
