"""Checkpoints of a run. They are written atomically, and the newest few are kept.

    runs/NAME/checkpoints/step_00001200/   state.safetensors: all tensors; meta.json: all else
    runs/NAME/checkpoints/latest           the name of the newest checkpoint

A checkpoint is written to a folder `step_NNNNNNNN.unfinished`, which is renamed when all files are
written; `latest` is updated after that. The files hold no code. Tensors are saved whole, so a run
can resume with another number of processes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ...atomic import atomic_file, sync_folder, translate_write_errors
from ...errors import CheckpointError, OutputError, UsageError, first_line
from ...weights import files
from ...weights.download_record import sha256_of
from ..distributed import World, unwrap_model
from ..optimizer import initialise_state
from . import checkpoint_file
from .background_write import BackgroundWrite, Snapshot
from .checkpoint_meta import FORMAT, META, STATE, TORCH_METADATA, read_meta

log = logging.getLogger("hiera")
STEP, UNFINISHED = f"step_{'[0-9]' * 8}", ".unfinished"  # names of folders, as a pattern
FOLDER, LATEST = "checkpoints", "latest"


@dataclass
class TrainingState:
    """Everything that changes from step to step: parameters, optimiser state, EMA, loss scale."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, torch.Tensor]  # EMA of the parameters, or empty
    scaler: torch.amp.GradScaler

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the state by name. They share memory with the state, so it is
        loaded by copying into them. Under FSDP, they are sharded."""
        model = unwrap_model(self.model)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        initialise_state(self.optimizer)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # frozen, so the optimiser does not know it
                continue
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors | {f"ema.{name}": average for name, average in self.averages.items()}


class CheckpointManager:
    """Saves and loads the checkpoints in the folder of a run.

    Args:
        run: Folder of the run.
        world: The processes of the run; all of them call the methods.
        keep: Number of checkpoints to keep, the newest ones.
        keeps_step: Whether the checkpoint after a number of steps is kept for good.
        in_background: Write in a thread, from a copy of the state in the host's memory.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        keep: int = 2,
        *,
        keeps_step: Callable[[int], bool] = lambda step: False,
        in_background: bool = False,
    ) -> None:
        self.folder, self.world, self.keep, self.keeps_step = run / FOLDER, world, keep, keeps_step
        self.snapshot = Snapshot(world.is_main_process) if in_background else None
        self._write_in_progress = BackgroundWrite()

    def save(self, training: TrainingState, meta: dict[str, Any]) -> Path:
        """Save the training state after `meta["step"]` steps, and return the checkpoint's folder.

        In the background, this returns when the state has been copied, and the checkpoint is
        complete after `wait`. The state may change as soon as this returns.

        Args:
            training: The state to save.
            meta: Values for meta.json.

        Raises:
            OutputError: This checkpoint, or the one before it, cannot be written, e.g. because the
                disk is full.
        """
        self.wait()
        final = self.folder / f"step_{meta['step']:08}"
        unfinished = final.with_suffix(UNFINISHED)
        tensors = training.tensors()
        values = {**meta, "format": FORMAT, "scaler": training.scaler.state_dict()}
        with self.world.main_process_step() as is_main, translate_write_errors(final):
            if is_main:
                self._remove_incomplete()
                unfinished.mkdir(parents=True)
        if self.snapshot is not None:
            copies = self.snapshot.take(tensors)
            if self.world.is_main_process:
                self._write_in_progress.start(
                    lambda: self._write(unfinished, final, copies, values)
                )
            return final
        with self.world.main_process_step() as is_main:
            if is_main:
                self._write(unfinished, final, tensors, values)
            else:
                checkpoint_file.write_tensors(None, tensors)
        return final

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete. All processes call this.

        Raises:
            OutputError: It cannot be written.
        """
        if self.snapshot is not None:
            with self.world.main_process_step():
                self._write_in_progress.wait()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, at the end of a run that has failed. The
        other processes may have ended, and another error is on its way."""
        try:
            self._write_in_progress.wait()
        except OutputError as error:
            log.warning("%s", error)

    def _write(
        self,
        unfinished: Path,
        final: Path,
        tensors: dict[str, torch.Tensor],
        values: dict[str, Any],
    ) -> None:
        """Write the files of a checkpoint and give it its name, in the main process."""
        try:
            with translate_write_errors(final):
                sha256 = checkpoint_file.write_tensors(unfinished / STATE, tensors)
                files.write_json(unfinished / META, {**values, "sha256": sha256})
                self._publish(unfinished, final)
        finally:  # it is still there after an error
            shutil.rmtree(unfinished, ignore_errors=True)

    def load(self, path: Path, training: TrainingState) -> None:
        """Load a checkpoint into the training state.

        Args:
            path: Folder of the checkpoint.
            training: The state to load into.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another model.
        """
        meta = read_meta(path)
        try:
            scaler = _checked_scaler(meta["scaler"], training.scaler)
            with self.world.main_process_step() as is_main:
                if is_main and sha256_of(path / STATE) != meta["sha256"]:
                    raise CheckpointError(f"{path / STATE} is not as it was saved")
            checkpoint_file.read_tensors(path / STATE, training.tensors())
        except (CheckpointError, OSError, ValueError, SafetensorError) as error:
            earlier = [p for p in _complete_checkpoints(path.parent) if p.name < path.name]
            hint = f"--resume {earlier[-1]}" if earlier else "start a new run"
            raise CheckpointError(f"{path} cannot be loaded ({first_line(error)})", hint) from error
        if scaler:
            training.scaler.load_state_dict(scaler)

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, because the run resumes from this step.

        Raises:
            OutputError: One of them cannot be removed.
        """
        with self.world.main_process_step() as is_main, translate_write_errors(self.folder):
            for path in self.all() if is_main else ():
                if path.name > f"step_{step:08}":
                    _remove(path)

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return _complete_checkpoints(self.folder)

    def _publish(self, unfinished: Path, final: Path) -> None:
        """Give a complete checkpoint its final name, and remove the oldest checkpoints."""
        sync_folder(unfinished)
        if final.exists():  # of an earlier attempt at this step
            _remove(final)
        unfinished.rename(final)
        sync_folder(self.folder)
        with atomic_file(self.folder / LATEST) as temporary:
            temporary.write_text(f"{final.name}\n")
        for old in self.all()[: -self.keep]:
            if self.keeps_step(int(old.name.removeprefix("step_"))):
                continue
            try:
                _remove(old)
            except OSError as error:  # the new checkpoint is complete, so the run goes on
                log.warning("%s cannot be removed (%s)", old, error.strerror or error)

    def _remove_incomplete(self) -> None:
        """Remove what was left behind when a process was killed while it saved or removed."""
        complete = self.all()
        for path in (*self.folder.glob(f"{STEP}{UNFINISHED}"), *self.folder.glob(STEP)):
            if path not in complete:
                _remove(path)


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
    if (path / META).is_file() or (path / TORCH_METADATA).exists():
        return path
    checkpoints = _complete_checkpoints(path / FOLDER)
    if not checkpoints and where != "auto":
        raise UsageError(
            f"no checkpoint in {where}", "give the folder of a run, or use --resume auto"
        )
    return checkpoints[-1] if checkpoints else None


def remove_all(folder: Path) -> None:
    """Remove the checkpoints in a folder, and nothing else in it.

    Raises:
        OSError: One of them cannot be removed.
    """
    for path in (*folder.glob(STEP), *folder.glob(f"{STEP}{UNFINISHED}")):
        _remove(path)
    (folder / LATEST).unlink(missing_ok=True)


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were written completely, oldest first."""
    return sorted(p.parent for p in folder.glob(f"{STEP}/{META}"))


def _checked_scaler(saved: dict[str, Any], scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return the saved state of a loss scaler, if it has the keys and types of this scaler's.

    Raises:
        ValueError: It has others.
    """
    own = scaler.state_dict()
    if {k: type(v) for k, v in saved.items()} != {k: type(v) for k, v in own.items()}:
        raise ValueError(f"the loss scaler's state has {sorted(saved)}, not {sorted(own)}")
    return saved


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is no longer complete from the start, in case this is interrupted.
    What a link points to is kept."""
    if path.is_symlink():
        path.unlink()
        return
    (path / META).unlink(missing_ok=True)
    shutil.rmtree(path)
