"""Tests of the fast CPU kernels: outputs, gradients, hooks and exports equal plain PyTorch's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hiera_core
from hiera_core.compiling.compiled import compile_for_inference
from hiera_core.models import cpu
from hiera_core.models.attention import eager_attention, fused_attention
from hiera_core.models.cpu import Linear
from hiera_core.models.hiera import Hiera
from hiera_core.models.kernels import batched_attention
from hiera_core.models.kernels.batched_attention import matmul_attention

from .conftest import SMALL, assert_close, draw_weights

VIDEO = {
    "embed_dim": 16,
    "stages": (1, 1, 1),
    "q_pool": 2,
    "input_size": (4, 32, 32),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 4, 4),
    "mask_unit_attn": (True, True, False),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
    "num_classes": 10,
}
needs_onednn = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
needs_bf16 = pytest.mark.skipif(
    torch.bfloat16 not in cpu.ONEDNN_DTYPES, reason="oneDNN has no bf16 on this processor"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each oneDNN call appends its activation."""
    activations: list[str] = []
    plain = cpu._onednn

    def spy(x: Any, weight: Any, bias: Any, activation: str = "none") -> torch.Tensor:
        activations.append(activation)
        return plain(x, weight, bias, activation)

    monkeypatch.setattr(cpu, "_onednn", spy)
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)  # the models of these tests are small
    return activations


@pytest.mark.parametrize("dtype", cpu.ONEDNN_DTYPES, ids=str)
@torch.no_grad()
def test_linear_and_gelu_match_plain_pytorch(dtype: torch.dtype, calls: list[str]) -> None:
    layer = Linear(24, 40).to(dtype)
    x = torch.randn(3, 7, 24, dtype=dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert_close(layer(x).double(), exact, tolerance)
    assert_close(cpu._linear_gelu(layer, x).double(), F.gelu(exact), tolerance)
    assert_close(layer(x.transpose(0, 1)).double(), exact.transpose(0, 1), tolerance)
    assert calls == ["none", "gelu", "none"]


@needs_onednn
@pytest.mark.parametrize("mkl", [True, False])
def test_gradients_match_the_plain_layer(
    mkl: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MKL_FOR_WEIGHTS", mkl)
    layer, x = Linear(24, 40), torch.randn(3, 7, 24, requires_grad=True)
    grad_output = torch.randn(3, 7, 40)
    inputs = (x, layer.weight, layer.bias)
    ours = torch.autograd.grad((layer(x) * grad_output).sum(), inputs)
    plain = torch.autograd.grad((F.linear(*inputs) * grad_output).sum(), inputs)
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b)
    assert len(calls) == (2 if mkl else 3)
    layer.weight.requires_grad_(False)  # frozen, as in fine-tuning a head
    (x_grad,) = torch.autograd.grad((layer(x) * grad_output).sum(), x)
    assert_close(x_grad, plain[0])


@pytest.mark.parametrize("mkl", [True, False])
def test_second_derivatives_match_the_plain_layer(
    mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MKL_FOR_WEIGHTS", mkl)
    found = []
    x = torch.randn(2, 4, requires_grad=True)
    layer = Linear(4, 4)
    for forward in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        (first,) = torch.autograd.grad(forward(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, layer.weight)))
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain)


def _call_with_autocast(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def _call_with_flop_counter(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    assert counter.get_total_flops() == 2 * 5 * 4 * 6
    return out


@pytest.mark.parametrize(
    "call",
    [
        _call_with_autocast,
        _call_with_flop_counter,
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
        lambda layer, x: torch.export.export(layer, (x,)).module()(x),
        lambda layer, x: layer.double()(x.double()),
        lambda layer, x: layer(x[:0]),
    ],
    ids=["autocast", "counter", "vmap", "trace", "export", "double", "empty"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_tracers_and_unsupported_inputs_use_the_plain_layer(
    call: Callable[[Linear, torch.Tensor], torch.Tensor], calls: list[str]
) -> None:
    call(Linear(4, 6), torch.randn(5, 4))
    assert not calls


@needs_onednn
@pytest.mark.parametrize("config", [SMALL, VIDEO], ids=["image", "video"])
@torch.no_grad()
def test_chunks_do_not_change_the_output(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    model = draw_weights(hiera_core.Hiera(**config)).eval()
    x = torch.randn(3, 3, *config["input_size"])
    probs, maps = model(x, return_intermediates=True)
    calls_without_chunks = len(calls)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)  # a chunk is one window
    chunked, chunked_maps = model(x, return_intermediates=True)
    assert len(calls) - calls_without_chunks > 3 * calls_without_chunks
    assert_close(chunked, probs)
    for a, b in zip(chunked_maps, maps, strict=True):
        assert_close(a, b)
    masked = model.get_random_mask(x, 0.5)
    tokens = model(x, mask=masked)
    monkeypatch.undo()
    assert_close(tokens, model(x, mask=masked))


@torch.no_grad()
def test_hooks_see_whole_batches_and_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    model = hiera_core.Hiera(**SMALL).eval()
    seen: list[torch.Size] = []
    for module in (model.blocks[0], model.blocks[0].mlp.fc1, model.blocks[0].mlp.act):
        module.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    model(torch.randn(2, 3, 64, 64))
    assert seen == [(2, 256, 64), (2, 256, 64), (2, 256, 16)]


@torch.no_grad()
def test_replaced_layers_are_used() -> None:
    model = hiera_core.Hiera(**SMALL).eval()
    model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1, nn.Identity())
    model.blocks[1].mlp.act = nn.ReLU()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("dtype", "keys", "needs_grad", "amx", "intel", "avx512", "expected"),
    [
        (
            torch.float32,
            64,
            False,
            False,
            False,
            False,
            False,
        ),  # a small window on an AMD processor
        (torch.float32, 64, False, True, True, True, True),
        (torch.float32, 64, True, True, True, True, False),
        (torch.float32, 65, True, False, False, False, True),
        (torch.bfloat16, 500, False, False, True, False, False),
        (torch.bfloat16, 500, False, False, True, True, True),  # bf16 without AMX
        (torch.bfloat16, 500, False, False, False, True, False),  # AMD since Zen 4
        (torch.bfloat16, 16, True, False, True, True, False),
        (torch.bfloat16, 16, False, True, True, True, True),
        (torch.bfloat16, 500, True, True, True, True, False),
    ],
)
def test_the_kernel_of_attention_depends_on_the_processor(
    dtype: torch.dtype,
    keys: int,
    needs_grad: bool,
    amx: bool,
    intel: bool,
    avx512: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batched_attention, "HAS_AMX", amx)
    monkeypatch.setattr(batched_attention, "IS_INTEL", intel)
    monkeypatch.setattr(batched_attention, "HAS_AVX512_BF16", avx512)
    assert batched_attention.fused_kernel_is_faster(dtype, keys, needs_grad) is expected
    q = torch.randn(2, 1, keys, 8).to(dtype)
    with torch.set_grad_enabled(needs_grad):
        ours = cpu.attention(q, q, q, 0.3)
    if not cpu.HAS_ONEDNN or dtype not in cpu.ONEDNN_DTYPES:
        assert ours is None
    else:
        assert (ours is None) is expected


@pytest.mark.parametrize(("keys", "expected"), [(64, False), (65, True)])
def test_compiled_programs_multiply_in_small_windows_with_amx(
    keys: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_attention, "HAS_AMX", True)
    assert batched_attention.fused_kernel_is_faster(torch.bfloat16, keys, False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert batched_attention.fused_kernel_is_faster(torch.bfloat16, keys, False) is expected


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (40, 2, 64, 16)])
def test_matmul_attention_matches_the_fused_kernel(
    shape: tuple[int, ...], intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_attention, "SCORE_BYTES", 3000)
    for name in ("HAS_AMX", "IS_INTEL"):
        monkeypatch.setattr(batched_attention, name, intel)
    q, k, v = torch.randn(3, *shape).unbind(0)
    q = q[:, :, : shape[2] // 4]
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    assert_close(matmul_attention(q, k, v, 0.2), exact)
    with torch.no_grad():
        assert_close(matmul_attention(q, k, v, 0.2), exact)
        half = fused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.2)
    assert_close(half.float(), exact, 2e-2)


@needs_bf16
@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_compiled_attention_keeps_small_score_matrices_whole(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger matrices are computed in parts. In both cases, the output is close to that in fp32."""
    if not whole:
        monkeypatch.setattr("hiera_core.models.cpu.KEPT_SCORE_BYTES", 0)
    monkeypatch.setattr(batched_attention, "HAS_AMX", False)
    monkeypatch.setattr(batched_attention, "HAS_AVX512_BF16", False)
    torch.compiler.reset()
    q, k, v = torch.randn(3, 6, 2, 16, 8).bfloat16().unbind(0)
    expected = (eager_attention if whole else matmul_attention)(q, k, v, 0.2)
    compiled = torch.compile(fused_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, 0.2), expected)
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    x = torch.randn(2, 3, *model.config["input_size"])
    exact = model(x)
    half = torch.compile(model.bfloat16(), fullgraph=True, backend="aot_eager")
    assert_close(half(x.bfloat16()).float(), exact, 6e-2)  # difference of probabilities


@torch.no_grad()
def test_exported_attention_in_bf16_takes_any_batch() -> None:
    """The batch may be too large for its scores to be kept whole."""

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_attention(x, x, x, 0.2)

    x = torch.randn(2, 1, 512, 8).bfloat16()
    batch = torch.export.Dim("batch", min=1, max=60_000)  # 128 inputs have 64 MiB of scores
    program = torch.export.export(Attention(), (x,), dynamic_shapes=({0: batch},)).module()
    large_batch = x[:1].expand(130, -1, -1, -1)
    assert_close(
        program(large_batch).float(),
        F.scaled_dot_product_attention(*[large_batch] * 3, scale=0.2).float(),
        2e-2,
    )


@needs_onednn
@torch.no_grad()
def test_bf16_attention_is_almost_as_exact_as_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batched_attention, "HAS_AMX", False)
    monkeypatch.setattr(batched_attention, "HAS_AVX512_BF16", False)
    q, k, v = (2 * torch.randn(3, 4, 2, 49, 32)).bfloat16().unbind(0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2)
    fused = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    our_error, fused_error = (
        (x.double() - exact).square().mean() for x in (fused_attention(q, k, v, 0.2), fused)
    )
    # The mean squared errors. With scores in bf16, ours is more than 20 times the other.
    assert our_error < 4 * fused_error


@pytest.mark.parametrize("casts", [False, True])
def test_gradients_in_bf16_match_those_in_fp32(casts: bool) -> None:
    """Also under autocast, in which training runs."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(4, 2, 16, 8).to(dtype).requires_grad_() for _ in range(3))
        with torch.no_grad():
            for tensor, seed in zip((q, k, v), range(3), strict=True):
                tensor.copy_(torch.randn(4, 2, 16, 8, generator=torch.manual_seed(seed)))
        with torch.autocast("cpu", torch.bfloat16, enabled=casts and dtype is torch.bfloat16):
            out = fused_attention(q, k, v, 0.3)
        assert out.dtype is dtype
        out.square().sum().backward()
        grads.append([t.grad.float() for t in (q, k, v) if t.grad is not None])
    for exact, half in zip(*grads, strict=True):
        assert_close(half, exact, 3e-2)


@needs_onednn
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_a_block_that_widens_without_pooling_compiles() -> None:
    """Autoencoders have one. The compiler's fusion of sums expects weights that it has packed."""
    torch.compiler.reset()
    block = draw_weights(hiera_core.HieraBlock(8, 16, 1)).eval()
    x = torch.randn(2, 16, 8)
    assert_close(compile_for_inference(block, torch.device("cpu"))(x), block(x))


def test_a_processor_without_bf16_products_computes_in_bf16(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Most processors of laptops have AVX2 alone, and oneDNN refuses a product in bf16 there."""
    plain = cpu._onednn

    def refuse(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.dtype is torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor")
        return plain(x, *rest)

    monkeypatch.setattr(cpu, "_onednn", refuse)
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", cpu._onednn_dtypes())
    assert torch.bfloat16 not in cpu.ONEDNN_DTYPES
    model = draw_weights(Hiera(**SMALL)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model.forward_logits(x), model.bfloat16().forward_logits(x.bfloat16())
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_a_backbone_compiles_as_users_compile_it() -> None:
    """Without freezing, the compiler refuses oneDNN's product, so it is not called."""
    backbone = hiera_core.create_model(
        "hiera_nano_32", pretrained=True, features_only=True, out_indices=(0, 1)
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    for found, expected in zip(
        torch.compile(backbone, fullgraph=True)(x), backbone(x), strict=True
    ):
        assert_close(found, expected)


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_what_attention_gets(dtype: torch.dtype) -> None:
    """In bf16 it is computed by products, as without autocast. fp32 is left to PyTorch to cast."""
    q, k, v = (torch.randn(4, 2, 16, 8).to(dtype).requires_grad_() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, out = cpu.attention(q, k, v, 0.3), fused_attention(q, k, v, 0.3)
    assert out.dtype is torch.bfloat16
    if dtype is torch.float32:
        assert ours is None
    else:
        assert ours is not None and torch.equal(ours, matmul_attention(q, k, v, 0.3))
