"""How memory is allocated: what a layer frees, the next layer gets back without the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# Numbers of `mallopt` in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# Blocks above this size are memory of their own, which the system gets back when they are freed.
# Older versions of glibc (before about 2.35) refuse it; then all blocks are kept.
OWN_MEMORY_BYTES = 1 << 30
# Free memory at the end of the heap that is kept; the largest number that `mallopt` takes.
KEPT_BYTES = (1 << 31) - 1
# Variables by which a user chooses the same, or another allocator.
USERS_CHOICES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # a setting of PyTorch


def may_choose() -> bool:
    """Return whether the user has left the choice to us, on a system where there is one."""
    return sys.platform == "linux" and not any(name in os.environ for name in USERS_CHOICES)


def environment() -> dict[str, str]:
    """Return the variables of this process, and huge pages, for a process that imports PyTorch
    before it can call `keep_freed_memory`."""
    return ({HUGE_PAGES: "1"} if may_choose() else {}) | dict(os.environ)


def keep_freed_memory() -> bool:
    """Let this process keep blocks of memory that it frees. Return whether it will.

    By default, glibc returns each block above 32 MiB to the system as soon as it is freed, and gets
    a new one for the next layer, which the system fills with zeros page by page. PyTorch also asks
    for pages of 2 MiB instead of 4 KiB, where the system has them. On two cores of an Intel Xeon
    with AMX, this makes Hiera-B at batch 8 about 1.1 times as fast, and a training step of MAE
    Hiera-T 1.1 (fp32) to 1.2 times (bf16). In return, the process may stay as large as it was at
    its peak.

    Nothing changes where the user has chosen (see `USERS_CHOICES`), and for another C library.
    For huge pages, this has to be called before PyTorch is imported.
    """
    if not may_choose():
        return False
    os.environ.setdefault(HUGE_PAGES, "1")
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        kept = mallopt(M_MMAP_THRESHOLD, OWN_MEMORY_BYTES) or mallopt(M_MMAP_MAX, 0)
        return bool(kept and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
    return False
