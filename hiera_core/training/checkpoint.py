"""Checkpoints of a run: whole or not at all, the marker last, the newest few kept.

    runs/NAME/checkpoints/step_00001200/   torch.distributed.checkpoint's files, and meta.json
    runs/NAME/checkpoints/latest           the newest one's name

A folder is written under another name and renamed when all of it is on the disk. The files hold the
parameters by name whatever number of processes wrote them, so that any number can go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..atomic import atomic_file
from ..errors import CheckpointError, OutputError, UsageError, first_line
from ..weights import files
from .distributed import World

META = "meta.json"
UNFINISHED = ".unfinished"
FAULTS = (Exception, CheckpointException)  # the latter is a BaseException


@dataclass
class TrainingState:
    """What a run carries from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, torch.Tensor]  # EMA of the parameters, or empty
    scaler: torch.amp.GradScaler

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "averages": dict(self.averages)}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def take(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for name, average in state["averages"].items():
            self.averages[name].copy_(average)
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class CheckpointManager:
    """The checkpoints in a run's folder."""

    def __init__(self, run: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = run / "checkpoints", world, keep

    def save(self, training: TrainingState, meta: dict[str, Any]) -> Path:
        """Write the state after `meta["step"]` steps.

        Raises:
            OutputError: the disk is full.
        """
        final = self.folder / f"step_{meta['step']:08}"
        folder = final.with_suffix(UNFINISHED)
        if self.world.is_main_process:
            for old in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(old)
            folder.mkdir(parents=True)
        self.world.barrier()
        state = training.state()
        try:
            with _quietly():
                save(state, checkpoint_id=folder, no_dist=self.world.size == 1)
        except FAULTS as error:
            raise OutputError(f"{folder} cannot be written ({_reason(error)})") from error
        if self.world.is_main_process:
            files.write_json(folder / META, meta)
            if final.exists():
                shutil.rmtree(final)
            folder.rename(final)
            _sync_folder(self.folder)
            with atomic_file(self.folder / "latest") as temporary:
                temporary.write_text(f"{final.name}\n")
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()
        return final

    def load(self, path: Path, training: TrainingState) -> dict[str, Any]:
        """Take up a checkpoint's state, and give what was saved beside it.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        state = training.state()
        try:
            with _quietly():
                load(state, checkpoint_id=path, no_dist=self.world.size == 1)
            training.take(state)
        except FAULTS as error:
            before = [p for p in _whole(path.parent) if p.name < path.name]
            hint = f"--resume {before[-1]}" if before else "begin anew"
            raise CheckpointError(f"{path} cannot be loaded ({_reason(error)})", hint) from error
        return files.read_json(path / META)

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run goes on from this one."""
        self.world.barrier()
        if self.world.is_main_process:
            for path in self.all():
                if path.name > f"step_{step:08}":
                    shutil.rmtree(path)
        self.world.barrier()

    def all(self) -> list[Path]:
        """Whole ones, oldest first."""
        return _whole(self.folder)


def find_checkpoint(where: str, run: Path) -> Path | None:
    """What `--resume` means: `auto`, a run's folder, or a checkpoint.

    Raises:
        UsageError: there is none at that path. (`auto` begins anew then.)
    """
    path = run if where == "auto" else Path(where)
    if (path / META).is_file():
        return path
    found = _whole(path / "checkpoints")
    if not found and where != "auto":
        raise UsageError(f"no checkpoint in {where}", "name a run's folder, or --resume auto")
    return found[-1] if found else None


def read_meta(path: Path) -> dict[str, Any]:
    """What was saved beside a checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    return files.read_json(path / META)


def _whole(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step_????????/{META}"))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch warns of single processes, and logs tracebacks of what we say in a line."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # of the first process that failed
    return first_line(error)
