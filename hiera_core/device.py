"""Choose the device and the dtype."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

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


KINDS = ("cpu", "cuda", "mps", "xpu")
NAMES = "auto, cpu, cuda, cuda:N, mps or xpu"
DEVICE_ERROR = re.compile(r"\b(CUDA|cuBLAS|cuDNN|HIP|XPU) error\b", re.IGNORECASE)
TF32_VARIABLE = "HIERA_TF32"  # 1 allows TF32 for fp32
# Which instructions for matrix products in bf16 the CPU has, and whether Intel made it.
HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
HAS_AVX512_BF16: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
IS_INTEL = "Intel" in str(getattr(torch.cpu, "get_capabilities", str)())


def select_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device by its name, such as `cuda` or `cuda:1`.

    `auto` is CUDA if available, else XPU, else MPS, else the CPU.

    Raises:
        UsageError: The name is unknown, or names several devices.
        DeviceError: This machine has no such device. Another one is never chosen silently.
    """
    name = str(name)
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _has(kind)), "cpu")
    if names_several(name):
        raise UsageError(
            f"{name!r} names several devices, and one is needed here",
            "predict, features and mae take several; train and eval use several under torchrun",
        )
    found = re.fullmatch(rf"({'|'.join(KINDS)})(?::([0-9]{{1,9}}))?", name)
    if found is None:
        hint = "use cuda" if name.startswith("gpu") else ""
        hint = hint or did_you_mean(name.partition(":")[0], KINDS)
        raise UsageError(f"unknown device {name!r}", hint or f"use {NAMES}")
    kind, index = found.groups()
    if not _has(kind):
        raise DeviceError(f"device {name!r} is not available here", "use --device cpu")
    count = _count(kind)
    if index is not None and int(index) >= count:
        last = kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise DeviceError(f"device {name!r} is not available here", f"use {last}")
    if index is None or kind in ("cpu", "mps"):
        return torch.device(kind)
    return torch.device(kind, int(index))


Devices: TypeAlias = str | torch.device | Sequence[str | torch.device]


def names_several(name: Devices) -> bool:
    """Return whether this is the form in which several devices are named; see `select_devices`."""
    if isinstance(name, str | torch.device):
        return str(name).endswith(":all") or "," in str(name)
    return isinstance(name, list | tuple)


def select_devices(name: Devices) -> list[torch.device]:
    """Return one device or several.

    Args:
        name: A device, see `select_device`; `cuda:all` or `xpu:all` for all of them; several in one
            text, such as `cuda:0,cuda:2`; or a list.

    Raises:
        UsageError, DeviceError: See `select_device`.
    """
    names = [name] if isinstance(name, str | torch.device) else name
    found: list[torch.device] = []
    for part in (part.strip() for one in names for part in str(one).split(",")):
        kind, _, which = part.partition(":")
        if which == "all":
            if kind not in ("cuda", "xpu"):
                raise UsageError(f"unknown device {part!r}", "use cuda:all or xpu:all")
            select_device(kind)  # raises an error if there is none
            found += [torch.device(kind, number) for number in range(_count(kind))]
        else:
            found.append(select_device(part))
    if not found:
        raise UsageError("no device is named", f"use {NAMES}")
    return found


def select_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a dtype by its name: one of DTYPES or SHORT_NAMES, or `auto`. A dtype of PyTorch is
    accepted, too.

    `auto` is fp16 on CUDA cards that compute it fast, bf16 on XPU and on a CPU that computes it
    faster than fp32, and fp32 elsewhere.

    Raises:
        UsageError: The name is unknown.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16 if has_fast_fp16(device) else torch.float32
        has_bf16 = device.type == "xpu" or (device.type == "cpu" and has_native_bf16())
        return torch.bfloat16 if has_bf16 else torch.float32
    short = dtype_name(name)
    if short not in DTYPES:
        raise UsageError(f"unknown dtype {str(name)!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[short]


def training_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that training uses by default: bf16 on devices that compute it natively,
    fp16 (with scaled losses) on other CUDA cards that compute that fast, and fp32 elsewhere."""
    if device.type not in ("cuda", "xpu"):
        return torch.float32
    if wide_half(device) is torch.bfloat16:
        return torch.bfloat16
    return torch.float16 if has_fast_fp16(device) else torch.float32


def wide_half(device: torch.device) -> torch.dtype:
    """Return the dtype for values that fp16 cannot hold: bf16 if a device computes it natively, and
    fp32 otherwise."""
    if device.type == "cuda":
        # NVIDIA's cards since Ampere do, older ones emulate it. AMD's that PyTorch runs on do.
        native = torch.version.hip is not None or _capability(device) >= (8, 0)
    else:
        native = device.type == "xpu" or (device.type == "cpu" and has_native_bf16())
    return torch.bfloat16 if native else torch.float32


def has_fast_fp16(device: torch.device) -> bool:
    """Return whether a CUDA card computes fp16 faster than fp32. Maxwell has no instructions for
    it, and the Pascal of gaming cards (6.1) has a 64th of the speed of fp32."""
    if torch.version.hip is not None:
        return True
    capability = _capability(device)
    return capability >= (7, 0) or capability in ((5, 3), (6, 0), (6, 2))


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA card. One that cannot be asked counts as new."""
    try:
        return torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):  # no driver, or PyTorch has no CUDA
        return (9, 0)


def has_native_bf16() -> bool:
    """Return whether the CPU has instructions that make bf16 faster than fp32.

    These are AMX, and AVX512-BF16 on AMD processors. On an Intel Xeon whose AMX was hidden by its
    virtual machine, the largest products reached 169 GFLOP/s in bf16 and 330 in fp32, and Hiera-B
    took 1.7 times as long in bf16.
    """
    return HAS_AMX or (HAS_AVX512_BF16 and not IS_INTEL)


def has_bf16_instructions() -> bool:
    """Return whether the CPU has any instructions for bf16. Without them it is emulated."""
    return HAS_AMX or HAS_AVX512_BF16


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`; for other dtypes torch's own name, such as `float64`."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)


def is_failure_of_device(error: BaseException) -> bool:
    """Return whether an error means that a device does not compute any more, whatever it is given.

    Some versions of PyTorch have a type for this; others raise a plain RuntimeError.
    """
    kind = getattr(torch, "AcceleratorError", None)
    is_known = kind is not None and isinstance(error, kind)
    return is_known or (isinstance(error, RuntimeError) and bool(DEVICE_ERROR.search(str(error))))


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


class _Tf32:
    """How many threads are within `exact_fp32`, and what to restore after the last."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, ("", "")


_tf32 = _Tf32()


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute fp32 in fp32. By default, PyTorch's convolutions on CUDA use TF32, which has the
    mantissa of fp16.

    TF32 is used if it was asked for: with HIERA_TF32=1 in the environment, or, in Python, with
    `torch.set_float32_matmul_precision("high")`.
    """
    cudnn: Any = torch.backends.cudnn
    conv, matmul = cudnn.conv, torch.backends.cuda.matmul
    with _tf32.lock:
        if _tf32.users == 0:
            _tf32.before = conv.fp32_precision, matmul.fp32_precision
            asked = tf32_is_asked_for()
            conv.fp32_precision = "tf32" if asked else "ieee"
            matmul.fp32_precision = "tf32" if asked else "ieee"
        _tf32.users += 1
    try:
        yield
    finally:
        with _tf32.lock:
            _tf32.users -= 1
            if _tf32.users == 0:
                conv.fp32_precision, matmul.fp32_precision = _tf32.before


def tf32_is_asked_for() -> bool:
    """Return whether TF32 may be used for fp32, see `exact_fp32`."""
    asked = os.environ.get(TF32_VARIABLE, "") == "1"
    return asked or torch.backends.cuda.matmul.fp32_precision == "tf32"


def empty_cache(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to a device."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type != "cpu" and torch.accelerator.is_available():
        with torch.device(device):
            torch.accelerator.empty_cache()


def _has(kind: str) -> bool:
    """Return whether this machine has a kind of device."""
    checks = {"cpu": lambda: True, "cuda": _has_cuda, "mps": _has_mps, "xpu": _has_xpu}
    return checks[kind]()


def _count(kind: str) -> int:
    """Return the number of devices of a kind."""
    if kind == "cuda":
        return torch.cuda.device_count()
    return torch.accelerator.device_count() if kind == "xpu" else 1


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _has_xpu() -> bool:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == "xpu"
