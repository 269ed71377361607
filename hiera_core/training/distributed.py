"""Processes of a training run: how they join, collectives, and parallel models (DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..device import select_device
from ..errors import TrainingError
from ..models.hiera import HieraEncoder
from ..models.unwrap import unwrap_model as unwrap_model

Parallel = Literal["ddp", "fsdp"]
# Found in the message of the RuntimeError that PyTorch raises when another process is lost.
LOST_PROCESS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once


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

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, to every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.size > 1:
            dist.barrier()

    def parallelize(self, model: HieraEncoder, parallel: Parallel = "ddp") -> nn.Module:
        """Return the model prepared for training on all processes.

        Args:
            model: The model, on this process's device. FSDP changes it in place.
            parallel: `ddp` keeps a copy of the model in each process; `fsdp` shards its
                parameters, block by block (FSDP2).
        """
        if parallel == "fsdp" and self.size > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for block in (*model.blocks, *getattr(model, "decoder_blocks", ())):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        if self.size > 1:
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        return model


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started. Without torchrun, yield a world of one process.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. With several processes on CUDA, torchrun's
            LOCAL_RANK selects the GPU.

    Raises:
        DeviceError: The device does not exist.
        TrainingError: Another process has ended or cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    selected = select_device(device)
    if size == 1:
        yield World(selected)
        return
    if selected.type == "cuda":
        selected = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(selected)
    dist.init_process_group("nccl" if selected.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(selected, dist.get_rank(), size)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST_PROCESS.search(str(error))):
            raise
        raise TrainingError(
            "another process of the run has ended, or cannot be reached",
            "its own message gives the reason; restart all processes with --resume auto",
        ) from error
    finally:
        dist.destroy_process_group()


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
