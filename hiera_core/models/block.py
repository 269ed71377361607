"""The block of all Hieras: attention and MLP, each with a residual connection.

Tokens are in window-major order, see token_layout.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from . import cpu
from .attention import MaskUnitAttention, pool_both, pool_tokens
from .config import BlockSpec, HieraConfig
from .encoder import NormLayer
from .layers import DropPath, Mlp, layer_scale
from .probes import known_forward


@known_forward
class HieraBlock(nn.Module):
    """Attention (which may pool and widen) and MLP, each with a residual connection.

    Args:
        dim, dim_out, heads, q_stride, window_size, use_mask_unit_attn: As for `MaskUnitAttention`.
        mlp_ratio: Hidden width of the MLP relative to `dim_out`.
        drop_path: Probability of dropping a residual branch in training.
        norm_layer: Function that builds a norm for a number of channels.
        act_layer: Function that builds the activation.
        init_values, use_expand_proj: As for `HieraConfig`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
        init_values: float | None = None,
        use_expand_proj: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.dim_out = dim, dim_out
        self.norm1 = norm_layer(dim)
        self.attn = MaskUnitAttention(
            dim, dim_out, heads, q_stride, window_size, use_mask_unit_attn
        )
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), act_layer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ls1 = layer_scale(dim_out, init_values)
        self.ls2 = layer_scale(dim_out, init_values)
        self.has_proj = dim != dim_out and use_expand_proj
        if self.has_proj:
            self.proj = nn.Linear(dim, dim_out)

    @classmethod
    def from_spec(cls, spec: BlockSpec, config: HieraConfig, norm_layer: NormLayer) -> HieraBlock:
        return cls(
            spec.dim,
            spec.dim_out,
            spec.heads,
            config.mlp_ratio,
            spec.drop_path,
            norm_layer,
            q_stride=spec.q_stride,
            window_size=spec.window_size,
            use_mask_unit_attn=spec.use_mask_unit_attn,
            init_values=config.init_values,
            use_expand_proj=config.use_expand_proj,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, dim] -> [b, n / q_stride, dim_out], window-major."""
        x_norm = self.norm1(x)
        x = self.shortcut(x, x_norm) + self.drop(self.ls1(self.attn(x_norm)), 0)
        out: torch.Tensor = x + self.drop(self.ls2(self.mlp(self.norm2(x))), 1)
        return out

    def drop(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        """Apply stochastic depth to the output of the attention (branch 0) or of the MLP (1)."""
        module = self.drop_path
        out: torch.Tensor = module(x, branch) if isinstance(module, DropPath) else module(x)
        return out

    def shortcut(self, x: torch.Tensor, x_norm: torch.Tensor) -> torch.Tensor:
        """Return the residual, widened and pooled like the output of the attention.

        It is widened from the normalised input, as in the released models. Without a projection, it
        is widened from the input itself.
        """
        if self.dim != self.dim_out and not self.has_proj:
            return pool_both(x, self.attn.q_stride, self.attn.window_size)
        if self.has_proj and self.attn.q_stride == 1:
            # The compiler fails if it sees a sum whose first term is the kernel of `cpu.linear`.
            x = self.proj(x_norm)
        elif self.has_proj:
            x = cpu.linear(self.proj, x_norm)
        if self.attn.q_stride > 1:
            x = pool_tokens(x, self.attn.q_stride, self.attn.window_size)
        return x
