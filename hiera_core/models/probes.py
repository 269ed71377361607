"""Whether a layer may be replaced by a kernel that only computes its output.

PyTorch lets a program record, change or move what a layer does: tracers, modes, functional
transforms, forward-mode derivatives, tensor subclasses, weights on other devices, hooks, replaced
methods. A kernel that is called directly would bypass all of these. So it is called only if the
functions below find none of them. They list what is known to be harmless; everything else counts as
a reason to run the layer itself.

Most names that they read are private to PyTorch. `cpu.HAS_ONEDNN` is True only if all of them
exist, and nothing here is called otherwise. They are called for every layer, so they are imported
by name, which saves a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

try:
    from torch._C import (
        _dispatch_keys,
        _get_mkldnn_enabled,
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # another version of PyTorch
    PROBES_EXIST = False
else:
    PROBES_EXIST = True

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

ORDINARY_TYPES = (torch.Tensor, nn.Parameter)

# Profilers and sharding libraries replace these.
PLAIN_LINEAR, PLAIN_GELU, PLAIN_CALL = F.linear, F.gelu, nn.Module.__call__

# Modules whose forward is known, each with that forward. Their output for a window depends on that
# window alone. A subclass, or a class whose forward has been replaced, is not known.
KNOWN_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    known: known.forward
    for known in (nn.Linear, nn.GELU, nn.ReLU, nn.SiLU, nn.LayerNorm, nn.RMSNorm, nn.Identity)
}


def known_forward(cls: ModuleClass) -> ModuleClass:
    """Add a class to the known ones. This is a decorator of classes."""
    KNOWN_FORWARDS[cls] = cls.forward
    return cls


def is_watched() -> bool:
    """Return whether each operation has to be seen by a tracer, a mode, a functional transform, or
    forward-mode differentiation."""
    return bool(
        _get_tracing_state()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_observed() -> bool:
    """Return whether each operation has to be seen (see `is_watched`), or is changed by autocast, a
    switch or a replaced function."""
    return is_watched() or bool(
        _is_any_autocast_enabled()
        or not _get_mkldnn_enabled()
        or F.linear is not PLAIN_LINEAR
        or F.gelu is not PLAIN_GELU
    )


def is_ordinary(tensor: Any) -> bool:
    """Return whether this is a dense tensor on the CPU, and no subclass."""
    return (
        type(tensor) in ORDINARY_TYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def are_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same dispatch keys. A gradient that stands for several
    (with `is_grads_batched`) has others than the saved tensors."""
    return bool(_dispatch_keys(first).raw_repr() == _dispatch_keys(second).raw_repr())


def is_plain(module: nn.Module) -> bool:
    """Return whether calling the module runs the known forward of its class and nothing else."""
    known = KNOWN_FORWARDS.get(type(module))
    return (
        known is not None
        and type(module).forward is known
        and "forward" not in module.__dict__  # accelerate replaces it on the instance
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks of any kind, or a compiled call, would run when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or nn.Module.__call__ is not PLAIN_CALL
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def all_plain(module: nn.Module) -> bool:
    """Return whether the module and all modules in it are plain, in evaluation mode, and have
    ordinary parameters."""
    return all(
        is_plain(part)
        and not part.training
        and all(p is None or is_ordinary(p) for p in part._parameters.values())
        for part in module.modules()
    )
