"""A model's constructor arguments, checked, and the row of every block that follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import ConfigError, near
from .tokens import TokenLayout


@dataclass(frozen=True)
class BlockRow:
    """What one transformer block needs to know."""

    stage: int
    dim: int
    dim_out: int
    heads: int
    q_stride: int  # flat, 1 = no pooling
    window_size: int  # tokens of a mask unit after the block's pooling
    use_mask_unit_attn: bool


@dataclass(frozen=True)
class HieraConfig:
    """Constructor arguments of `Hiera`, by the reference's names and defaults (base, 224x224).

    Sizes are pixels (or frames, samples) and tokens, one number a spatial dimension.

    Raises:
        ConfigError: the arguments contradict each other, or the input size is not legal; the hint
            names the nearest legal sizes.
    """

    input_size: tuple[int, ...] = (224, 224)
    in_chans: int = 3
    embed_dim: int = 96  # channels of the first stage
    num_heads: int = 1  # heads of the first stage
    num_classes: int = 1000  # 0: no classifier, pooled features come out
    stages: tuple[int, ...] = (2, 3, 16, 3)  # blocks a stage
    q_pool: int = 3  # how many stage transitions pool
    q_stride: tuple[int, ...] = (2, 2)
    mask_unit_size: tuple[int, ...] = (8, 8)  # tokens of the first stage
    mask_unit_attn: tuple[bool, ...] = (True, True, False, False)  # by stage
    dim_mul: float = 2.0
    head_mul: float = 2.0
    patch_kernel: tuple[int, ...] = (7, 7)
    patch_stride: tuple[int, ...] = (4, 4)
    patch_padding: tuple[int, ...] = (3, 3)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    norm_layer: str | Callable[[int], Any] = "LayerNorm"  # a name in torch.nn (eps 1e-6) or a class
    head_dropout: float = 0.0
    head_init_scale: float = 0.001
    sep_pos_embed: bool = False  # space and time apart (video)
    # Position embedding as a global map plus a window's tiled pattern (arXiv 2311.05613); by timm's
    # names, the reference has none.
    abs_win_pos_embed: bool = False
    global_pos_size: tuple[int, ...] = (14, 14)  # cells of the map

    # Order of positional arguments; the fields' own order unless a subclass says otherwise.
    positional: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], config: dict[str, Any] | None = None
    ) -> HieraConfig:
        """The config a constructor call means; `config` overrides, as in the reference."""
        fields = [f.name for f in dataclasses.fields(cls)]
        order = cls.positional or tuple(fields)
        if len(args) > len(order):
            raise TypeError(f"at most {len(order)} positional arguments, got {len(args)}")
        given = dict(zip(order, args, strict=False))
        for name in kwargs:
            if name in given:
                raise TypeError(f"argument {name!r} is given twice")
            if name not in fields:
                raise TypeError(f"unknown argument {name!r} {near(name, fields)}".rstrip())
        return cls(**{**given, **kwargs, **(config or {})})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON or YAML
                object.__setattr__(self, field.name, tuple(value))
        self._check_dimensions()
        self._check_input_size()
        self._check_stages()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens along each dimension after the patch embedding."""
        return tuple(i // s for i, s in zip(self.input_size, self.patch_stride, strict=True))

    @property
    def layout(self) -> TokenLayout:
        levels = len(self.stages) - 1
        return TokenLayout(self.tokens, self.mask_unit_size, self.q_stride, levels, self.q_pool)

    def block_rows(self) -> list[BlockRow]:
        """One row a block. The first block of a stage widens and pools, and still attends as the
        stage before it does, so that global attention only ever sees pooled tokens."""
        rows: list[BlockRow] = []
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
                rows.append(BlockRow(stage, dim, dim_out, heads, q_stride, window, windowed))
                dim = dim_out
        return rows

    def to_json(self) -> dict[str, Any]:
        """What config.json holds. A norm given as a class cannot be written and is left out."""
        values = dataclasses.asdict(self)
        if not self.abs_win_pos_embed:  # an argument that the reference does not know breaks it
            del values["abs_win_pos_embed"], values["global_pos_size"]
        if not isinstance(self.norm_layer, str):
            del values["norm_layer"]
        return values

    # Checks -----------------------------------------------------------------------------------

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
        if self.abs_win_pos_embed and (dims != 2 or len(self.global_pos_size) != 2):
            raise ConfigError("abs_win_pos_embed is for images", "give both sizes as (y, x)")

    def _check_input_size(self) -> None:
        """Legal sizes are multiples of patch stride x mask unit (32 pixels in the zoo)."""
        units = zip(self.q_stride, self.mask_unit_size, strict=True)
        levels = len(self.stages) - 1
        for dim, (unit, size) in enumerate(zip(units, self.input_size, strict=True)):
            step = math.lcm(unit[0] ** levels, unit[1]) * self.patch_stride[dim]
            if size < 1 or size % step:
                below = size // step * step
                legal = f"{below} or {below + step}" if below else f"{step}"
                raise ConfigError(
                    f"input_size {self.input_size}: {size} is not a multiple of {step} "
                    "(patch stride x mask unit)",
                    f"the nearest legal size is {legal}",
                )
            kernel, pad = self.patch_kernel[dim], self.patch_padding[dim]
            tokens = (size + 2 * pad - kernel) // self.patch_stride[dim] + 1
            if tokens != self.tokens[dim]:
                raise ConfigError(
                    f"kernel {kernel}, stride {self.patch_stride[dim]} and padding {pad} make "
                    f"{tokens} tokens of {size} pixels, not {self.tokens[dim]}",
                    "choose patch_padding so that tokens = size / stride",
                )

    def _check_stages(self) -> None:
        stages = len(self.stages)
        if min(self.stages, default=0) < 1:
            raise ConfigError(f"stages {self.stages}", "give every stage at least one block")
        if not 0 <= self.q_pool < stages:
            raise ConfigError(f"q_pool {self.q_pool} with {stages} stages", "use fewer pools")
        if len(self.mask_unit_attn) < stages:
            raise ConfigError(
                f"mask_unit_attn has {len(self.mask_unit_attn)} entries for {stages} stages",
                "give one a stage",
            )
        for row in self.block_rows():
            if row.dim_out % row.heads:
                raise ConfigError(
                    f"{row.heads} heads do not divide {row.dim_out} channels (stage {row.stage})",
                    "change embed_dim or num_heads",
                )
            if row.use_mask_unit_attn and row.window_size == 0:
                raise ConfigError(
                    f"stage {row.stage} attends within mask units of {self.mask_unit_size}, but "
                    "pooling has used them up",
                    "use larger mask units or global attention there",
                )


@dataclass(frozen=True)
class AutoencoderConfig(HieraConfig):
    """Constructor arguments of `MaskedAutoencoderHiera`.

    The paper's table gives 8 decoder heads for video; the released code, which the weights were
    trained with, has 16 everywhere. Shapes are equal, so a wrong value would load silently.
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
        """The reference's autoencoder takes no norm by name, so its usual one stays unwritten."""
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
                f"{self.decoder_num_heads} decoder heads do not divide {self.decoder_embed_dim}",
                "change decoder_embed_dim or decoder_num_heads",
            )
