"""Linear layers by the fastest kernel that the device has; everywhere else, PyTorch's own.

On a CPU, PyTorch gives fp32 products to MKL, which on processors of other makers runs at half the
speed of oneDNN (measured on a Zen 5: 100 against 225 GFLOP/s a core), and in bf16 to oneDNN without
the activation that it could apply on the way. `linear` calls oneDNN itself, through the operator
that PyTorch's own compiler uses. Results agree within rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16)


class Linear(nn.Linear):
    """`nn.Linear`, with its parameters and their names, through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim_in] -> [..., dim_out]"""
        return linear(x, self.weight, self.bias)

    def then_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU (by the error function) of it, in one pass where that can be."""
        if takes_onednn(x) and not _needs_grad(x, self.weight, self.bias):
            return _onednn(x, self.weight, self.bias, "gelu")
        return F.gelu(self(x))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias. [..., i], [o, i], [o] -> [..., o]"""
    if not takes_onednn(x):
        if x.dtype is torch.float32 and x.is_cpu and _in_frozen_graph():
            return _onednn(x, weight, bias)
        return F.linear(x, weight, bias)
    if not _needs_grad(x, weight, bias):
        return _onednn(x, weight, bias)
    if x.dtype is torch.float32:
        out: torch.Tensor = _Linear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)  # oneDNN already, with its gradient


def takes_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN may be called on `x` directly: plainly, with nobody looking over PyTorch's
    shoulder (autocast, the compiler, an exporter, a counter of operations)."""
    return bool(
        not torch.compiler.is_compiling()
        and not _is_overseen()  # before anything is asked of `x`: tracers would record it
        and x.is_cpu
        and x.dtype in _DTYPES
        and x.numel() > 0
        and HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def _is_overseen() -> bool:
    """Whether a tracer, a mode of dispatch or a functional transform is at work."""
    return bool(
        torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _in_frozen_graph() -> bool:
    """Whether PyTorch's compiler is making a program of constants: it would call MKL in fp32."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and HAS_ONEDNN
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes into the module or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Linear(torch.autograd.Function):
    """The layer and its gradients, all three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        # With create_graph=True this is differentiated in turn, which the operator cannot be.
        product = F.linear if torch.is_grad_enabled() else _onednn
        return (
            product(grad, weight.t(), None) if need_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    algorithm = "none" if activation == "gelu" else ""  # of GELU: by the error function
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, activation, [], algorithm
    )
    return out


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_onednn() -> bool:
    """The operator is private, and so are the probes: they are tried before they are relied on."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        _is_overseen()
        x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
        plain = F.gelu(F.linear(x, weight, bias))
        return torch.allclose(_onednn(x, weight, bias, "gelu"), plain, atol=1e-5)
    except (AttributeError, RuntimeError):
        return False


HAS_ONEDNN = _has_onednn()
