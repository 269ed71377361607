"""The folder of a training run: checks before it is used, and export of the trained weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.datasets import MediaDataset
from ..errors import OutputError, UsageError
from ..weights import files
from .checkpoint import find_checkpoint, read_meta
from .distributed import World, unwrap_model
from .recipe import Recipe
from .run_log import CURVES_NAME, LOG_NAME

if TYPE_CHECKING:
    from .build import RunOptions, TrainingSetup

RECIPE_NAME = "recipe.yaml"
# Keys of the recipe that may change when a run resumes, because the weights do not depend on them.
CHANGEABLE_KEYS = ("log_every", "val_every", "save_every", "keep_checkpoints")


class RunFolder:
    """The folder of a run. Nothing in it changes before `claim`.

    Args:
        path: The folder.
        recipe: The recipe of the run.
        samples: The training data.
        world: The processes of the run.
        options: `resume` and `overwrite` decide what happens to a run in the folder.

    Attributes:
        checkpoint: The checkpoint to resume from, or None.
        meta: Contents of that checkpoint's meta.json; empty without a checkpoint.
        resumes_in_place: Whether that checkpoint belongs to this folder.

    Raises:
        UsageError: The folder holds another run or cannot be written to; or the checkpoint's run
            was started with another recipe or other data.
        CheckpointError: meta.json of the checkpoint is damaged.
    """

    def __init__(
        self, path: Path, recipe: Recipe, samples: MediaDataset, world: World, options: RunOptions
    ) -> None:
        self.path, self.recipe, self.world = path, recipe, world
        self.checkpoint = find_checkpoint(options.resume, path) if options.resume else None
        self.meta: dict[str, Any] = {}
        if self.checkpoint is not None:
            self.meta = read_meta(self.checkpoint)
            self._check_same_recipe(self.meta["recipe"])
            if self.meta.get("data") != samples.fingerprint:
                raise UsageError(
                    "the run was begun with other data",
                    "resume it with the same data, or start a new run with --init-from",
                )
        self.resumes_in_place = self.checkpoint is not None and (
            self.checkpoint.resolve().is_relative_to(path.resolve())
        )
        may_use = self.resumes_in_place or options.overwrite or options.resume == "auto"
        if (path / RECIPE_NAME).exists() and not may_use:
            raise UsageError(
                f"{path} already holds a run", "use --resume auto, --overwrite, or another -o"
            )
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UsageError(f"{path} cannot be written to", "use another -o")

    def claim(self) -> None:
        """Prepare the folder for this run. Unless this run resumes in place, remove an earlier one.

        Raises:
            OutputError: The folder cannot be written.
        """
        self.world.barrier()  # all processes have checked the folder before it changes
        if self.world.is_main_process and not self.resumes_in_place:
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

    def _check_same_recipe(self, saved: dict[str, Any]) -> None:
        for key, value in self.recipe.to_dict().items():
            if key not in CHANGEABLE_KEYS and saved.get(key) != value:
                raise UsageError(
                    f"the run was begun with {key} = {saved.get(key)}, not {value}",
                    "resume it with the same recipe, or start a new run with --init-from",
                )

    def export(self, setup: TrainingSetup, result: dict[str, Any]) -> None:
        """Write model.safetensors, config.json and hiera.json, in the reference's naming.

        Args:
            setup: The setup of the run. All processes take part, because its model may be sharded.
            result: The last measurements of the run, for hiera.json.

        Raises:
            OutputError: A file cannot be written.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(setup.training.model, options=options)
        if self.world.is_main_process:
            keys = ("step", "loss", "val", "unreadable")
            training = {key: result[key] for key in keys if key in result}
            files.write_safetensors(self.path / "model.safetensors", state)
            files.write_json(self.path / "config.json", unwrap_model(setup.training.model).config)
            files.write_json(self.path / "hiera.json", {**setup.card, "training": training})
