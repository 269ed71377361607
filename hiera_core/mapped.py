"""Where memory-mapped tensors lie on the disk, so that the kernel can copy them from file to file.

A plain copy of a file never enters the program's memory; writing mapped memory does, and takes
several times as long. Linux only: elsewhere nothing is found, and tensors are written as usual.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Region:
    """A stretch of memory that a file is mapped to."""

    start: int
    end: int
    offset: int  # of its start in the file
    inode: int
    path: str


class Mapped:
    """The files mapped at the time of the call, opened when one is copied from."""

    def __init__(self) -> None:
        self.regions = sorted(_regions(), key=lambda region: region.start)
        self.starts = [region.start for region in self.regions]
        self.files: dict[str, int | None] = {}

    def copy(self, tensor: torch.Tensor, target: int) -> bool:
        """Append a tensor's bytes to an open file, if they can be had from another.

        Memory must not have been written to since it was mapped: it is the file that is copied.
        """
        if tensor.is_cuda or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        at = tensor.data_ptr()
        region = self.regions[i] if (i := bisect.bisect(self.starts, at) - 1) >= 0 else None
        if region is None or at + tensor.nbytes > region.end:
            return False
        source = self._open(region)
        if source is None:
            return False
        offset, left = region.offset + at - region.start, tensor.nbytes
        while left:
            done = os.sendfile(target, source, offset, left)
            if not done:
                raise OSError(f"{region.path} has become shorter")
            offset, left = offset + done, left - done
        return True

    def close(self) -> None:
        for handle in self.files.values():
            if handle is not None:
                os.close(handle)

    def _open(self, region: Region) -> int | None:
        if region.path not in self.files:
            self.files[region.path] = None
            with contextlib.suppress(OSError):
                handle = os.open(region.path, os.O_RDONLY)
                if os.fstat(handle).st_ino == region.inode:
                    self.files[region.path] = handle
                else:  # another file by now
                    os.close(handle)
        return self.files[region.path]


def _regions() -> Iterator[Region]:
    """`7f..-7f.. r--p 00000000 fe:00 1234  /path`"""
    if not MAPS.exists() or not hasattr(os, "sendfile"):
        return
    for line in MAPS.read_bytes().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(b"/") and fields[4] != b"0":
            start, end = (int(part, 16) for part in fields[0].split(b"-"))
            yield Region(start, end, int(fields[2], 16), int(fields[4]), os.fsdecode(fields[5]))
