"""`deterministic: true`: only kernels whose results are the same in every run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from ...errors import DeviceError

# A workspace with which cuBLAS adds in the same order every time. PyTorch refuses others.
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Found in the messages of PyTorch about operations that have no such kernel.
SIGNS = ("deterministic implementation", WORKSPACE[0])


@contextlib.contextmanager
def deterministic_kernels(enable: bool) -> Iterator[None]:
    """Use deterministic kernels within the block, if `enable` is set.

    cuBLAS reads its setting once, when it starts. So the block has to begin before this process
    multiplies matrices on a GPU.
    """
    if not enable:
        yield
        return
    os.environ.setdefault(*WORKSPACE)
    settings: Any = torch.utils.deterministic  # whose attributes its type stub does not know
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    # Every kernel of ours writes all of its output, so filling it first would only take time.
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Convert PyTorch's error about a kernel that is not deterministic to a `DeviceError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceError) or not any(sign in str(error) for sign in SIGNS):
            raise
        operation = str(error).split(" ", 1)[0]
        raise DeviceError(
            f"deterministic: true, and PyTorch has no deterministic kernel for {operation} here",
            "leave out deterministic, or run on a CPU",
        ) from error
