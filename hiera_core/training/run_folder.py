"""The folder of a training run: who may write to it, and what a finished run leaves there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.datasets import MediaDataset
from ..errors import OutputError, UsageError
from ..weights import files
from . import checkpoint
from .distributed import World, unwrap_model
from .recipe import Recipe
from .run_log import CURVES_NAME, LOG_NAME

if TYPE_CHECKING:
    from .build import RunOptions, TrainingSetup

RECIPE_NAME = "recipe.yaml"
# Keys that may change when a run resumes: they decide what is shown and kept, not what is computed.
FREE_KEYS = ("log_every", "val_every", "save_every", "keep_checkpoints")


class RunFolder:
    """The folder of a run. Nothing is changed in it before `claim`.

    Attributes:
        resumes: the checkpoint to go on from, or None; `meta`: what was saved beside it.

    Raises:
        UsageError: it holds another run, or one that was begun with another recipe or other data;
            it cannot be written to.
    """

    def __init__(
        self, path: Path, recipe: Recipe, samples: MediaDataset, world: World, options: RunOptions
    ) -> None:
        self.path, self.recipe, self.world = path, recipe, world
        self.resumes = checkpoint.find_checkpoint(options.resume, path) if options.resume else None
        self.meta: dict[str, Any] = {}
        if self.resumes is not None:
            self.meta = checkpoint.read_meta(self.resumes)
            self._check_same(self.meta["recipe"])
            if self.meta.get("data") != samples.fingerprint:
                raise UsageError(
                    "the run was begun on other data",
                    "resume with its own, or begin another run with --init-from",
                )
        self.goes_on = self.resumes is not None and (
            self.resumes.resolve().is_relative_to(path.resolve())
        )
        may_clear = self.goes_on or options.overwrite or options.resume == "auto"
        if (path / RECIPE_NAME).exists() and not may_clear:
            raise UsageError(
                f"{path} already holds a run", "use --resume auto, --overwrite, or another -o"
            )
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UsageError(f"{path} cannot be written to", "use another -o")

    def claim(self) -> None:
        """Make it this run's: forget what it held, unless the run goes on.

        Raises:
            OutputError: it cannot be written to.
        """
        self.world.barrier()  # everybody has looked before anything is written
        if self.world.is_main_process and not self.goes_on:
            self._clear()
        self.world.barrier()

    def _clear(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoints", "pictures"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (LOG_NAME, CURVES_NAME, "model.safetensors", "config.json", "hiera.json"):
                (self.path / name).unlink(missing_ok=True)
            (self.path / RECIPE_NAME).write_text(self.recipe.to_yaml())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror})") from error

    def _check_same(self, begun_with: dict[str, Any]) -> None:
        for key, value in self.recipe.to_dict().items():
            if key not in FREE_KEYS and begun_with.get(key) != value:
                raise UsageError(
                    f"the run was begun with {key} = {begun_with.get(key)}, not {value}",
                    "resume with its own recipe, or begin another run with --init-from",
                )

    def export(self, parts: TrainingSetup, last: dict[str, Any]) -> None:
        """model.safetensors, config.json and hiera.json, in the reference's names."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(parts.training.model, options=options)
        if self.world.is_main_process:
            told = ("step", "loss", "val", "unreadable")
            result: dict[str, Any] = {k: last[k] for k in told if k in last}
            files.write_safetensors(self.path / "model.safetensors", state)
            files.write_json(self.path / "config.json", unwrap_model(parts.training.model).config)
            files.write_json(self.path / "hiera.json", {**parts.card, "training": result})
