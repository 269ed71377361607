"""Choose the device and the dtype, and compile for a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import DeviceError, UsageError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str = "auto") -> torch.device:
    """Return a device by its name. `auto` is CUDA if available, else MPS, else the CPU.

    Raises:
        UsageError: The name is unknown.
        DeviceError: This machine has no such device. Another one is never chosen silently.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if _has_cuda() else "mps" if _has_mps() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        hint = did_you_mean(kind, ("cpu", "cuda", "mps")) or "use auto, cpu, cuda or mps"
        raise UsageError(f"unknown device {name!r}", hint)
    if (kind == "cuda" and not _has_cuda()) or (kind == "mps" and not _has_mps()):
        raise DeviceError(f"device {name!r} is not available here", "use --device cpu")
    return torch.device(name)


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a dtype by its name: one of DTYPES, or `auto`.

    `auto` is fp16 on CUDA, bf16 on a CPU with native instructions for it, and fp32 elsewhere.

    Raises:
        UsageError: The name is unknown.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_native_bf16() else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_native_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 (AVX512-BF16, AMX). Emulation is slow."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`; for other dtypes torch's own name, such as `float64`."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


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
    """Convert errors of torch.compile to a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise DeviceError(
            f"torch.compile failed ({type(error).__name__})",
            "install a C++ compiler (or Triton on a GPU), or leave out --compile",
        ) from error


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations in one thread.

    This is for passes over weights, which are limited by memory bandwidth. More threads would only
    add a synchronisation at every tensor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
