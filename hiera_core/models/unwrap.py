"""The Hiera inside the wrappers of PyTorch and PEFT."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import UsageError
from .encoder import Encoder

# Wrappers that call the model in their attribute `module`.
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap_model(model: object) -> Encoder:
    """Return the Hiera inside of a wrapper, or the model itself if it has none.

    The wrappers are those of torch.compile, DataParallel, DDP, FSDP, averaged weights and PEFT. A
    model that is compiled, or has adapters, shares its parameters with the one that is returned;
    adapters stay active.

    Raises:
        UsageError: There is no Hiera inside. The message names the type of the model.
    """
    inner = find_model(model)
    if inner is None:
        raise UsageError(
            f"a model of type {type(model).__name__} is no Hiera",
            "give a model of this package; it may be compiled, or wrapped by DDP or PEFT",
        )
    return inner


def find_model(model: object) -> Encoder | None:
    """Return the Hiera inside of a wrapper, or None if there is none."""
    while isinstance(model, nn.Module) and not isinstance(model, Encoder):
        model = _unwrap_once(model)
    return model if isinstance(model, Encoder) else None


def _unwrap_once(wrapper: nn.Module) -> object:
    if isinstance(wrapper, WRAPPERS):
        return wrapper.module
    for name in ("_orig_mod", "_fsdp_wrapped_module"):  # torch.compile, FSDP1
        if name in wrapper._modules:
            return wrapper._modules[name]
    get_base_model = getattr(wrapper, "get_base_model", None)  # PEFT
    return get_base_model() if callable(get_base_model) else None
