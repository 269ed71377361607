"""Faster CPU kernels for the four places where a Hiera spends its time.

This is the only module of `models` that depends on the device, the compiler or a cache size. The
rest of the model uses four names, each equivalent to the plain PyTorch expression beside it:

    linear(layer, x)        layer(x)
    mlp(fc1, act, fc2, x)   fc2(act(fc1(x)))
    attention(q, k, v, s)   softmax(s q k^T) v, or None where PyTorch's own kernel is best
    run_blocks(blocks, x)   for block in blocks: x = block(x)

The layers are PyTorch's own (`nn.Linear`, `nn.GELU`). Where anything could notice the difference,
they are called as usual: see probes.py.

PyTorch gives fp32 matrix products on a CPU to MKL. On AMD processors MKL can run at half the speed
of oneDNN (measured on a Zen 5: 100 against 225 GFLOP/s per core). In bf16 PyTorch does use oneDNN,
but does not fuse the activation into the product. So these functions call oneDNN directly, through
the operator that PyTorch's own compiler uses. Results agree within rounding.

Letters in shape comments: b batch, w windows (1 for global attention), h heads, t tokens of a
window, d channels of a head, c channels.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ..device import IS_INTEL, has_bf16_instructions
from ..process.cores import cache_bytes
from .kernels.batched_attention import fused_kernel_is_faster, matmul_attention
from .kernels.packed_weights import pack_weights, packed_weight
from .probes import (
    PROBES_EXIST,
    all_plain,
    are_alike,
    is_observed,
    is_ordinary,
    is_plain,
    is_watched,
    known_forward,
)

ModelType = TypeVar("ModelType", bound=nn.Module)

# Largest buffer, in bytes, for the hidden activations of the MLP when windowed blocks run in
# chunks: a quarter of the last cache, from 4 to 16 MB. On an AMD EPYC with 32 MB, values from 2 to
# 10 MB made no difference. On an Intel Xeon with 480 MB, 16 MB were 1.05 to 1.2 times as fast as 4.
CHUNK_BYTES = min(max(cache_bytes() // 4, 4 << 20), 16 << 20)
MLP_RATIO = 4
# Smallest product, in multiplications, that is given to oneDNN directly. The call takes about 40
# microseconds, in which MKL has finished a smaller product.
MIN_PRODUCT = 4 << 20
# Largest attention matrix, in bytes, that is kept whole: for the backward pass, which otherwise
# recomputes it in the fused kernel, and in a compiled program, where every call costs time.
KEPT_SCORE_BYTES = 64 << 20
# Whether MKL computes gradients of weights. oneDNN's operator first copies its transposed operand,
# in one thread, which takes a tenth of a training step of MAE Hiera-T. With MKL, this step is 1.14
# times as fast on an Intel Xeon; on AMD processors MKL is slow.
MKL_FOR_WEIGHTS = IS_INTEL

# Whether a program that is exported stays on this machine.
_stays_here = contextvars.ContextVar("_stays_here", default=False)


@contextlib.contextmanager
def stays_here() -> Iterator[None]:
    """Let programs that are exported within the block use what only a CPU has."""
    token = _stays_here.set(True)
    try:
        yield
    finally:
        _stays_here.reset(token)


# The four names that the model calls --------------------------------------------------------------


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `layer(x)`. [..., dim_in] -> [..., dim_out]"""
    if HAS_ONEDNN and isinstance(layer, nn.Linear) and is_plain(layer):
        weight, bias = _weights(layer)
        out = product(x, weight, bias, layer)
        if out is not None:
            return out
    called: torch.Tensor = layer(x)
    return called


def mlp(fc1: nn.Module, act: nn.Module, fc2: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `fc2(act(fc1(x)))`. [..., c] -> [..., c]

    An exact GELU is computed in the same pass as `fc1`.
    """
    if HAS_ONEDNN and isinstance(fc1, nn.Linear) and is_plain(fc1) and _is_gelu(act):
        if not torch.compiler.is_compiling():
            hidden = _linear_gelu(fc1, x)
            if hidden is not None:
                return linear(fc2, hidden)
        elif not torch.compiler.is_exporting() and is_plain(fc2):
            # The compiler fuses the activation into the product if no view stands between them.
            rows = act(linear(fc1, x.flatten(0, -2)))
            return linear(fc2, rows).view(*x.shape[:-1], -1)
    return linear(fc2, act(linear(fc1, x)))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor | None:
    """Return attention on a CPU by matrix products, or None if the caller should use PyTorch's
    fused kernel. All tensors are [(b w), h, t, d].

    See `fused_kernel_is_faster`.
    """
    if q.dtype not in ONEDNN_DTYPES or not q.is_cpu:
        return None
    needs_grad = torch.is_grad_enabled()
    if fused_kernel_is_faster(q.dtype, k.shape[2], needs_grad):
        return None
    if torch.compiler.is_exporting() and not _stays_here.get():  # it must run on any device
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling and (is_watched() or not is_ordinary(q)):
        return None
    if not compiling and torch.is_autocast_enabled("cpu"):
        if q.dtype is not torch.get_autocast_dtype("cpu"):
            return None
        with torch.autocast("cpu", enabled=False):  # it would compute the softmax in fp32
            return attention(q, k, v, scale)
    score_bytes = q[..., 0].numel() * k.shape[2] * q.element_size()
    fits = score_bytes <= KEPT_SCORE_BYTES
    if fits and not needs_grad and compiling:
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    if q.dtype is torch.float32 and compiling:  # a compiled loop over parts would be slower
        return None
    if fits or not needs_grad:
        return matmul_attention(q, k, v, scale)
    return None


def run_blocks(blocks: Sequence[Any], x: torch.Tensor, *, windowed: bool) -> torch.Tensor:
    """Return `x` after all blocks. b (w t) c -> b (w t') c'

    Blocks that attend within windows can process any number of windows at a time. On a CPU, the
    activations of a whole batch do not stay in the cache from one layer to the next, and the
    operating system allocates buffers above 32 MB anew each time, which takes a tenth of the time
    of a Hiera-B in fp32. So windowed blocks run in chunks of windows that fit the cache.
    """
    tokens = chunk_tokens(blocks, x) if windowed else None
    if tokens is not None:
        return run_in_chunks(blocks, x, tokens)
    for block in blocks:
        x = block(x)
    return x


def optimize_for_inference(model: ModelType) -> ModelType:
    """Make a model about a tenth faster on a CPU, for inference alone. Return the same model.

    Its linear layers keep a copy of their weights in the order in which oneDNN reads them, up to
    1 GiB in all, made when they are first called. Outputs agree within rounding. Parameters and
    `state_dict()` stay as they are. After a change of weights the copies are made again, unless it
    was made in place through `.data`. `hiera_core.predict`, `features` and `bench` do this
    themselves.

    Args:
        model: A model of this package. On other devices, nothing changes.
    """
    if HAS_ONEDNN:
        pack_weights(model)
    return model


# Linear layers ------------------------------------------------------------------------------------


@known_forward
class Linear(nn.Linear):
    """`nn.Linear` with the same parameters and names, for use outside of a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim_in] -> [..., dim_out]"""
        out = product(x, self.weight, self.bias) if HAS_ONEDNN else None
        return F.linear(x, self.weight, self.bias) if out is None else out


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer: nn.Module | None = None,
) -> torch.Tensor | None:
    """Return x weight^T + bias by oneDNN, or None if the layer should be called instead.

    [..., i], [o, i], [o] -> [..., o]

    Args:
        x, weight, bias: The operands.
        layer: The layer that has these parameters. It can keep packed weights.
    """
    if torch.compiler.is_compiling():
        return _onednn(x, weight, bias) if _in_frozen_graph(x, weight, bias) else None
    if not can_use_onednn(x, weight, bias):
        return None
    if not _needs_grad(x, weight, bias):
        return _onednn(x, weight if layer is None else packed_weight(layer, weight, x), bias)
    if x.dtype is torch.float32:
        out: torch.Tensor = _Linear.apply(x, weight, bias)
        return out
    return None  # in bf16 the layer itself uses oneDNN, with its gradient


def can_use_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether oneDNN may be called directly, and computes what `nn.Linear` would.

    Shapes and dtypes that do not fit are left to `nn.Linear`, which reports them. This runs for
    every layer, so the order and the form of the checks are for speed. A compiler must not be
    active.
    """
    if is_observed():  # checked first, because a tracer would record what follows
        return False
    if not (is_ordinary(x) and is_ordinary(weight)):
        return False
    dtype = x.dtype
    if dtype not in ONEDNN_DTYPES or weight.dtype is not dtype:
        return False
    if x.dim() < 2 or weight.dim() != 2 or x.size(-1) != weight.size(1):
        return False
    if x.numel() == 0 or x.numel() * weight.size(0) < MIN_PRODUCT:
        return False
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return False
    return bias is None or bool(
        is_ordinary(bias)
        and bias.dtype is dtype
        and bias.dim() == 1
        and bias.numel() == weight.size(0)
        and bias.is_contiguous()
    )


def _weights(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias. To read them as attributes takes as long as all checks together."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    return layer.weight, layer.bias  # one was replaced by a tensor that is no parameter


def _is_gelu(act: nn.Module) -> bool:
    return type(act) is nn.GELU and act.approximate == "none" and is_plain(act)


def _linear_gelu(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor | None:
    """Return the exact GELU of `layer(x)`, computed in one pass, or None if that is not possible or
    a gradient is needed."""
    weight, bias = _weights(layer)
    if can_use_onednn(x, weight, bias) and not _needs_grad(x, weight, bias):
        return _onednn(x, packed_weight(layer, weight, x), bias, "gelu")
    return None


def _in_frozen_graph(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether PyTorch compiles for inference with constant weights (freezing), where it
    calls MKL for fp32 products. Without constant weights, the compiler refuses the operator."""
    fits = (
        not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and all(
            type(t) in (torch.Tensor, nn.Parameter) and t.is_cpu and t.dtype is torch.float32
            for t in ((x, weight) if bias is None else (x, weight, bias))
        )
        and x.dim() > 1
    )
    if not fits:
        return False
    from torch._inductor import (
        config,
    )  # here, because it takes a while and only a compiler needs it

    return bool(config.freezing)


class _Linear(torch.autograd.Function):
    """A linear layer in fp32 whose three products (output and both gradients) are computed by
    oneDNN, or that of the gradient of weights by MKL: see `MKL_FOR_WEIGHTS`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _gradient(grad, weight.t()) if need_x else None,
            _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return grad^T x. [n, o], [n, i] -> [o, i]"""
    return grad.t() @ x if MKL_FOR_WEIGHTS else _gradient(grad.t(), x.t())


def _gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x weight^T, as a step of the backward pass.

    With create_graph=True it is differentiated again, which oneDNN's operator cannot be. Modes and
    transforms can be active here that were not active in the forward pass.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return F.linear(x, weight)
    if not are_alike(x, weight) or not can_use_onednn(x, weight, None):
        return F.linear(x, weight)
    return _onednn(x, weight, None)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    algorithm = "none" if activation == "gelu" else ""  # "none": the exact GELU, by erf
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, activation, [], algorithm
    )
    return out


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of products that the private operator of PyTorch can compute here.

    Every private probe is called here once. If a version of PyTorch has renamed or changed one, the
    plain layers are used. oneDNN has no product in bf16 for processors without AVX-512, where
    PyTorch has one of its own.
    """
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if _is_computed(dtype))


def _is_computed(dtype: torch.dtype) -> bool:
    try:
        if not PROBES_EXIST or not torch.backends.mkldnn.is_available():
            return False
        is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        if dtype is torch.bfloat16 and is_x86 and not has_bf16_instructions():
            return False  # the weights would be converted again for each chunk of windows
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(3, 4, device="cpu", dtype=dtype)
        x = torch.ones(2, 3, device="cpu", dtype=dtype)
        torch.compiler.is_compiling(), torch.compiler.is_exporting(), is_observed()
        all_plain(layer), are_alike(x, x), is_ordinary(x)
        with torch.no_grad():
            plain = F.gelu(F.linear(x, layer.weight, layer.bias))
            pack_weights(layer)
            weights = layer.weight, packed_weight(layer, layer.weight, x)
            ours = [_onednn(x, weight, layer.bias, "gelu") for weight in weights]
            atol = 1e-5 if dtype is torch.float32 else 0.05
            return all(torch.allclose(found, plain, atol=atol) for found in ours)
    except Exception:  # whatever a private name raises that has changed its meaning
        return False


ONEDNN_DTYPES = _onednn_dtypes()
HAS_ONEDNN = torch.float32 in ONEDNN_DTYPES


# Windows in chunks that fit the cache -------------------------------------------------------------


def chunk_tokens(blocks: Sequence[Any], x: torch.Tensor) -> int | None:
    """Return how many tokens of [b, (w t), c] go through windowed blocks at a time.

    None means all at once: on other devices, for gradients, for few tokens, or if a part of a block
    has been hooked or replaced and could see, or depend on, more than a window.
    """
    if not HAS_ONEDNN or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if is_observed() or not is_ordinary(x) or x.dtype not in ONEDNN_DTYPES:
        return None
    first = blocks[0]
    if not is_plain(first):
        return None
    window = first.attn.q_stride * first.attn.window_size
    if not window:  # pooling has merged the windows
        return None
    row_bytes = MLP_RATIO * first.dim_out * x.element_size()
    tokens = int(max(1, CHUNK_BYTES // (row_bytes * window)) * window)
    if tokens >= x.shape[0] * x.shape[1]:
        return None
    return tokens if all(map(all_plain, blocks)) else None


def run_in_chunks(blocks: Sequence[nn.Module], x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Run chunks of `tokens` tokens through all blocks, one by one. b (w t) c -> b (w t') c'"""
    done = []
    for chunk in x.reshape(1, -1, x.shape[-1]).split(tokens, 1):
        for block in blocks:
            chunk = block(chunk)
        done.append(chunk)
    return torch.cat(done, 1).view(x.shape[0], -1, done[0].shape[-1])
