"""The layers that do not depend on token order: patch embedding, MLP, stochastic depth, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import cpu
from .probes import known_forward

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def conv_nd(dims: int) -> Callable[..., nn.Module]:
    """Return the convolution class for 1, 2 or 3 spatial dimensions."""
    return CONVOLUTIONS[dims - 1]


class PatchEmbed(nn.Module):
    """Overlapping patches to tokens by one convolution, in 1, 2 or 3 dimensions."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.spatial_dims = len(kernel)
        self.proj = conv_nd(len(kernel))(
            dim_in, dim_out, kernel_size=kernel, stride=stride, padding=padding
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[b, chans, *size] -> [b, tokens, dim_out] in grid order.

        `mask` is [b, 1, *unit grid], True = visible. Masked pixels are set to zero first, because
        kernels overlap and would leak them into visible tokens.
        """
        if mask is not None:
            x = x * F.interpolate(mask.to(x.dtype), size=x.shape[2:])
        tokens: torch.Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


@known_forward
class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]"""
        return cpu.mlp(self.fc1, self.act, self.fc2, x)


@known_forward
class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drop a residual branch per sample."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


@known_forward
class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]"""
        return x * self.gamma


def layer_scale(dim: int, init_value: float | None) -> nn.Module:
    """Return a `LayerScale`, or an identity if there is no initial value."""
    return nn.Identity() if init_value is None else LayerScale(dim, init_value)


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(dim=-1)


class Head(nn.Module):
    """Dropout and a linear classifier.

    The output is logits in training mode, and `act_func(logits)` in evaluation mode.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        dropout_rate: float = 0.0,
        act_func: Callable[[torch.Tensor], torch.Tensor] = _softmax,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate > 0 else nn.Identity()
        self.projection = nn.Linear(dim, num_classes)
        self.act_func = act_func

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits in either mode. [..., dim] -> [..., num_classes]"""
        logits: torch.Tensor = self.projection(self.dropout(x))
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., num_classes]."""
        logits = self.forward_logits(x)
        return logits if self.training else self.act_func(logits)
