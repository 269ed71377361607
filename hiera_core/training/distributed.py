"""The processes of a run: who they are, what they share, how a model is spread over them."""

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

Parallel = Literal["ddp", "fsdp"]
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once


@dataclass(frozen=True)
class World:
    """One process among `size`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: Any) -> list[Any]:
        """Everybody's, to everybody."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def spread(self, model: HieraEncoder, parallel: Parallel = "ddp") -> nn.Module:
        """Let the processes train one model: whole copies (DDP), or its parameters in shards, block
        by block (FSDP2)."""
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
    """Join the processes that torchrun started; alone without it.

    Raises:
        DeviceError: there is no such device.
        TrainingError: another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = select_device(device)
    if size == 1:
        yield World(where)
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(where, dist.get_rank(), size)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or BROKEN.search(str(error))):
            raise
        raise TrainingError(
            "another process of the run has ended, or cannot be reached",
            "its own message says why; start all of them again with --resume auto",
        ) from error
    finally:
        dist.destroy_process_group()


def without_gradient_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """For a backward pass whose gradients are only added up; the step's last one shares them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext() if not _is_sharded(model) else _sharded_without_sync(model)


def unwrap_model(model: nn.Module) -> HieraEncoder:
    """The model inside of DDP's wrapper."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, HieraEncoder)
    return inner


def reshard(model: nn.Module) -> None:
    """Let go of parameters that FSDP has gathered, so that changed shards count."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def _sharded_without_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
