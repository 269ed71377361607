"""What a measurement was taken on, and how a machine's settings differ from a GPU's."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..device import dtype_name, has_native_bf16, select_device, select_dtype
from ..inference.batching import DEFAULT_BATCH_SIZES
from ..records import Kind
from ..version import __version__
from .job import Mode, RunLength

# A CPU is a hundred times slower: runs are cut there, models never.
LENGTHS = {
    "cpu": RunLength(seconds=3, runs=10, limit=12, least=3),
    "cuda": RunLength(seconds=3, runs=40, limit=30, least=10),
    "mps": RunLength(seconds=3, runs=20, limit=20, least=5),
}
TRAIN_BATCH: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 4, "cuda": 64, "mps": 8},
    "video": {"cpu": 1, "cuda": 8, "mps": 1},
}


@dataclass
class Header:
    """Where and how rows were measured."""

    device: str  # cpu, cuda or mps
    machine: str
    cores: int
    dtype: str
    hiera: str = __version__
    torch: str = torch.__version__
    python: str = platform.python_version()
    changes: list[str] = field(default_factory=list)  # from a GPU's settings, and why

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        first = (
            f"{self.machine}, {self.dtype}; hiera {self.hiera}, torch {self.torch}, "
            f"Python {self.python}"
        )
        return [first, *self.changes]


def settings(
    device: str, dtype: str, mode: Mode, seconds: float | None
) -> tuple[Header, RunLength]:
    """The device, the dtype and how long to measure.

    Raises:
        UsageError, DeviceError: see `select_device`.
    """
    where = select_device(device)
    if dtype == "auto" and where.type == "cuda" and mode != "infer":
        number = torch.bfloat16  # gradients in fp16 need scaling
    else:
        number = select_dtype(dtype, where)
    length = LENGTHS[where.type]
    if seconds is not None:
        length = RunLength(seconds, 5, seconds, 5, length.turn)
    header = Header(where.type, _machine(where), os.cpu_count() or 1, dtype_name(number))
    if where.type == "cpu":
        header.changes = _changes(header.dtype, dtype == "auto", length)
    return header, length


def batch_for(kind: Kind, device: str, mode: Mode) -> int:
    """Inputs a pass where none is asked for."""
    table = DEFAULT_BATCH_SIZES if mode == "infer" else TRAIN_BATCH
    return table[kind][device]


def _changes(dtype: str, chosen: bool, length: RunLength) -> list[str]:
    reasons = {
        "bf16": "bf16 in place of fp16, which is slow on a CPU",
        "fp32": "fp32 in place of fp16: this CPU has no bf16 instructions",
    }
    if chosen:
        change = reasons[dtype]
    elif dtype == "bf16" and not has_native_bf16():
        change = "bf16 as asked for, which this CPU emulates slowly"
    else:
        change = f"{dtype} as asked for"
    return [
        f"On a CPU: {change}; smaller batches; a row ends after {length.limit:g} s and "
        f"{length.least} runs where a GPU has 40."
    ]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = ", native bf16" if has_native_bf16() else ""
    return f"{_processor()}, {cores} cores{flags}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
