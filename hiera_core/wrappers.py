"""What is inside the wrappers of PyTorch and PEFT."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .errors import UsageError

# Wrappers that call the model in their attribute `module`.
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def find_inside(model: object, is_wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
    """Return the wanted model inside of wrappers, or None if there is none.

    The wrappers are those of torch.compile, DataParallel, DDP, FSDP, averaged weights and PEFT.
    """
    while isinstance(model, nn.Module) and not is_wanted(model):
        model = _unwrap_once(model)
    return model if isinstance(model, nn.Module) else None


def no_hiera(model: object) -> UsageError:
    """Return the error about a model that is not a Hiera."""
    return UsageError(
        f"a model of type {type(model).__name__} is not a Hiera model",
        "give a model of this package; it may be compiled, or wrapped by DDP or PEFT",
    )


def _unwrap_once(wrapper: nn.Module) -> object:
    if isinstance(wrapper, WRAPPERS):
        return wrapper.module
    for name in ("_orig_mod", "_fsdp_wrapped_module"):  # torch.compile, FSDP1
        if name in wrapper._modules:
            return wrapper._modules[name]
    get_base_model = getattr(wrapper, "get_base_model", None)  # PEFT
    return get_base_model() if callable(get_base_model) else None
