"""`--dry-run`: a few real steps, which say how long a run takes and how much memory it needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...data.datasets import Splits
from ..build import RunOptions, build_training, check_kind
from ..checkpoints.checkpoint_file import whole_tensor
from ..dataloader import training_batches
from ..distributed import World
from ..recipe import Recipe
from ..sampler import StepSampler
from .determinism import deterministic_kernels
from .train_step import TrainStep

if TYPE_CHECKING:
    from collections.abc import Sequence

WARMUP, MEASURED = 2, 3  # steps


@dataclass(frozen=True)
class DryRun:
    """What a run will take.

    Attributes:
        parameters, trained: Numbers of parameters of the model, and of those that are trained.
        steps, steps_per_pass: Numbers of optimiser steps.
        step_time: Seconds for a step; the median of a few.
        rate: Views per second, over all processes.
        wait: Share of the time of a step that it waits for data.
        seconds: Duration of all steps, without validation, probe and pictures.
        checkpoint: Size of a checkpoint, in bytes.
        memory: Peak of the memory of this process's device, in bytes; on a CPU, of the process.
    """

    parameters: int
    trained: int
    steps: int
    steps_per_pass: int
    step_time: float
    rate: float
    wait: float
    seconds: float
    checkpoint: int
    memory: int


def dry_run(recipe: Recipe, splits: Splits, world: World, options: RunOptions) -> DryRun:
    """Carry out the first steps of a run, and measure them. Nothing is written.

    Args:
        recipe: The recipe.
        splits: The data.
        world: The processes of the run; all of them call this.
        options: How the run is carried out.

    Raises:
        UsageError, CheckpointError, HubError, DeviceError: As the run would.
    """
    train = splits.train
    sampler = StepSampler(len(train), recipe, world.rank, world.size, train.labels)
    steps = min(WARMUP + MEASURED, sampler.steps)
    with deterministic_kernels(recipe.deterministic):
        setup = build_training(recipe, train, world, options)
        check_kind(setup, train, recipe.model.name)
        step = TrainStep(setup, recipe, sampler)
        batches = training_batches(setup, train, recipe, sampler, 0)
        times, waits = list[float](), list[float]()
        for number in range(steps):
            begin, step.waited = time.perf_counter(), 0.0
            float(step.run(number, batches)[0])  # waits for the device
            times.append(time.perf_counter() - begin)
            waits.append(step.waited)
    measured = times[WARMUP:] or times
    seconds = _median(measured)
    state = setup.training.tensors().values()
    parameters = list(setup.training.model.parameters())
    return DryRun(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steps=sampler.steps,
        steps_per_pass=sampler.steps_per_pass,
        step_time=seconds,
        rate=recipe.batch_size / seconds,
        wait=min(1.0, _median(waits[WARMUP:] or waits) / seconds),
        seconds=seconds * sampler.steps,
        checkpoint=sum(whole_tensor(tensor).nbytes for tensor in state),
        memory=_peak_memory(setup.device),
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _peak_memory(device: torch.device) -> int:
    """Return the largest amount of memory that was in use, in bytes: tensors on a GPU, or all of
    the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
