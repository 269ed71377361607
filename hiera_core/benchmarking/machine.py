"""The machine that measures, and the settings that depend on it."""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..device import (
    dtype_name,
    has_native_bf16,
    select_device,
    select_dtype,
    tf32_is_asked_for,
    training_dtype,
)
from ..errors import UsageError
from ..inference.batching import DEFAULT_BATCH_SIZES
from ..process.cores import allowed_cores
from ..records import Kind
from ..version import __version__
from ..zoo import Family
from .job import Mode, RunLength

MAX_SECONDS = 3600  # of a measurement
# A CPU can be a hundred times slower than a GPU, so it does fewer runs of the same models.
LENGTHS = {
    "cpu": RunLength(seconds=3, runs=10, max_seconds=12, min_runs=3),
    "cuda": RunLength(seconds=3, runs=40, max_seconds=30, min_runs=10),
    "mps": RunLength(seconds=3, runs=20, max_seconds=20, min_runs=5),
    "xpu": RunLength(seconds=3, runs=40, max_seconds=30, min_runs=10),
}
# From files to answers: a run is a pass over all files.
WHOLE_RUNS = RunLength(seconds=5, runs=3, max_seconds=30, min_runs=1, round_seconds=0.3)
# Batch sizes for the modes `grad` and `train`.
TRAIN_BATCH: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 4, "cuda": 64, "mps": 8, "xpu": 64},
    "video": {"cpu": 1, "cuda": 8, "mps": 1, "xpu": 8},
}


@dataclass
class Header:
    """Machine, versions and settings of a set of measurements."""

    device: str  # cpu, cuda, cuda:N or mps
    machine: str
    cores: int
    dtype: str
    hiera: str = __version__
    torch: str = torch.__version__
    python: str = platform.python_version()
    accelerator: str | None = None  # driver, clocks, attention kernels and TF32 of a GPU
    changes: list[str] = field(default_factory=list)  # differences from the settings on a GPU

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the header as lines of text."""
        first = (
            f"{self.machine}, {self.dtype}; hiera {self.hiera}, torch {self.torch}, "
            f"Python {self.python}"
        )
        return [first, *([self.accelerator] if self.accelerator else []), *self.changes]


def settings(
    device: str, dtype: str, mode: Mode, seconds: float | None
) -> tuple[Header, RunLength]:
    """Return the header, with the device and dtype to use, and how long to measure.

    Args:
        device, dtype: See `select_device` and `select_dtype`.
        mode: What the jobs compute.
        seconds: Seconds of each measurement, or None for the default of the device.

    Raises:
        UsageError: `seconds` is not above 0, or is more than an hour; see also `select_device` and
            `select_dtype`.
        DeviceError: See `select_device`.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"seconds is {seconds}", "give a number above 0")
    if seconds is not None and seconds > MAX_SECONDS:
        raise UsageError(f"seconds is {seconds:g}", f"give at most {MAX_SECONDS}")
    chosen_device = select_device(device)
    kind = chosen_device.type
    if dtype == "auto" and (mode == "train" or (kind == "cuda" and mode == "grad")):
        chosen_dtype = training_dtype(chosen_device)
    else:
        chosen_dtype = select_dtype(dtype, chosen_device)
    length = WHOLE_RUNS if mode == "files" else LENGTHS[kind]
    if seconds is not None and mode == "files":
        length = RunLength(seconds, runs=1, max_seconds=seconds, min_runs=1, round_seconds=0.3)
    elif seconds is not None:
        length = RunLength(
            seconds, runs=5, max_seconds=seconds, min_runs=5, round_seconds=length.round_seconds
        )
    header = Header(
        str(chosen_device), _machine(chosen_device), allowed_cores(), dtype_name(chosen_dtype)
    )
    if kind == "cuda":
        header.accelerator = _accelerator(chosen_device)
    if kind == "cpu":
        header.changes = _changes(header.dtype, dtype == "auto", mode, length)
    return header, length


def batch_for(kind: Kind, device: str, mode: Mode, family: Family = "hiera") -> int:
    """Return the default batch size. SAM 2's images have 21 times as many pixels as others."""
    table = TRAIN_BATCH if mode in ("grad", "train") else DEFAULT_BATCH_SIZES
    size = table[kind][device.partition(":")[0]]
    return max(1, size // 16) if family == "hieradet" else size


def _changes(dtype: str, is_auto: bool, mode: Mode, length: RunLength) -> list[str]:
    """Return how the settings on a CPU differ from those on a GPU, as lines of text."""
    reasons = {
        "bf16": "bf16 in place of fp16, which is slow on a CPU",
        "fp32": "fp32 in place of fp16: this CPU has no bf16 that is faster",
    }
    if is_auto and mode == "train":
        change = f"{dtype} in place of bf16, as `hiera train` chooses"
    elif is_auto:
        change = reasons[dtype]
    elif dtype == "bf16" and not has_native_bf16():
        change = "bf16 as requested, which is slower than fp32 on this CPU"
    else:
        change = f"{dtype} as requested"
    if mode == "files":
        return [f"On a CPU: {change}; smaller batches."]
    usual, slow = (
        f"{seconds:g} s and {runs} runs"
        for seconds, runs in (
            (length.seconds, length.runs),
            (length.max_seconds, length.min_runs),
        )
    )
    end = usual if slow == usual else f"{usual}, or after {slow}"
    return [
        f"On a CPU: {change}; smaller batches; a measurement ends after {end} (on a GPU: 40 runs)."
    ]


def _accelerator(device: torch.device) -> str:
    """Return the driver and the clocks of a GPU, and how PyTorch uses it, as a line of text."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    found: list[str] = []
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        answer = subprocess.run(
            [*command, f"--id=GPU-{uuid.removeprefix('GPU-')}"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        found = [part.strip() for part in answer.stdout.split("\n")[0].split(",")]
    words = ["driver unknown"]
    if len(found) == len(names):
        driver, now, most, power = found
        words = [f"driver {driver}", f"clock {now} of {most}", f"power limit {power}"]
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    kernels = ", ".join(name for name, is_on in enabled.items() if is_on) or "none"
    tf32 = "on" if tf32_is_asked_for() else "off"
    return "; ".join([*words, f"attention kernels: {kernels}", f"TF32 {tf32}"])


def _machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    flags = ", native bf16" if has_native_bf16() else ""
    return f"{_processor()}, {allowed_cores()} cores{flags}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
