"""Tests of constructor arguments: what cannot be built is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import hiera_core
from hiera_core.errors import ConfigError

from .conftest import SMALL

COUNTS = ("in_chans", "embed_dim", "num_heads", "num_classes", "q_pool")
SIZES = ("stages", "q_stride", "mask_unit_size", "patch_kernel", "patch_stride", "patch_padding")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, float("nan")], ids=repr)
def test_counts_are_integers_that_are_not_negative(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*integer"):
        hiera_core.Hiera(**{**SMALL, name: value})


@pytest.mark.parametrize("name", ["in_chans", "embed_dim", "num_heads"])
def test_counts_that_must_not_be_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; give an integer of at least 1"):
        hiera_core.Hiera(**{**SMALL, name: 0})


@pytest.mark.parametrize("name", [*SIZES, "input_size", "global_pos_size"])
@pytest.mark.parametrize("value", [(-1, 8), ("8", "8"), (2.0, 2.0), (None, 8)], ids=repr)
def test_sizes_are_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*integers"):
        hiera_core.Hiera(**{**SMALL, name: value})


@pytest.mark.parametrize("name", [*SIZES, "input_size", "global_pos_size", "mask_unit_attn"])
@pytest.mark.parametrize("value", [8, None, "88"], ids=repr)
def test_sizes_are_sequences(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        hiera_core.Hiera(**{**SMALL, name: value})


@pytest.mark.parametrize("name", ["drop_path_rate", "head_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.1", None], ids=repr)
def test_rates_are_below_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        hiera_core.Hiera(**{**SMALL, name: value})


@pytest.mark.parametrize("name", ["dim_mul", "head_mul", "mlp_ratio"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2", 1e-9], ids=repr)
def test_factors_are_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        hiera_core.Hiera(**{**SMALL, name: value})


@pytest.mark.parametrize("name", ["decoder_embed_dim", "decoder_num_heads", "decoder_depth"])
def test_the_decoder_is_checked_too(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is -1"):
        hiera_core.MaskedAutoencoderHiera(**{**SMALL, "q_pool": 2, name: -1})


@pytest.mark.parametrize(
    "change",
    [
        {"stages": (10_000_000, 1, 1, 1)},
        {"stages": (1,) * 1000},
        {"embed_dim": 48_000},
        {"num_classes": 10**9},
        {"in_chans": 10**6},
        {"input_size": (1 << 20, 1 << 20)},
        {"patch_kernel": (10**9, 10**9)},
        {"dim_mul": 1e300},
        {"dim_mul": 900.0},
        {"head_mul": 1e300},
        {"mlp_ratio": 1e9},
    ],
    ids=repr,
)
def test_sizes_are_bounded(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at most"):
        hiera_core.Hiera(**{**SMALL, **change})


def test_the_size_of_the_decoder_is_bounded() -> None:
    with pytest.raises(ConfigError, match=r"decoder_depth is 10000000; give .* at most 1000"):
        hiera_core.MaskedAutoencoderHiera(**{**SMALL, "q_pool": 2, "decoder_depth": 10_000_000})


def test_norms_are_known_by_name_or_given_as_a_class() -> None:
    with pytest.raises(ConfigError, match="unknown norm_layer 'LayerNrom'; did you mean LayerNorm"):
        hiera_core.Hiera(**SMALL, norm_layer="LayerNrom")
    for name in ("Linear", "functional", "__name__", "", 3, None):
        with pytest.raises(ConfigError, match="norm_layer"):
            hiera_core.Hiera(**SMALL, norm_layer=name)  # type: ignore[arg-type]
    for norm in ("RMSNorm", nn.RMSNorm):
        model = hiera_core.Hiera(**SMALL, norm_layer=norm)
        assert type(model.blocks[0].norm1) is nn.RMSNorm
