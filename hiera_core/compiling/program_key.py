"""What a compiled program depends on, as a key."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..models import probes
from ..version import __version__

OUR_MODULES = ("hiera_core.models.", "torch.nn.modules.")
PLAIN = (bool, int, float, str, type(None))


def program_key(model: nn.Module, function_name: str, arguments: Any, options: Any) -> str | None:
    """Return the key of the program of a model, 32 hexadecimal digits; None if the model holds
    something else than our layers and those of PyTorch, whose code is not known here.

    Args:
        model: The model. Its weights count, because the program holds them.
        function_name: Name of the function that is compiled.
        arguments: Its arguments: of tensors, shape, strides and dtype count.
        options: Options of the compiler.
    """
    if not all(_is_known(module) for module in model.modules()):
        return None
    digest = hashlib.sha256()
    for part in (function_name, repr(options), *_machine(), *_signature(arguments)):
        digest.update(f"{part}\n".encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {_settings(module)}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(bits.numpy().data)
    return digest.hexdigest()[:32]


def signature_of(arguments: Any) -> tuple[object, ...]:
    """Return what a program depends on in its arguments, as a key of a dictionary."""
    return (*_signature(arguments), torch.get_num_threads())


def _signature(arguments: Any) -> Iterator[str]:
    leaves, structure = _pytree.tree_flatten(arguments)
    yield str(structure)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()} {leaf.device}"
        else:
            yield repr(leaf)


def _machine() -> tuple[str, ...]:
    """Return what a program depends on besides the model. The number of threads is part of it."""
    return (
        __version__, _own_code(), torch.__version__, str(torch.version.git_version), sys.platform,
        platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    )  # fmt: skip


@functools.cache
def _own_code() -> str:
    """Return a digest of the code that is compiled: that of the models, and of this package."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(probes.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    """Return the processor and its instructions. A home folder can be shared by machines."""
    lines: list[str] = []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")) and line not in lines:
                lines.append(line)
    except OSError:
        lines = [platform.processor()]
    return "\n".join(lines)


def _is_known(module: nn.Module) -> bool:
    """Return whether the code of a layer is part of this package or of PyTorch, and nothing is
    attached to it that would run, too."""
    return (
        (type(module).__module__ + ".").startswith(OUR_MODULES)
        and all(map(_is_known_function, vars(module).values()))
        and not probes.has_hooks(module)
    )


def _is_known_function(value: object) -> bool:
    """Return whether an attribute is no function, or one of this package or of PyTorch. Others can
    replace `forward`, `encode` or the activation of a head."""
    if isinstance(value, functools.partial):
        value = value.func
    if not callable(value) or isinstance(value, nn.Module | torch.Tensor | type):
        return True
    return (getattr(value, "__module__", None) or "").startswith(("hiera_core.models.", "torch."))


def _settings(module: nn.Module) -> str:
    """Return the attributes of a layer that are numbers, texts or tuples of such."""
    found = {
        name: value
        for name, value in vars(module).items()
        if _is_plain(value) and (name == "_config" or not name.startswith("_"))
    }
    config = getattr(module, "config", None)
    return repr((sorted(found.items()), config if _is_plain(config) else None))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, PLAIN)
