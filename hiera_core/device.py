"""Choose the device and the dtype, and compile for a device."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import DeviceError, UsageError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Our names for those that PyTorch and its users have.
SHORT_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}


def select_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device by its name, such as `cuda` or `cuda:1`.

    `auto` is CUDA if available, else MPS, else the CPU.

    Raises:
        UsageError: The name is unknown.
        DeviceError: This machine has no such device. Another one is never chosen silently.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if _has_cuda() else "mps" if _has_mps() else "cpu"
    found = re.fullmatch(r"(cpu|cuda|mps)(?::([0-9]{1,9}))?", name)
    if found is None:
        hint = "use cuda" if name.startswith("gpu") else ""
        hint = hint or did_you_mean(name.partition(":")[0], ("cpu", "cuda", "mps"))
        raise UsageError(f"unknown device {name!r}", hint or "use auto, cpu, cuda, cuda:N or mps")
    kind, index = found.groups()
    if (kind == "cuda" and not _has_cuda()) or (kind == "mps" and not _has_mps()):
        raise DeviceError(f"device {name!r} is not available here", "use --device cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index is not None and int(index) >= count:
        last = kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise DeviceError(f"device {name!r} is not available here", f"use {last}")
    if index is None or kind != "cuda":
        return torch.device(kind)
    return torch.device(kind, int(index))


def select_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a dtype by its name: one of DTYPES or SHORT_NAMES, or `auto`. A dtype of PyTorch is
    accepted, too.

    `auto` is fp16 on CUDA, bf16 on a CPU with native instructions for it, and fp32 elsewhere.

    Raises:
        UsageError: The name is unknown.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_native_bf16() else torch.float32
    short = dtype_name(name)
    if short not in DTYPES:
        raise UsageError(f"unknown dtype {str(name)!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[short]


def has_native_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 (AVX512-BF16, AMX). Emulation is slow."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`; for other dtypes torch's own name, such as `float64`."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    CUDA raises its own type of error, but the CPU allocator raises a plain RuntimeError, which only
    its message identifies.
    """
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text  # the CPU allocator on Linux
        or "not enough memory" in text  # and on Windows
        or "out of memory" in text
    )


def compile_for_inference(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return the function compiled for inference on inputs of one shape.

    On a CPU, weights become constants of the program (freezing) and are packed for matrix products.
    On other devices, kernels are autotuned, and CUDA graphs are used where possible.
    Weights must not change afterwards.
    """
    if device.type != "cpu":
        return torch.compile(function, dynamic=False, mode="max-autotune")
    compiled = torch.compile(function, dynamic=False)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        # As an option of torch.compile, `freezing` would come too late: tracing already reads it.
        with inductor.patch(freezing=True):
            return compiled(*args, **kwargs)

    from torch._inductor import config as inductor

    return frozen


def compile_for_training(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return the function compiled for training on inputs of one shape. CUDA uses CUDA graphs."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, dynamic=False, mode=mode)


@contextlib.contextmanager
def translate_compile_errors() -> Iterator[None]:
    """Convert errors of torch.compile to a DeviceError. Running out of memory is none of them."""
    try:
        yield
    except RuntimeError as error:
        from_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not from_compiler or is_out_of_memory(error):
            raise
        raise DeviceError(
            f"torch.compile failed ({type(error).__name__})",
            "install a C++ compiler (or Triton on a GPU), or leave out --compile",
        ) from error


class _SingleThread:
    """How many threads are within `single_thread`, and what to restore after the last."""

    def __init__(self) -> None:
        self.lock, self.users, self.threads = threading.Lock(), 0, 1


_single = _SingleThread()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations in one thread.

    This is for passes over weights, which are limited by memory bandwidth. More threads would only
    add a synchronisation at every tensor.
    """
    # The setting is that of the process. Only the first of several threads saves it, and the last
    # one restores it, so that none restores the 1 of another.
    with _single.lock:
        if _single.users == 0:
            _single.threads = torch.get_num_threads()
        _single.users += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _single.lock:
            _single.users -= 1
            torch.set_num_threads(_single.threads if _single.users == 0 else 1)


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
