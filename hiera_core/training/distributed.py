"""Processes of a training run: how they join, collectives, and parallel models (DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..device import exact_fp32, select_device
from ..errors import DeviceError, HieraError, TrainingError, UsageError
from ..models.encoder import unwrap_model as unwrap_model
from ..models.hiera import HieraEncoder
from .recipe import Parallel

# Found in the message of the RuntimeError that PyTorch raises when another process is lost.
LOST_PROCESS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once
# For processes that only meet at the end, when some may have finished hours before the others.
PATIENT = timedelta(days=1)
LAUNCH_HINT = (
    "start the processes by torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each"
)


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen from one of them.

    Args:
        device: The device of this process.
        rank: Rank of this process, from 0.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the main process, the only one that writes files and messages."""
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, float64 on the CPU.

        The sum is computed on the GPU under CUDA, where NCCL needs it to be, and else on the CPU,
        because MPS has no float64.
        """
        where = self.device if self.device.type == "cuda" else torch.device("cpu")
        values = tensor.to(where).double()
        if self.size > 1:
            dist.all_reduce(values)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. It is exchanged on the CPU, so that
        nothing waits for a GPU."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, to every process.

        PyTorch pickles the values. They come from the processes of this run, never from a file.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        self.gather(None)

    @contextlib.contextmanager
    def main_process_step(self) -> Iterator[bool]:
        """Yield whether this is the main process, for a block in which only that one works.

        At the end, all processes wait for the main process, and an error for the user
        (`HieraError`) that it has raised is raised in all of them, so that none is left waiting.
        """
        errors: list[HieraError | None] = [None]
        try:
            yield self.is_main_process
        except HieraError as error:
            if not self.is_main_process:
                raise
            errors = [error]
        if self.size > 1:  # as in `gather`, the pickle is from a process of this run
            dist.broadcast_object_list(errors)
        if errors[0] is not None:
            raise errors[0]

    def parallelize(
        self,
        model: HieraEncoder,
        parallel: Parallel = "ddp",
        precision: torch.dtype = torch.float32,
    ) -> nn.Module:
        """Return the model prepared for training on all processes.

        Args:
            model: The model, on this process's device. FSDP changes it in place.
            parallel: `ddp` keeps a copy of the model in each process; `fsdp` shards its
                parameters, block by block (FSDP2).
            precision: dtype of autocast. With bf16, FSDP gathers the weights of blocks in bf16,
                runs blocks on bf16 tokens, and adds gradients in fp32. What is outside of blocks is
                small, and stays in fp32.
        """
        if parallel == "fsdp" and self.size > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import (
                MixedPrecisionPolicy,
                fully_shard,
                register_fsdp_forward_method,
            )

            mesh = init_device_mesh(self.device.type, (self.size,))
            policy = MixedPrecisionPolicy()
            if precision is torch.bfloat16:
                policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for block in (*model.blocks, *getattr(model, "decoder_blocks", ())):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh)
            register_fsdp_forward_method(model, "embed")  # for a probe
            return model
        if self.size > 1:
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        return model


@contextlib.contextmanager
def join_processes(device: str = "auto", timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun started. Without torchrun, yield a world of one process.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. With several processes on CUDA, torchrun's
            LOCAL_RANK selects the GPU.
        timeout: How long a process waits for another one that hangs.

    Raises:
        DeviceError: The device does not exist.
        TrainingError: Another process has ended or cannot be reached.
        UsageError: A variable that torchrun sets is missing or makes no sense.
    """
    size = _launch_number("WORLD_SIZE", 1, default="1")
    selected = select_device(device)
    is_exact = exact_fp32() if selected.type == "cuda" else contextlib.nullcontext()
    if size == 1:
        with is_exact:
            yield World(selected)
        return
    try:
        selected = _join(selected, size, timeout)
        with is_exact:
            yield World(selected, dist.get_rank(), size)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or LOST_PROCESS.search(str(error))
        if isinstance(error, HieraError) or not lost:
            raise
        raise TrainingError(
            "another process of the run has ended, or cannot be reached",
            "its own message gives the reason; restart all processes with --resume auto",
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(device: torch.device, size: int, timeout: timedelta) -> torch.device:
    """Join the process group of `size` processes, and return the device of this process.

    Raises:
        DeviceError: There are more processes than GPUs.
        TrainingError: The processes cannot find one another.
        UsageError: A variable that torchrun sets is missing or makes no sense.
    """
    _launch_number("RANK", 0, size - 1)
    host, port = os.environ.get("MASTER_ADDR", ""), _launch_number("MASTER_PORT", 0, 65535)
    if not host:
        raise UsageError("MASTER_ADDR is missing", LAUNCH_HINT)
    options: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if device.type == "cuda":
        rank, count = _launch_number("LOCAL_RANK", 0, default="0"), torch.cuda.device_count()
        if rank >= count:
            raise DeviceError(
                f"this machine has {count} GPUs, too few for process {rank + 1}",
                f"use --nproc-per-node {count}",
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        # If a process is lost, NCCL by default aborts the others. Mode 2 only ends the
        # communication, so that the next collective raises an error, for which `join_processes`
        # has words.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        # Python objects are exchanged by gloo, which notices at once that another process has
        # ended.
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    try:
        dist.init_process_group(**options)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise TrainingError(
                f"port {port} of this machine is in use by another program",
                "give another one: torchrun --master-port N, or MASTER_PORT",
            ) from error
        raise TrainingError(
            f"the processes of the run cannot find one another at {host}:{port}",
            "are all of them running, and can they reach this address (MASTER_ADDR, MASTER_PORT)?",
        ) from error
    return device


def _launch_number(name: str, lowest: int, highest: int = sys.maxsize, default: str = "") -> int:
    """Return the value of a variable that torchrun sets.

    Raises:
        UsageError: It is missing and has no default, or is no number from `lowest` to `highest`.
    """
    text = os.environ.get(name) or default
    if not text:
        raise UsageError(f"{name} is missing", LAUNCH_HINT)
    if not re.fullmatch(r"[0-9]{1,18}", text) or not lowest <= int(text) <= highest:
        limit = f"from {lowest} to {highest}" if highest < sys.maxsize else f"of at least {lowest}"
        raise UsageError(f"{name} is {text!r:.60}, no number {limit}", LAUNCH_HINT)
    return int(text)


def without_gradient_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which backward accumulates gradients without synchronising them.

    Use it for all backward passes of a step except the last.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        return _fsdp_without_gradient_sync(model)
    return contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP has gathered, so that changes to the shards take effect."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextlib.contextmanager
def _fsdp_without_gradient_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
