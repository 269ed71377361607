"""Where and in which number format to compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import DeviceError, UsageError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str = "auto") -> torch.device:
    """`auto` (CUDA, then MPS, then CPU), or the one asked for; never silently another.

    Raises:
        UsageError: no such name.
        DeviceError: this machine has no such device.
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
    """`auto`: fp16 on CUDA, bf16 on a CPU with native instructions for it, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_native_bf16() else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_native_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16, AMX); emulation is slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`; for other dtypes torch's own name, such as `float64`."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type for it; the CPU allocator only a message."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text  # the CPU allocator on Linux
        or "not enough memory" in text  # and on Windows
        or "out of memory" in text
    )


def compile_for_inference(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The fastest form that torch.compile makes of it, for inputs of one shape.

    On a CPU weights are constants of the program, packed for its products; on CUDA kernels are
    chosen by trying, and launches recorded once. Weights must not change afterwards.
    """
    if device.type != "cpu":
        return torch.compile(function, dynamic=False, mode="max-autotune")
    compiled = torch.compile(function, dynamic=False)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        # As an option of torch.compile it comes too late: tracing looks for it, too.
        with inductor.patch(freezing=True):
            return compiled(*args, **kwargs)

    from torch._inductor import config as inductor

    return frozen


def compile_for_training(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The same for what is differentiated: on CUDA with launches recorded once."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, dynamic=False, mode=mode)


@contextlib.contextmanager
def compile_faults() -> Iterator[None]:
    """Errors of torch.compile, in words."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise DeviceError(
            f"torch.compile failed ({type(error).__name__})",
            "it needs a C++ compiler (or Triton on a GPU); or leave out --compile",
        ) from error


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations in one thread.

    For passes over weights, which only wait for memory: with more threads, torch would synchronise
    them at every tensor.
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
