"""Checked constructor arguments of `HieraDet`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch

from ...errors import ConfigError
from ..config import MAX_BLOCKS, MAX_CHANNELS, MAX_FACTOR, MAX_SIZE, MAX_STAGES, BlockSpec
from .window_order import POOL, is_nested, pools_within

SIZES = ("input_size", "global_pos_size", "patch_kernel", "patch_stride", "patch_padding")
LEAST_SIZE = {"patch_padding": 0}
MAX_COUNT = 1 << 14  # channels or heads of the first stage
MAX_WINDOW = 1 << 12


@dataclass(frozen=True)
class HieraDetConfig:
    """Constructor arguments of `HieraDet`, with timm's names and the values of the tiny model.

    Every stage but the first begins with a 2x2 pool and doubles channels and heads.

    Raises:
        ConfigError: The arguments contradict each other.
    """

    # (y, x) in pixels. Preprocessing makes this size; a model takes any.
    input_size: tuple[int, ...] = (1024, 1024)
    in_chans: int = 3
    embed_dim: int = 96  # channels of the first stage
    num_heads: int = 1  # heads of the first stage
    stages: tuple[int, ...] = (1, 2, 7, 2)  # blocks in each stage
    window_spec: tuple[int, ...] = (8, 4, 14, 7)  # side of a window in tokens, for each stage
    global_att_blocks: tuple[int, ...] = (5, 7, 9)  # blocks that attend to all tokens, from 0
    global_pos_size: tuple[int, int] = (7, 7)  # cells of the global position embedding
    patch_kernel: tuple[int, int] = (7, 7)
    patch_stride: tuple[int, int] = (4, 4)
    patch_padding: tuple[int, int] = (3, 3)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    init_values: float | None = None  # initial layer scale; the released models have none

    dim_mul: ClassVar[int] = 2
    q_stride: ClassVar[tuple[int, int]] = (POOL, POOL)
    num_classes: ClassVar[int] = 0
    takes_any_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON or YAML
                object.__setattr__(self, field.name, tuple(value))
        self._check_numbers()
        self._check_stages()

    @property
    def q_pool(self) -> int:
        """Number of stage transitions that pool: all."""
        return len(self.stages) - 1

    def block_specs(self) -> list[BlockSpec]:
        """Return the specification of every block.

        The first block of a stage attends within the windows of the stage before, and pools.
        """
        rates = torch.linspace(0, self.drop_path_rate, sum(self.stages), device="cpu").tolist()
        specs: list[BlockSpec] = []
        for stage, depth in enumerate(self.stages):
            dim_out, heads = (n * self.dim_mul**stage for n in (self.embed_dim, self.num_heads))
            for block in range(depth):
                pools = stage > 0 and block == 0
                side = self.window_spec[stage - 1] // POOL if pools else self.window_spec[stage]
                dim = dim_out // self.dim_mul if pools else dim_out
                windowed = len(specs) not in self.global_att_blocks
                q_stride, rate = POOL**2 if pools else 1, rates[len(specs)]
                specs.append(
                    BlockSpec(stage, dim, dim_out, heads, q_stride, side**2, windowed, rate)
                )
        return specs

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of tokens for an input of (y, x) pixels."""
        y, x = (
            (pixels + 2 * padding - kernel) // stride + 1
            for pixels, padding, kernel, stride in zip(
                size, self.patch_padding, self.patch_kernel, self.patch_stride, strict=True
            )
        )
        return y, x

    def least_size(self) -> tuple[int, int]:
        """Return the smallest input, (y, x) in pixels, that leaves a token in the last stage."""
        tokens = POOL**self.q_pool
        y, x = (
            max(1, (tokens - 1) * stride + kernel - 2 * padding)
            for padding, kernel, stride in zip(
                self.patch_padding, self.patch_kernel, self.patch_stride, strict=True
            )
        )
        return y, x

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        values = dataclasses.asdict(self)
        if self.init_values is None:
            del values["init_values"]
        return values

    # Checks -----------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        for name in ("in_chans", "embed_dim", "num_heads"):
            value = getattr(self, name)
            if not _is_int(value, 1, MAX_COUNT):
                raise ConfigError(f"{name} is {value!r}", f"give an integer from 1 to {MAX_COUNT}")
        for name in SIZES:
            value, least = getattr(self, name), LEAST_SIZE.get(name, 1)
            if not _are_ints(value, least, MAX_SIZE) or len(value) != 2:
                raise ConfigError(
                    f"{name} is {value!r}", f"give (y, x), integers of at least {least}"
                )
        for name, least, most in (
            ("stages", 1, MAX_BLOCKS),
            ("window_spec", 1, MAX_WINDOW),
            ("global_att_blocks", 0, MAX_BLOCKS),
        ):
            value = getattr(self, name)
            if not _are_ints(value, least, most):
                raise ConfigError(f"{name} is {value!r}", f"give integers from {least} to {most}")
        rate, ratio, scale = self.drop_path_rate, self.mlp_ratio, self.init_values
        if not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise ConfigError(f"drop_path_rate is {rate!r}", "give a number from 0 to below 1")
        if not (isinstance(ratio, int | float) and 0 < ratio <= MAX_FACTOR):
            raise ConfigError(
                f"mlp_ratio is {ratio!r}", f"give a number above 0, at most {MAX_FACTOR:.0f}"
            )
        if scale is not None and not (isinstance(scale, int | float) and abs(scale) < math.inf):
            raise ConfigError(f"init_values is {scale!r}", "give a finite number, or None")

    def _check_stages(self) -> None:
        count = len(self.stages)
        if not 1 <= count <= MAX_STAGES or sum(self.stages) > MAX_BLOCKS:
            raise ConfigError(
                f"there are {count} stages with {sum(self.stages)} blocks",
                f"use at most {MAX_STAGES} stages and {MAX_BLOCKS} blocks",
            )
        if len(self.window_spec) != count:
            raise ConfigError(
                f"window_spec {self.window_spec} does not fit {count} stages",
                "give one window for each stage",
            )
        for stage, side in enumerate(self.window_spec):
            if not is_nested(self.window_spec, stage) and side % POOL ** pools_within(
                self.window_spec, stage
            ):
                raise ConfigError(
                    f"window_spec {self.window_spec}: windows of {side} cannot be pooled",
                    "use even windows before a pool",
                )
        starts = [sum(self.stages[:stage]) for stage in range(1, count)]
        for block in self.global_att_blocks:
            if block in starts or block >= sum(self.stages):
                raise ConfigError(
                    f"global_att_blocks {self.global_att_blocks}: block {block} pools within "
                    "windows, or does not exist",
                    f"use blocks below {sum(self.stages)} other than {starts}",
                )
        widest = self.embed_dim * self.dim_mul ** (count - 1)
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"{self.num_heads} heads do not divide {self.embed_dim} channels",
                "change embed_dim or num_heads",
            )
        if max(widest, widest * self.mlp_ratio) > MAX_CHANNELS:
            raise ConfigError(
                f"the last stage has {widest} channels and an MLP of "
                f"{int(widest * self.mlp_ratio)}",
                f"use at most {MAX_CHANNELS}",
            )
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio} leaves no hidden channels", "use a larger one"
            )


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_ints(values: object, least: int, most: int) -> bool:
    return isinstance(values, tuple) and all(_is_int(value, least, most) for value in values)


class HieraDetArguments(TypedDict, total=False):
    """Keyword arguments of `HieraDet`, for type checkers: the fields of `HieraDetConfig`."""

    input_size: tuple[int, ...]
    in_chans: int
    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    window_spec: tuple[int, ...]
    global_att_blocks: tuple[int, ...]
    global_pos_size: tuple[int, int]
    patch_kernel: tuple[int, int]
    patch_stride: tuple[int, int]
    patch_padding: tuple[int, int]
    mlp_ratio: float
    drop_path_rate: float
    init_values: float | None
