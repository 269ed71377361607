"""The tensors of a checkpoint in one file, in the format of safetensors, which holds no code.

The file holds whole tensors, also if the parameters are sharded: the processes gather one tensor at
a time, and the main process writes it. So any number of processes can read the file, and neither
writing nor reading needs memory for more than one tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

DTYPE_NAMES = {  # names in the header of a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def write_tensors(path: Path | None, tensors: Mapping[str, torch.Tensor]) -> str:
    """Gather tensors from all processes, and write them to a file.

    Args:
        path: The file; None in all processes but the main process, which help to gather only.
        tensors: Tensors by name, the same names in every process. They may be sharded.

    Returns:
        SHA-256 of the file; "" if `path` is None.

    Raises:
        OSError: The file cannot be written. It is raised when all tensors have been gathered,
            because the other processes wait for this one to take part.
    """
    # Readers map the file into memory, so tensors with larger elements come first (alignment).
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    gathered = map(whole_tensor, ordered.values())
    try:
        return "" if path is None else _write(path, _header(ordered), gathered)
    finally:
        for _ in gathered:
            pass


def read_tensors(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Read a file's tensors into existing tensors, after checking that all of them fit.

    Args:
        path: The file.
        targets: The tensors to copy into, by name. They may be sharded; then each process copies
            its part.

    Raises:
        ValueError: A tensor is missing, unknown, or has another shape or dtype.
        OSError, SafetensorError: The file cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in (*targets, *sorted(names)):
            if name not in names or name not in targets:
                raise ValueError(f"{'no' if name in targets else 'unknown'} tensor {name}")
        for name, target in targets.items():
            saved = file.get_slice(name)
            found = (saved.get_dtype(), tuple(saved.get_shape()))
            expected = (DTYPE_NAMES[target.dtype], tuple(target.shape))
            if found != expected:
                raise ValueError(
                    f"{name} is {found[0]} {found[1]}, not {expected[0]} {expected[1]}"
                )
        for name, target in targets.items():
            _copy(file.get_tensor(name), target)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered from all processes if it is sharded. All of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _copy(value: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor into another one, or into this process's part of a sharded one."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        # Every process has read the value, so no process sends it (src_data_rank).
        value = distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
    target.copy_(value)


def _write(path: Path, header: bytes, tensors: Iterator[torch.Tensor]) -> str:
    """Write a file, flush it to disk, and return its SHA-256."""
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the first bytes of a safetensors file: the length of the header, and the header."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
