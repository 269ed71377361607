"""Checkpoints of a run. They are written atomically, and the newest few are kept.

    runs/NAME/checkpoints/step_00001200/   files of torch.distributed.checkpoint, and meta.json
    runs/NAME/checkpoints/latest           the name of the newest checkpoint

A checkpoint is written to a folder `step_NNNNNNNN.unfinished`, which is renamed when all files are
written; `latest` is updated after that. torch.distributed.checkpoint reshards parameters when it
loads them, so a run can resume with another number of processes.
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
CHECKPOINT_ERRORS = (Exception, CheckpointException)  # the latter is only a BaseException


@dataclass
class TrainingState:
    """Everything that changes from step to step: parameters, optimiser state, EMA, loss scale."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, torch.Tensor]  # EMA of the parameters, or empty
    scaler: torch.amp.GradScaler

    def state(self) -> dict[str, Any]:
        """Return the state as nested dictionaries, for torch.distributed.checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "averages": dict(self.averages)}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Load a state that `state` returned."""
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
    """Saves and loads the checkpoints in the folder of a run.

    Args:
        run: Folder of the run.
        world: The processes of the run; all of them call the methods.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, run: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = run / "checkpoints", world, keep

    def save(self, training: TrainingState, meta: dict[str, Any]) -> Path:
        """Save the training state after `meta["step"]` steps, and return the checkpoint's folder.

        Args:
            training: The state to save.
            meta: Values for meta.json.

        Raises:
            OutputError: The checkpoint cannot be written, e.g. because the disk is full.
        """
        final = self.folder / f"step_{meta['step']:08}"
        unfinished = final.with_suffix(UNFINISHED)
        if self.world.is_main_process:
            for old in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(old)
            unfinished.mkdir(parents=True)
        self.world.barrier()
        state = training.state()
        try:
            with _without_torch_messages():
                save(state, checkpoint_id=unfinished, no_dist=self.world.size == 1)
        except CHECKPOINT_ERRORS as error:
            raise OutputError(f"{unfinished} cannot be written ({_reason(error)})") from error
        if self.world.is_main_process:
            files.write_json(unfinished / META, meta)
            if final.exists():
                shutil.rmtree(final)
            unfinished.rename(final)
            _sync_folder(self.folder)
            with atomic_file(self.folder / "latest") as temporary:
                temporary.write_text(f"{final.name}\n")
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()
        return final

    def load(self, path: Path, training: TrainingState) -> dict[str, Any]:
        """Load a checkpoint into the training state, and return its meta.json.

        Args:
            path: Folder of the checkpoint.
            training: The state to load into.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another model.
        """
        state = training.state()
        try:
            with _without_torch_messages():
                load(state, checkpoint_id=path, no_dist=self.world.size == 1)
            training.load(state)
        except CHECKPOINT_ERRORS as error:
            earlier = [p for p in _complete_checkpoints(path.parent) if p.name < path.name]
            hint = f"--resume {earlier[-1]}" if earlier else "start a new run"
            raise CheckpointError(f"{path} cannot be loaded ({_reason(error)})", hint) from error
        return read_meta(path)

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, because the run resumes from this step."""
        self.world.barrier()
        if self.world.is_main_process:
            for path in self.all():
                if path.name > f"step_{step:08}":
                    shutil.rmtree(path)
        self.world.barrier()

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return _complete_checkpoints(self.folder)


def find_checkpoint(where: str, run: Path) -> Path | None:
    """Return the checkpoint that `--resume` names.

    Args:
        where: A checkpoint or the folder of a run, which stands for its newest checkpoint; or
            `auto` for the newest checkpoint of this run.
        run: Folder of this run.

    Returns:
        Folder of the checkpoint. None for `auto` if the run has no checkpoint, so it starts at
        step 0.

    Raises:
        UsageError: There is no checkpoint at that path.
    """
    path = run if where == "auto" else Path(where)
    if (path / META).is_file():
        return path
    checkpoints = _complete_checkpoints(path / "checkpoints")
    if not checkpoints and where != "auto":
        raise UsageError(
            f"no checkpoint in {where}", "give the folder of a run, or use --resume auto"
        )
    return checkpoints[-1] if checkpoints else None


def read_meta(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's meta.json.

    Raises:
        CheckpointError: meta.json is damaged.
    """
    return files.read_json(path / META)


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were written completely, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step_????????/{META}"))


@contextlib.contextmanager
def _without_torch_messages() -> Iterator[None]:
    """Silence torch.distributed.checkpoint.

    It warns if there is only one process, and it logs tracebacks of errors that we report in one
    line.
    """
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
    """Flush a folder's entries to disk, so that a rename in it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # the error of the first failed process
    return first_line(error)
