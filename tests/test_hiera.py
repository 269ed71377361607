"""Tests of the models: attention, graphs, masks, construction, outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hiera_core
from hiera_core import zoo
from hiera_core.benchmarking import benchmark
from hiera_core.errors import ConfigError, UsageError
from hiera_core.models import cpu
from hiera_core.models.attention import eager_attention, fused_attention
from hiera_core.models.kernels import batched_attention
from hiera_core.models.mae import normalise_patches

from .conftest import SMALL, assert_close, draw_weights

MAE = {**SMALL, "q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 2}
VIDEO = {k: v for k, v in zoo.get("hiera_base_16x224").config.items() if k not in SMALL}
VIDEO = {**SMALL, **VIDEO, "input_size": (8, 64, 64)}


def small(seed: int = 0, **config: Any) -> hiera_core.Hiera:
    return draw_weights(hiera_core.Hiera(**{**SMALL, **config}), seed).eval()


def small_mae(**config: Any) -> hiera_core.MaskedAutoencoderHiera:
    return draw_weights(hiera_core.MaskedAutoencoderHiera(**{**MAE, **config}))


# Attention --------------------------------------------------------------------------------------


@torch.no_grad()
def test_eager_and_fused_attention_agree() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    fused = model(x)
    model.set_attention("eager")
    assert_close(model(x), fused)
    with pytest.raises(UsageError, match="unknown attention"):
        model.set_attention("fast")


def test_large_batches_are_split_for_the_kernel() -> None:
    q, k, v = torch.randn(3, 10, 2, 4, 8).unbind(0)
    whole = fused_attention(q, k, v, 0.3)
    assert_close(fused_attention(q, k, v, 0.3, limit=3), whole)
    assert_close(eager_attention(q, k, v, 0.3), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hiera_base_224", "hiera_base_16x224"])
@pytest.mark.parametrize("intel", [True, False])
def test_no_block_runs_the_slow_math_kernel(
    name: str, dtype: torch.dtype, intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference's 5-D tensors, PyTorch silently uses this kernel in all 24 blocks."""
    for attribute in ("HAS_AMX", "IS_INTEL"):
        monkeypatch.setattr(batched_attention, attribute, intel)
    model = getattr(hiera_core, name)()
    calls = []
    for block in model.blocks:  # run each block once, on a few mask units
        attention = block.attn
        tokens = max(attention.window_size, 1) * attention.q_stride * 20
        x = torch.randn(1, tokens, block.dim, dtype=dtype)
        block = block.to(dtype).eval()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
            block(x)
        window = attention.window_size * attention.q_stride
        keys = window if attention.use_mask_unit_attn else tokens
        calls.append((keys, {event.key for event in profile.key_averages()}))
    assert len(calls) == 24
    for keys, names in calls:
        assert "aten::_scaled_dot_product_attention_math" not in names
        # On other CPUs than Intel's, matrix products are faster than the fused kernel, in bf16 and
        # in small windows.
        fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
        by_products = dtype in cpu.ONEDNN_DTYPES and (dtype is torch.bfloat16 or keys <= 64)
        by_products = by_products and not intel
        assert ("aten::baddbmm" if by_products else fused) in names


# Graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, VIDEO], ids=["image", "video"])
def test_models_compile_as_one_graph(config: dict[str, Any]) -> None:
    x = torch.randn(2, 3, *config["input_size"])
    classifier = draw_weights(hiera_core.Hiera(**config)).eval()
    compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), classifier(x))

    autoencoder = draw_weights(
        hiera_core.MaskedAutoencoderHiera(**{**config, **MAE, **config, "q_pool": 2})
    )
    compiled = torch.compile(autoencoder, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    eager = autoencoder(x, mask_ratio=0.6)
    torch.manual_seed(0)
    traced = compiled(x, mask_ratio=0.6)
    assert_close(traced[0], eager[0])
    traced[0].backward()
    assert autoencoder.patch_embed.proj.weight.grad is not None


# Masks ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masked_units_do_not_leak() -> None:
    """Masked pixels do not change the output, although patch kernels overlap."""
    model = small_mae().eval()
    x = torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[True, False, False, True]])
    latent, _ = model.forward_encoder(x, mask=mask)
    hidden = x.clone()
    hidden[..., :32, 32:] = 7.0  # unit 1
    hidden[..., 32:, :32] = -7.0  # unit 2
    changed, _ = model.forward_encoder(hidden, mask=mask)
    assert torch.equal(changed, latent)
    hidden[..., :32, :32] = 0.0  # unit 0, visible
    assert not torch.equal(model.forward_encoder(hidden, mask=mask)[0], latent)


@torch.no_grad()
def test_small_units_are_masked_at_their_positions() -> None:
    """With 4x4 units and three pools, windows are not numbered in grid order."""
    model = small_mae(mask_unit_size=(4, 4)).eval()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [1, 6, 11]] = True
    x = torch.randn(1, 3, 64, 64)
    latent, _ = model.forward_encoder(x, mask=mask)
    hidden = torch.randn(1, 3, 64, 64)
    for unit in (1, 6, 11):
        y, x0 = unit // 4 * 16, unit % 4 * 16
        hidden[..., y : y + 16, x0 : x0 + 16] = x[..., y : y + 16, x0 : x0 + 16]
    assert torch.equal(model.forward_encoder(hidden, mask=mask)[0], latent)
    _, preds, labels, _ = model(x, mask=mask)
    all_patches = normalise_patches(model.pixel_labels(x))[0]  # 4 x 4 patches of 16 pixels
    hidden_patches = [i for i in range(16) if i not in (1, 6, 11)]
    assert preds.shape == labels.shape == (13, 16 * 16 * 3)
    assert_close(labels, all_patches[hidden_patches])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan"), 0.99])
def test_useless_mask_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="mask ratio"):
        small_mae()(torch.randn(1, 3, 64, 64), mask_ratio=ratio)


def test_masks_of_the_wrong_form_are_refused() -> None:
    model, x = small_mae(), torch.randn(2, 3, 64, 64)
    with pytest.raises(UsageError, match=r"expected \[batch, 4\]"):
        model(x, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(UsageError, match="the same number"):
        model(x, mask=torch.tensor([[True, False, False, False], [True, True, False, False]]))
    with pytest.raises(UsageError, match="1 rows for 2 inputs"):
        model(x, mask=torch.tensor([[True, False, False, False]]))
    with pytest.raises(UsageError, match="deletes no unit"):
        model(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(UsageError, match="cannot be masked"):
        wide = small(input_size=(64, 128), mask_unit_size=(16, 16))
        wide(torch.randn(1, 3, 64, 128), mask=torch.ones(1, 2, dtype=torch.bool))


def test_models_take_one_dimensional_signals() -> None:
    one_dim = {
        "input_size": (1024,),
        "in_chans": 2,
        "q_stride": (2,),
        "mask_unit_size": (8,),
        "patch_kernel": (7,),
        "patch_stride": (4,),
        "patch_padding": (3,),
    }
    model = small(**one_dim)
    probs, maps = model(torch.randn(3, 2, 1024), return_intermediates=True)
    assert probs.shape == (3, 10)
    assert [tuple(m.shape) for m in maps] == [(3, 256, 16), (3, 128, 32), (3, 64, 64), (3, 32, 128)]
    loss, preds, *_ = small_mae(**one_dim)(torch.randn(2, 2, 1024))
    assert loss.isfinite() and preds.shape == (2 * 20 * 2, 16 * 2)
    with pytest.raises(ConfigError, match="nearest legal size is 992 or 1024"):
        small(**{**one_dim, "input_size": (1000,)})


# Construction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": (225, 224)}, "nearest legal size is 224 or 256"),
        ({"input_size": (16, 64)}, "nearest legal size is 32"),
        ({"q_stride": (2,)}, "q_stride"),
        ({"q_pool": 4}, "fewer pools"),
        ({"num_heads": 3}, "heads do not divide"),
        ({"mask_unit_attn": (True,) * 4, "mask_unit_size": (4, 4)}, "used them up"),
        ({"patch_padding": (0, 0)}, "patch_padding"),
        ({"stages": (1, 0, 1, 1)}, "at least one block"),
        ({"sep_pos_embed": True}, "for video"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused_with_a_hint(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**config)


def test_arguments_may_be_positional_named_or_a_config() -> None:
    model = hiera_core.Hiera((64, 64), 4, 16, stages=(1, 1, 1, 1))
    assert model.config["in_chans"] == 4 and model.config["embed_dim"] == 16
    again = hiera_core.Hiera(config=model.config)
    assert again.config == model.config
    assert hiera_core.MaskedAutoencoderHiera(1, **MAE).config["in_chans"] == 1
    with pytest.raises(TypeError, match="unknown argument 'embed_dims'; did you mean embed_dim"):
        hiera_core.Hiera(embed_dims=16)
    with pytest.raises(TypeError, match="given twice"):
        hiera_core.Hiera((64, 64), input_size=(64, 64))


def test_an_input_of_the_wrong_shape_names_the_expected_one() -> None:
    with pytest.raises(UsageError, match=r"expected \[batch, 3, 64, 64\]"):
        small()(torch.randn(1, 3, 96, 96))


@torch.no_grad()
def test_outputs_in_training_evaluation_and_without_a_head() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    logits = model.forward_logits(x)
    assert_close(model(x), logits.softmax(-1))
    assert_close(model.train()(x), logits)
    pooled = model.eval().pool(model.encode(x)[0])
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and pooled.shape == (2, 128)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.config["num_classes"] == 7
    assert_close(model(x).sum(1), torch.ones(2))  # the new head is in evaluation mode, too
    assert small(num_classes=0)(x).shape == (2, 128)


@torch.no_grad()
def test_backbone_returns_maps_with_channels_first() -> None:
    model = hiera_core.create_model("hiera_tiny_224", features_only=True)
    maps = model(torch.randn(1, 3, 224, 224))
    info = model.feature_info
    assert [tuple(m.shape[1:]) for m in maps] == [
        (i["num_chs"], 224 // i["reduction"], 224 // i["reduction"]) for i in info
    ]
    assert [i["reduction"] for i in info] == [4, 8, 16, 32]


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.forward_logits(x).sum().backward()
    plain = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    model.forward_logits(x).sum().backward()
    assert_close(model.patch_embed.proj.weight.grad, plain)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = hiera_core.models.layers.DropPath(0.25)
    torch.manual_seed(0)
    kept = drop(torch.ones(4000, 2))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(torch.ones(3)), torch.ones(3))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in small(drop_path_rate=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@torch.no_grad()
def test_hiera_base_is_batch_invariant_and_uses_no_slow_kernel(pictures: Path) -> None:
    """A picture has the same output alone and in a batch of 16. No layer uses the math kernel."""
    from hiera_core.data.image_reader import open_image
    from hiera_core.data.transforms import ImageTransform

    model = draw_weights(hiera_core.hiera_base_224()).eval()
    transform = ImageTransform.from_preprocessing(model.card["preprocessing"], (224, 224))
    crops = [transform.crop(open_image(path)[0]) for path in sorted(pictures.iterdir())]
    views = np.stack([np.rot90(crop, rotation) for crop in crops for rotation in range(4)])
    x = transform.normalise(torch.from_numpy(views))
    together = model(x)
    for index in (0, 6, 15):
        assert_close(model(x[index : index + 1])[0], together[index])
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            model(x[:1].to(dtype))
        calls = {event.key for event in profile.key_averages()}
        assert "aten::_scaled_dot_product_attention_math" not in calls


def test_outputs_do_not_depend_on_the_batch() -> None:
    model = small()
    x = torch.randn(16, 3, 64, 64)
    together = model(x)
    for i in range(16):
        assert_close(model(x[i : i + 1]), together[i : i + 1])


def test_benchmark_takes_the_arguments_of_the_reference() -> None:
    assert benchmark(nn.Flatten(), "cpu", (3, 8, 8), batch_size=2, runs=4) > 0


def test_parameter_counts_match_the_zoo() -> None:
    for name, entry in zoo.models().items():
        with torch.device("meta"):
            model = getattr(hiera_core, name)()
        assert sum(p.numel() for p in model.parameters()) == entry.params, name


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "hiera_base_16x224", "hiera_nano_32", "hiera_nano_8x32"]
)
def test_operation_counts_match_the_zoo(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    entry = zoo.get(name)
    with torch.device("meta"):
        model = getattr(hiera_core, name)().eval()
        x = torch.empty(1, 3, *entry.config["input_size"])
    model.set_attention("eager")
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(entry.gmacs, rel=0.1)
