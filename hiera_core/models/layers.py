"""The layers that do not depend on token order: patch embedding, MLP, stochastic depth, head; and
their initialisation, as the reference does it: the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    """Stochastic depth (Huang et al. 2016): in training, drop a residual branch per sample.

    Attributes:
        factors: What each sample of the next batch is multiplied by, 0 or 1 / (1 - drop_prob), for
            each of the block's two branches, [2, b]. None: it is drawn from torch's generator. A
            trainer sets it, so that what a sample gets does not depend on its process.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.factors: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, branch: int = 0) -> torch.Tensor:
        """[b, ...] -> [b, ...], for the block's attention (branch 0) or MLP (1)."""
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        # Blocks with another probability could not share a compiled program that reads it.
        if self.factors is not None:
            return x * self.factors[branch].to(x.dtype).view(shape)
        if self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Dropout(nn.Dropout):
    """Dropout of vectors [b, c].

    Attributes:
        factors: What the next batch is multiplied by, [b, c]; see `DropPath`.
    """

    factors: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, c] -> [b, c]"""
        if not self.training or self.factors is None:
            return super().forward(x)
        return x * self.factors.to(x.dtype)


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
        self.dropout = Dropout(dropout_rate) if dropout_rate > 0 else nn.Identity()
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


# Initialisation ----------------------------------------------------------------------------------


def init_classifier(model: nn.Module, embeddings: Iterable[str], head_scale: float) -> None:
    """Initialise an encoder with its head.

    Args:
        model: The model.
        embeddings: Names of the position embeddings.
        head_scale: Factor for the new weights of the head.
    """
    for name in embeddings:
        nn.init.trunc_normal_(model.get_parameter(name), std=0.02)
    model.apply(init_layer)
    scale_head(model.get_submodule("head"), head_scale)


def init_head(head: nn.Module, head_scale: float) -> None:
    """Initialise a head alone."""
    head.apply(init_layer)
    scale_head(head, head_scale)


@torch.no_grad()
def scale_head(head: nn.Module, factor: float) -> None:
    """Scale the weights of a head, so that a new classifier starts with nearly equal logits."""
    for parameter in head.parameters():
        parameter.mul_(factor)


def init_autoencoder(model: nn.Module, embeddings: Iterable[str]) -> None:
    """Initialise an autoencoder, as MAE does.

    Weights of Linear layers and of the flattened patch embedding are Xavier uniform, biases are 0,
    and weights of norms are 1.

    Args:
        model: The model.
        embeddings: Names of the position embeddings and of the mask token.
    """
    for name in embeddings:
        nn.init.trunc_normal_(model.get_parameter(name), std=0.02)
    model.apply(_init_autoencoder_layer)
    nn.init.xavier_uniform_(model.get_parameter("patch_embed.proj.weight").data.flatten(1))


def init_layer(module: nn.Module) -> None:
    """Draw weights from a truncated normal (std 0.02). As in the reference, biases of Linear and
    norm layers become 0.02."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, 0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0.02)
        nn.init.constant_(module.weight, 1.0)


def _init_autoencoder_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0)
        nn.init.constant_(module.weight, 1.0)
