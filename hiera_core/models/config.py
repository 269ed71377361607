"""Checked constructor arguments of the models, and the specification of every block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypedDict

import torch
from torch import nn

from ..errors import ConfigError, did_you_mean
from .sizes import legal_sizes
from .token_layout import TokenLayout

# Least and largest value of each argument that is a number of something. A config.json of a few
# bytes could otherwise take any amount of time and memory. Real models are far below the limits.
COUNTS = {
    "in_chans": (1, 1 << 14),
    "embed_dim": (1, 1 << 14),
    "num_heads": (1, 1 << 14),
    "num_classes": (0, 1_000_000),
    "q_pool": (0, 100),
    "decoder_embed_dim": (1, 1 << 14),
    "decoder_depth": (0, 1000),
    "decoder_num_heads": (1, 1 << 14),
}
MAX_SIZE = 1 << 24  # of one dimension
MAX_TOKENS = 1 << 22
MAX_STAGES = 100
MAX_BLOCKS = 1000
MAX_FACTOR = 1000.0
MAX_CHANNELS = 1 << 20  # of any stage or MLP
COUNTS_BY_DIMENSION = {
    "input_size": 1,
    "stages": 0,
    "q_stride": 1,
    "mask_unit_size": 1,
    "patch_kernel": 1,
    "patch_stride": 1,
    "patch_padding": 0,
    "global_pos_size": 1,
}
FRACTIONS = ("drop_path_rate", "head_dropout")
NORM_LAYERS = (
    "LayerNorm",
    "RMSNorm",
    "Identity",
)  # classes of torch.nn that see one token at a time


@dataclass(frozen=True)
class BlockSpec:
    """Arguments of one transformer block."""

    stage: int  # counted from 0
    dim: int
    dim_out: int
    heads: int
    q_stride: int  # queries pooled into one; 1 = no pooling
    window_size: int  # tokens of a mask unit after the block's pooling
    use_mask_unit_attn: bool
    drop_path: float  # probability; grows linearly with depth


@dataclass(frozen=True)
class HieraConfig:
    """Constructor arguments of `Hiera`, with the reference's names and defaults (base, 224x224).

    Sizes have one number for each dimension: pixels (or frames, or samples), or tokens.

    Raises:
        ConfigError: The arguments contradict each other, or the input size is not legal; the hint
            names the nearest legal sizes.
    """

    input_size: tuple[int, ...] = (224, 224)
    in_chans: int = 3
    embed_dim: int = 96  # channels of the first stage
    num_heads: int = 1  # heads of the first stage
    num_classes: int = 1000  # 0: no head, the model returns pooled features
    stages: tuple[int, ...] = (2, 3, 16, 3)  # blocks in each stage
    q_pool: int = 3  # number of stage transitions that pool
    q_stride: tuple[int, ...] = (2, 2)
    mask_unit_size: tuple[int, ...] = (8, 8)  # tokens of the first stage
    mask_unit_attn: tuple[bool, ...] = (True, True, False, False)  # for each stage
    dim_mul: float = 2.0
    head_mul: float = 2.0
    patch_kernel: tuple[int, ...] = (7, 7)
    patch_stride: tuple[int, ...] = (4, 4)
    patch_padding: tuple[int, ...] = (3, 3)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    # The name of a norm in torch.nn (built with eps 1e-6), or a class.
    norm_layer: str | Callable[[int], nn.Module] = "LayerNorm"
    head_dropout: float = 0.0
    head_init_scale: float = 0.001
    sep_pos_embed: bool = False  # separate embeddings for space and time (video)
    # Position embedding as a global map plus the tiled pattern of a window (arXiv 2311.05613). The
    # names are timm's; the reference does not have this form.
    abs_win_pos_embed: bool = False
    global_pos_size: tuple[int, ...] = (14, 14)  # cells of the map
    # Initial layer scale, a factor for each channel of every residual branch; None for no scale.
    # With `use_expand_proj` False, blocks that widen concatenate a maximum and a mean of the tokens
    # that they pool, in place of a projection. Both are timm's names, and not in the reference.
    init_values: float | None = None
    use_expand_proj: bool = True
    # Whether a call may have inputs of any legal size, not only of `input_size`. Absolute-window
    # models take them in any case. This is not in the reference.
    dynamic_size: bool = False

    # Order of positional arguments. Empty: the order of the fields.
    positional: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_arguments(
        cls,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the configuration of a constructor call.

        As in the reference, `config` takes precedence over the other arguments.

        Raises:
            TypeError: An argument is unknown or given twice, or there are too many.
            ConfigError: See the class.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        order = cls.positional or tuple(fields)
        if len(args) > len(order):
            raise TypeError(f"at most {len(order)} positional arguments, got {len(args)}")
        given = dict(zip(order, args, strict=False))
        for name in kwargs:
            if name in given:
                raise TypeError(f"argument {name!r} is given twice")
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise TypeError(f"unknown argument {name!r}" + (f"; {hint}" if hint else ""))
        return cls(**{**given, **kwargs, **(config or {})})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON or YAML
                object.__setattr__(self, field.name, tuple(value))
        if not isinstance(self.input_size, tuple):
            raise ConfigError(
                f"input_size {self.input_size!r} is no sequence",
                "give the size of every dimension, such as (224, 224) or (16, 224, 224)",
            )
        self._check_numbers()
        self._check_norm()
        self._check_dimensions()
        self._check_input_size()
        self._check_stages()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens along each dimension after the patch embedding."""
        return self.tokens_of(self.input_size)

    @property
    def layout(self) -> TokenLayout:
        """Token order of the model."""
        return self.layout_of(self.input_size)

    @property
    def size_multiple(self) -> tuple[int, ...]:
        """Number of pixels (or frames), along each dimension, of which sizes must be a multiple."""
        levels = len(self.stages) - 1
        units = zip(self.q_stride, self.mask_unit_size, self.patch_stride, strict=True)
        return tuple(math.lcm(stride**levels, unit) * patch for stride, unit, patch in units)

    @property
    def takes_any_size(self) -> bool:
        """Whether a call may have inputs of any legal size."""
        return self.dynamic_size or self.abs_win_pos_embed

    def tokens_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tokens along each dimension for inputs of a legal size."""
        return tuple(i // s for i, s in zip(size, self.patch_stride, strict=True))

    def layout_of(self, size: Sequence[int]) -> TokenLayout:
        """Return the token order for inputs of a legal size."""
        levels, tokens = len(self.stages) - 1, self.tokens_of(size)
        return TokenLayout(tokens, self.mask_unit_size, self.q_stride, levels, self.q_pool)

    def block_specs(self) -> list[BlockSpec]:
        """Return the specification of every block.

        In every stage but the first, the first block widens the channels; in the first `q_pool` of
        these stages, it also pools. It still attends like the stage before it, so that global
        attention only ever sees pooled tokens.
        """
        # These are plain numbers, so they stay on the CPU when the model is built on "meta".
        rates = torch.linspace(0, self.drop_path_rate, sum(self.stages), device="cpu").tolist()
        specs: list[BlockSpec] = []
        dim, heads, window = self.embed_dim, self.num_heads, math.prod(self.mask_unit_size)
        for stage, depth in enumerate(self.stages):
            for block in range(depth):
                first = stage > 0 and block == 0
                pooled = first and stage <= self.q_pool
                q_stride = math.prod(self.q_stride) if pooled else 1
                dim_out = int(dim * self.dim_mul) if first else dim
                heads = int(heads * self.head_mul) if first else heads
                window //= q_stride
                windowed = self.mask_unit_attn[stage - 1 if first else stage]
                rate = rates[len(specs)]
                specs.append(
                    BlockSpec(stage, dim, dim_out, heads, q_stride, window, windowed, rate)
                )
                dim = dim_out
        return specs

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json. A norm given as a class is left out, because JSON
        cannot represent it."""
        values = dataclasses.asdict(self)
        if not self.abs_win_pos_embed:  # the reference fails on an argument that it does not know
            del values["abs_win_pos_embed"], values["global_pos_size"]
        for name in ("init_values", "use_expand_proj", "dynamic_size"):
            if values[name] == getattr(HieraConfig, name):
                del values[name]
        if not isinstance(self.norm_layer, str):
            del values["norm_layer"]
        return values

    # Checks -----------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        """Check the type and the range of each number, before any of them is used."""
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name, least)  # the decoder's are those of an autoencoder
            if not _is_int(value, least):
                raise ConfigError(f"{name} is {value!r}", f"give an integer of at least {least}")
            if value > most:
                raise ConfigError(f"{name} is {value}", f"give an integer of at most {most}")
        for name, least in COUNTS_BY_DIMENSION.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(_is_int(n, least) for n in value):
                raise ConfigError(f"{name} is {value!r}", f"give integers of at least {least}")
            if max(value, default=0) > MAX_SIZE:
                raise ConfigError(f"{name} is {value}", f"give integers of at most {MAX_SIZE}")
        for name in FRACTIONS:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigError(f"{name} is {value!r}", "give a number from 0 to below 1")
        for name in ("dim_mul", "head_mul", "mlp_ratio"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"{name} is {value!r}", "give a number above 0")
            if value > MAX_FACTOR:
                raise ConfigError(f"{name} is {value}", f"give at most {MAX_FACTOR:.0f}")
        scale = self.init_values
        if scale is not None and not (isinstance(scale, int | float) and abs(scale) < math.inf):
            raise ConfigError(f"init_values is {scale!r}", "give a finite number, or None")
        if not self.use_expand_proj and self.dim_mul != 2:
            raise ConfigError(
                f"use_expand_proj is False, and dim_mul is {self.dim_mul}",
                "without a projection, the channels are doubled: use dim_mul = 2",
            )
        if len(self.stages) > MAX_STAGES or sum(self.stages) > MAX_BLOCKS:
            raise ConfigError(
                f"there are {len(self.stages)} stages with {sum(self.stages)} blocks",
                f"use at most {MAX_STAGES} stages and {MAX_BLOCKS} blocks",
            )

    def _check_norm(self) -> None:
        """Check that a norm given by its name can be built."""
        norm = self.norm_layer
        if callable(norm):
            return
        if norm not in NORM_LAYERS:
            hint = did_you_mean(str(norm), NORM_LAYERS) or f"use {' or '.join(NORM_LAYERS)}"
            raise ConfigError(f"unknown norm_layer {norm!r}", f"{hint}; or give a class")

    def _check_dimensions(self) -> None:
        dims = len(self.input_size)
        if dims not in (1, 2, 3):
            raise ConfigError(f"input_size {self.input_size} has {dims} dimensions", "use 1 to 3")
        for name in ("q_stride", "mask_unit_size", "patch_kernel", "patch_stride", "patch_padding"):
            value = getattr(self, name)
            if len(value) != dims:
                raise ConfigError(
                    f"{name} {value} has {len(value)} dimensions where input_size "
                    f"{self.input_size} has {dims}",
                    f"give {name} {dims} numbers",
                )
        if self.sep_pos_embed and dims != 3:
            raise ConfigError("sep_pos_embed is for video", "give input_size as (frames, y, x)")
        if not isinstance(self.dynamic_size, bool):
            raise ConfigError(f"dynamic_size is {self.dynamic_size!r}", "give True or False")
        if self.abs_win_pos_embed and (dims != 2 or len(self.global_pos_size) != 2):
            raise ConfigError("abs_win_pos_embed is for images", "give both sizes as (y, x)")

    def _check_input_size(self) -> None:
        """Check that sizes are multiples of patch stride x mask unit (32 pixels in the zoo)."""
        for dim, (size, step) in enumerate(zip(self.input_size, self.size_multiple, strict=True)):
            if size < 1 or size % step:
                raise ConfigError(
                    f"input_size {self.input_size}: {size} is not a multiple of {step} "
                    "(patch stride x mask unit)",
                    f"the nearest legal size is {legal_sizes.nearest(size, step)}",
                )
            kernel, pad = self.patch_kernel[dim], self.patch_padding[dim]
            tokens = (size + 2 * pad - kernel) // self.patch_stride[dim] + 1
            if tokens != self.tokens[dim]:
                raise ConfigError(
                    f"kernel {kernel}, stride {self.patch_stride[dim]} and padding {pad} turn "
                    f"{size} pixels into {tokens} tokens, not {self.tokens[dim]}",
                    "choose patch_padding so that tokens = size / stride",
                )

        if math.prod(self.tokens) > MAX_TOKENS:
            raise ConfigError(
                f"input_size {self.input_size} has {math.prod(self.tokens)} tokens",
                f"use at most {MAX_TOKENS}",
            )

    def _check_stages(self) -> None:
        stages = len(self.stages)
        if min(self.stages, default=0) < 1:
            raise ConfigError(
                f"stages {self.stages} has a stage without blocks",
                "give every stage at least one block",
            )
        if not 0 <= self.q_pool < stages:
            raise ConfigError(
                f"q_pool {self.q_pool} does not suit {stages} stages",
                f"use fewer pools, at most {stages - 1}",
            )
        if not isinstance(self.mask_unit_attn, tuple):
            raise ConfigError(
                f"mask_unit_attn is {self.mask_unit_attn!r}", "give True or False for each stage"
            )
        if len(self.mask_unit_attn) < stages:
            raise ConfigError(
                f"mask_unit_attn has {len(self.mask_unit_attn)} entries for {stages} stages",
                "give one for each stage",
            )
        for spec in self.block_specs():
            if min(spec.heads, spec.dim_out, int(spec.dim_out * self.mlp_ratio)) < 1:
                raise ConfigError(
                    f"stage {spec.stage} has {spec.heads} heads, {spec.dim_out} channels and an "
                    f"MLP of {int(spec.dim_out * self.mlp_ratio)}",
                    "use a larger dim_mul, head_mul or mlp_ratio",
                )
            if max(spec.dim_out, int(spec.dim_out * self.mlp_ratio)) > MAX_CHANNELS:
                raise ConfigError(
                    f"stage {spec.stage} has {spec.dim_out} channels and an MLP of "
                    f"{int(spec.dim_out * self.mlp_ratio)}",
                    f"use at most {MAX_CHANNELS}: a smaller embed_dim, dim_mul or mlp_ratio",
                )
            if spec.dim_out % spec.heads:
                raise ConfigError(
                    f"{spec.heads} heads do not divide {spec.dim_out} channels "
                    f"(stage {spec.stage})",
                    "change embed_dim or num_heads",
                )
            if spec.use_mask_unit_attn and spec.window_size == 0:
                raise ConfigError(
                    f"stage {spec.stage} attends within mask units of {self.mask_unit_size}, but "
                    "pooling has used them up",
                    "use larger mask units or global attention there",
                )


@dataclass(frozen=True)
class AutoencoderConfig(HieraConfig):
    """Constructor arguments of `MaskedAutoencoderHiera`.

    The paper's table gives 8 decoder heads for video. The released code, with which the weights
    were trained, has 16 everywhere. The shapes are equal, so a wrong value would load silently.
    """

    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    positional: ClassVar[tuple[str, ...]] = (
        "in_chans",
        "patch_stride",
        "mlp_ratio",
        "decoder_embed_dim",
        "decoder_depth",
        "decoder_num_heads",
        "norm_layer",
    )

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json. The usual norm is left out, because the reference's
        autoencoder does not accept a norm by name."""
        values = super().to_json()
        if values.get("norm_layer") == "LayerNorm":
            del values["norm_layer"]
        return values

    def _check_stages(self) -> None:
        super()._check_stages()
        if not self.layout.maskable:
            raise ConfigError(
                f"mask units of {self.mask_unit_size} tokens are not blocks that survive "
                f"{self.q_pool} pools of {self.q_stride}, so they cannot be masked",
                f"use mask_unit_size = q_stride ** k with {self.q_pool} <= k < stages",
            )
        patch = [p * q**self.q_pool for p, q in zip(self.patch_stride, self.q_stride, strict=True)]
        if len(patch) == 3 and self.q_stride[0] ** self.q_pool != 1:
            raise ConfigError(
                f"q_stride {self.q_stride} pools over time, and a token predicts one frame",
                "use q_stride = (1, y, x)",
            )
        if len(set(patch[-2:])) > 1:
            raise ConfigError(
                f"a token covers {patch[-2]} x {patch[-1]} pixels, but predictions are square",
                "use equal patch_stride and q_stride for y and x",
            )
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ConfigError(
                f"{self.decoder_num_heads} decoder heads do not divide {self.decoder_embed_dim} "
                "channels",
                "change decoder_embed_dim or decoder_num_heads",
            )


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class HieraArguments(TypedDict, total=False):
    """Keyword arguments of `Hiera`, for type checkers: the fields of `HieraConfig`."""

    input_size: tuple[int, ...]
    in_chans: int
    embed_dim: int
    num_heads: int
    num_classes: int
    stages: tuple[int, ...]
    q_pool: int
    q_stride: tuple[int, ...]
    mask_unit_size: tuple[int, ...]
    mask_unit_attn: tuple[bool, ...]
    dim_mul: float
    head_mul: float
    patch_kernel: tuple[int, ...]
    patch_stride: tuple[int, ...]
    patch_padding: tuple[int, ...]
    mlp_ratio: float
    drop_path_rate: float
    norm_layer: str | Callable[[int], nn.Module]
    head_dropout: float
    head_init_scale: float
    sep_pos_embed: bool
    abs_win_pos_embed: bool
    global_pos_size: tuple[int, ...]
    init_values: float | None
    use_expand_proj: bool
    dynamic_size: bool


class AutoencoderArguments(HieraArguments, total=False):
    """Keyword arguments of `MaskedAutoencoderHiera`: the fields of `AutoencoderConfig`."""

    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
