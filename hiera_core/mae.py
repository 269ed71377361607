"""The masked autoencoder (He et al. 2021; section 4 of Ryali et al. 2023): encoder, decoder, loss.

Letters in shape comments: b batch, w windows (mask units), k kept windows, u tokens of a window at
the encoder's last resolution, m deleted tokens, n = w u tokens, c channels, p pixels of a patch.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from .config import AutoencoderConfig, HieraConfig
from .errors import UsageError
from .kernels import Linear
from .layers import conv_nd
from .model import HieraBlock, HieraEncoder, Visible


class DeletedTokens(NamedTuple):
    """Tokens of masked units: their cells of the grid and places in the window-major sequence."""

    cells: torch.Tensor  # [b, m], ascending
    places: torch.Tensor  # [b, m], the same tokens


class MaskedAutoencoderHiera(HieraEncoder):
    """Hiera as a masked autoencoder: sees some mask units, predicts the pixels of the others.

    Arguments: see `AutoencoderConfig`. Multi-scale fusion brings every stage to the last
    resolution; the decoder is a plain transformer over all tokens.
    """

    config_class: ClassVar[type[HieraConfig]] = AutoencoderConfig
    _config: AutoencoderConfig

    def __init__(self, *args: Any, config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        cfg, layout = self._config, self.layout
        dim, dec = self.rows[-1].dim_out, cfg.decoder_embed_dim
        self.encoder_norm = self.norm_layer(dim)
        self.multi_scale_fusion_heads = nn.ModuleList(
            self._fusion_head(stage, dim) for stage in range(cfg.q_pool)
        )
        self.multi_scale_fusion_heads.append(nn.Identity())  # the last stage needs none

        tokens = math.prod(layout.grid_after(cfg.q_pool))
        self.decoder_embed = Linear(dim, dec)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, dec))
        self.decoder_blocks = nn.ModuleList(
            HieraBlock(dec, dec, cfg.decoder_num_heads, cfg.mlp_ratio, norm_layer=self.norm_layer)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = self.norm_layer(dec)
        # Side of a predicted patch in pixels; square, as the released models are.
        self.pred_stride = cfg.patch_stride[-1] * cfg.q_stride[-1] ** cfg.q_pool
        patch_dims = min(2, len(cfg.q_stride))  # video predicts one frame a token
        self.decoder_pred = Linear(dec, self.pred_stride**patch_dims * cfg.in_chans)
        self.init_weights()

    def forward(
        self, x: torch.Tensor, mask_ratio: float = 0.6, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, encode, decode, compare.

        Args:
            x: [b, chans, *size], normalised as in the model's preprocessing.
            mask_ratio: share of mask units deleted, in (0, 1); callers use 0.9 for video.
            mask: [b, mask units] bool, True = visible, in place of a random one; or [b, k] int64,
                the numbers of the visible units (compiles without a graph break).

        Returns:
            loss: mean squared error over deleted tokens, a scalar.
            preds, labels: [b * m, p] for deleted tokens, in grid order. p runs over (channel, y, x)
                for images and (y, x, channel) for video: a quirk of the released weights.
            mask: [b, mask units] bool, True = visible.

        Raises:
            UsageError: the ratio leaves no visible or no masked unit, or shapes do not fit.
        """
        latent, visible = self.forward_encoder(x, mask_ratio, mask)
        deleted = self.deleted_tokens(visible)
        preds = self.forward_decoder(latent, visible, deleted).flatten(0, 1)
        labels = self.pixel_labels(x)
        labels = gather_rows(labels, deleted.cells).flatten(0, 1)
        labels = normalise_patches(labels)
        return (preds - labels).square().mean(), preds, labels, visible.mask

    def forward_encoder(
        self, x: torch.Tensor, mask_ratio: float = 0.6, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Visible]:
        """[b, chans, *size] -> fused, normalised tokens of the visible units [b, k, u, c]."""
        if mask is None:
            check_mask_ratio(mask_ratio, self.layout.windows)
            visible = self.random_visible(x, mask_ratio)
        else:
            visible = self.visible_from_mask(mask)
            if visible.keep.shape[1] == self.layout.windows:
                raise UsageError("the mask deletes no unit", "mask at least one")
        _, ends = self.encode(x, visible, collect=True)
        return self.fuse(ends), visible

    def fuse(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """All stages at the last resolution, added up and normalised. -> [b, k, u, c]"""
        # Resolution is constant after the last pool: of those stages only the final one counts.
        maps = self.stage_maps(ends[: self.q_pool], masked=True)
        units = self.layout.unit_after(self.q_pool)
        fused = ends[-1].unflatten(1, (-1, math.prod(units)))
        for head, stage_map in zip(self.multi_scale_fusion_heads, maps, strict=False):
            fused = fused + self._fuse(head, stage_map)
        return self.encoder_norm(fused)

    def embedding(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """What the decoder sees, averaged over tokens. -> [b, c]"""
        return self.fuse(ends).flatten(1, 2).mean(1)

    def forward_decoder(
        self, latent: torch.Tensor, visible: Visible, deleted: DeletedTokens | None = None
    ) -> torch.Tensor:
        """Visible tokens [b, k, u, c] to predictions in grid order: for the deleted tokens
        [b, m, p], or for all of them [b, n, p]."""
        batch, _, u, _ = latent.shape
        x = self.decoder_embed(latent)
        # Mask tokens everywhere, then the visible ones in their places. -> b w u c
        full = self.mask_token.to(x.dtype).expand(batch, self.layout.windows, u, -1)
        index = visible.keep[:, :, None, None].expand(-1, -1, u, x.shape[-1])
        x = full.scatter(1, index, x).flatten(1, 2)
        # Attention is global: the tokens stay window-major and their positions are permuted.
        x = x + self.layout.to_windows(self.decoder_pos_embed, self.q_pool)
        for block in self.decoder_blocks:
            x = block(x)
        if deleted is None:
            x = self.layout.to_grid(x, self.q_pool).flatten(1, -2)
        else:
            x = gather_rows(x, deleted.places)
        return self.decoder_pred(self.decoder_norm(x))

    def deleted_tokens(self, visible: Visible) -> DeletedTokens:
        """Where the tokens of masked units lie, in grid order."""
        kept = visible.keep.shape[1]
        seen = torch.zeros_like(visible.mask, dtype=torch.uint8).scatter(1, visible.keep, 1)
        # The stable sort puts the unseen windows first, in ascending order. -> b (w - k)
        windows = seen.argsort(dim=1, stable=True)[:, : self.layout.windows - kept]
        cells = self.layout.cell_of_token(self.q_pool, windows.device)  # w u
        u = cells.shape[1]
        places = windows[..., None] * u + torch.arange(u, device=windows.device)
        cells, order = cells[windows].flatten(1).sort(dim=1)
        return DeletedTokens(cells, places.flatten(1).gather(1, order))

    # Labels -----------------------------------------------------------------------------------

    def pixel_labels(self, x: torch.Tensor) -> torch.Tensor:
        """Cut the input into the patches that are predicted. [b, chans, *size] -> [b, n, p]

        Video keeps the first frame of each token only, and flattens a patch as (y, x, channel);
        images as (channel, y, x). The released weights were trained so.
        """
        size, dims = self.pred_stride, len(self._config.input_size)
        if dims == 3:
            x = x[:, :, :: self._config.patch_stride[0]]
        for dim in range(2 + max(0, dims - 2), 2 + dims):
            x = x.unfold(dim, size, size)
        # b c *grid *patch -> b *grid c *patch, or b *grid *patch c
        x = x.movedim(1, -1 if dims == 3 else 1 + dims)
        return x.flatten(1, dims).flatten(2)

    def pixels_of(self, patches: torch.Tensor) -> torch.Tensor:
        """The inverse of `pixel_labels`. [b, n, p] -> [b, chans, *size]; of video the frames that
        are predicted, one a token."""
        size, dims = self.pred_stride, len(self._config.input_size)
        patch = (size,) * min(2, dims)
        x = patches.unflatten(1, self.layout.grid_after(self.q_pool))
        if dims == 3:
            x = x.unflatten(-1, (*patch, -1)).movedim(-1, 1)
        else:
            x = x.unflatten(-1, (-1, *patch)).movedim(1 + dims, 1)
        # b c [t] gy gx y x -> b c [t] (gy y) (gx x)
        lead = x.dim() - 2 * len(patch)
        places = range(lead, lead + len(patch))
        x = x.permute(*range(lead), *(axis for g in places for axis in (g, g + len(patch))))
        for dim in range(lead, lead + len(patch)):
            x = x.flatten(dim, dim + 1)
        return x

    def get_pixel_label_2d(
        self, input_img: torch.Tensor, mask: torch.Tensor, norm: bool = True
    ) -> torch.Tensor:
        """Labels of masked tokens, [b, 3, y, x] -> [m, p]. Here True in `mask` [b, n] = masked."""
        labels = self.pixel_labels(input_img)[mask]
        return normalise_patches(labels) if norm else labels

    def get_pixel_label_3d(
        self, input_vid: torch.Tensor, mask: torch.Tensor, norm: bool = True
    ) -> torch.Tensor:
        """The same for clips, [b, 3, t, y, x] -> [m, p]."""
        return self.get_pixel_label_2d(input_vid, mask, norm)

    # Parts ------------------------------------------------------------------------------------

    def _fusion_head(self, stage: int, dim: int) -> nn.Module:
        """A convolution from a stage's resolution to the last one, within a mask unit."""
        last = self.layout.unit_after(self.q_pool)
        here = self.layout.unit_after(stage)
        kernel = tuple(a // b for a, b in zip(here, last, strict=True))
        width = [row.dim_out for row in self.rows if row.stage == stage][-1]
        return conv_nd(len(kernel))(width, dim, kernel_size=kernel, stride=kernel)

    def _fuse(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """b k *unit c -> b k u c, u in window-major order as the last stage has it."""
        batch, kept = x.shape[:2]
        x = head(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1)  # (b k) *unit c
        x = x.unflatten(0, (batch, kept))
        return self.layout.from_units(x, self.q_pool)

    def init_weights(self) -> None:
        """MAE's: Xavier for Linear and the flattened patch embedding, biases 0, norms 1 and 0."""
        if self.patch_embed.proj.weight.is_meta:
            return  # values come from a checkpoint
        for name in (*self.no_weight_decay(), "mask_token", "decoder_pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        self.apply(_init_module)
        nn.init.xavier_uniform_(self.get_parameter("patch_embed.proj.weight").data.flatten(1))


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """b n c, b m -> b m c"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def normalise_patches(patches: torch.Tensor) -> torch.Tensor:
    """Each patch to mean 0 and (unbiased) variance 1, eps 1e-6. [..., p] -> [..., p]"""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that `normalise_patches` divides by. [..., p] -> 2 x [..., 1]"""
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return mean, (var + 1.0e-6) ** 0.5


def check_mask_ratio(mask_ratio: float, windows: int) -> None:
    """Raise UsageError unless the ratio leaves visible and masked units, of so many."""
    if not 0.0 < mask_ratio < 1.0:  # also false for nan
        raise UsageError(f"mask ratio {mask_ratio} is outside (0, 1)", "use 0.6, or 0.9 for video")
    kept = int(windows * (1 - mask_ratio))
    if kept in (0, windows):
        what = "visible" if kept == 0 else "masked"
        raise UsageError(
            f"mask ratio {mask_ratio} leaves no {what} unit of {windows}",
            "choose one nearer 0.5",
        )


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0)
        nn.init.constant_(module.weight, 1.0)


MaskedAutoencoderHiera.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    AutoencoderConfig
)
