"""The folder of a training run: its lock, checks before it is used, and export of the weights."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file, translate_write_errors
from ..atomic.lock import exclusive
from ..data.datasets import MediaDataset
from ..errors import OutputError, UsageError
from ..weights import files
from . import previews
from .checkpoints import checkpoint
from .checkpoints.checkpoint_file import whole_tensor
from .checkpoints.checkpoint_meta import META, read_meta
from .checkpoints.run_recipe import RECIPE_NAME, other_recipe, with_absolute_paths
from .distributed import World, unwrap_model
from .judging.best_weights import FOLDER as BEST
from .recipe import Recipe, RunOptions
from .recipe_reader import differences, read_recipe
from .run_log import CURVES_NAME, LOG_NAME, START, TENSORBOARD, events
from .steps import profiler
from .trackers import tracker
from .tuning import lora

if TYPE_CHECKING:
    from .build import TrainingSetup

# Reasons why no folder can have such a name, rather than why it cannot be written just now.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
WEIGHTS, CONFIG, CARD = MODEL_FILES = ("model.safetensors", "config.json", "hiera.json")
SUBFOLDERS = (checkpoint.FOLDER, previews.FOLDER, TENSORBOARD, lora.FOLDER, BEST, profiler.FOLDER)


@contextlib.contextmanager
def locked(path: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run's folder within the `with` block, so that no other run writes to it.

    A folder that does not exist is created, and removed at the end if it is still empty.

    Raises:
        UsageError: The folder cannot be written to, or another run holds its lock.
    """
    with contextlib.ExitStack() as stack:
        with world.main_process_step() as is_main:
            if is_main:
                stack.enter_context(_created(path))
                stack.enter_context(exclusive(path))
        yield


@contextlib.contextmanager
def _created(path: Path) -> Iterator[None]:
    """Create a folder, and those above it. At the end, remove those that are still empty."""
    folders = (path, *path.absolute().parents)
    missing = [folder for folder in folders if not os.path.lexists(folder)]
    existing = next(folder for folder in folders if os.path.lexists(folder))
    if not (existing.is_dir() and os.access(existing, os.R_OK | os.W_OK | os.X_OK)):
        raise UsageError(f"{path} cannot be written to", "use another -o")
    try:
        _make(path)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was not created
                folder.rmdir()


def _make(path: Path) -> None:
    """Create a folder, and those above it, unless they exist.

    Raises:
        UsageError: No folder can have that name.
        OutputError: It cannot be created now, e.g. because the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NAME_ERRORS:
            raise UsageError(
                f"{path} cannot be created ({error.strerror})", "use another -o"
            ) from error
        raise OutputError(f"{path} cannot be written ({error.strerror or error})") from error


def check_apart(path: Path, data: Path, what: str = "the data") -> None:
    """Check that the folder of a run is not in a folder of data, nor the data in it.

    Otherwise the run's files would become samples or classes, or samples would be replaced.

    Args:
        path: Folder of the run.
        data: File or folder of the data. It need not exist.
        what: What to call the data in a message.

    Raises:
        UsageError: One is in the other.
    """
    run, other = Path(os.path.realpath(path)), Path(os.path.realpath(data))
    if other.is_relative_to(run) or (run.is_relative_to(other) and other.is_dir()):
        raise UsageError(
            f"the run's folder {path} and {what} {data} are the same, or one is in the other",
            "write the run to another folder with -o",
        )


class RunFolder:
    """The folder of a run. It is locked, and nothing in it changes before `claim`.

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
        self.path, self.recipe, self.world, self.options = path, recipe, world, options
        for name in SUBFOLDERS:
            # A run removes old files in them. A link would make it do so elsewhere.
            if (path / name).is_symlink():
                raise UsageError(f"{path / name} is a link", "remove it, or use another -o")
        self.checkpoint = None
        if options.resume:
            self.checkpoint = checkpoint.find_checkpoint(options.resume, path)
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
        if self.resumes_in_place:
            return
        init_from = options.init_from or (None if self.checkpoint else recipe.init_from)
        start = Path(os.path.realpath(init_from or ""))
        if init_from and start.exists() and start.is_relative_to(path.resolve()):
            raise UsageError(
                f"{init_from}, where the run is to start from, is in its folder {path}",
                "write the run to another folder with -o",
            )
        if not options.overwrite:
            self._check_unused(restarts=options.resume == "auto")

    def claim(self) -> None:
        """Prepare the folder for this run. Unless this run resumes in place, remove an earlier one.

        Raises:
            OutputError: The folder cannot be written.
        """
        self.world.barrier()  # all processes have checked the folder before it changes
        with self.world.main_process_step() as is_main, translate_write_errors(self.path):
            if is_main and not self.resumes_in_place:
                self._clear()

    def _check_unused(self, restarts: bool) -> None:
        """Check that a new run may begin in the folder.

        Args:
            restarts: Whether it may replace a run with this recipe that has saved nothing yet.

        Raises:
            UsageError: It may not, because the folder holds a run or other files.
        """
        if (self.path / RECIPE_NAME).exists():
            if not restarts:
                raise UsageError(
                    f"{self.path} already holds a run",
                    "use --resume auto, --overwrite, or another -o",
                )
            for name in (*MODEL_FILES, CURVES_NAME):
                if (self.path / name).exists():
                    raise UsageError(
                        f"{self.path} holds a trained model ({name}), and no checkpoint to resume "
                        "from",
                        "use --overwrite to replace it, or another -o",
                    )
            if incomplete := sorted((self.path / checkpoint.FOLDER).glob(checkpoint.STEP)):
                raise UsageError(
                    f"{incomplete[-1]} is a checkpoint without {META}",
                    "use --overwrite to replace it, or another -o",
                )
            earlier = read_recipe(self.path / RECIPE_NAME)
            self._check_same_recipe(earlier.to_dict())
            if next(events(self.path), START)["event"] != START["event"]:
                raise UsageError(
                    f"{self.path / LOG_NAME} is not the log of a run", "use another -o"
                )
            for event in events(self.path):
                if event["event"] == "step" and _is_after_save(event, earlier.save_every):
                    raise UsageError(
                        f"{self.path} holds no checkpoint, although its run has saved some",
                        "use --overwrite to start over, or another -o",
                    )
        elif any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise UsageError(
                f"{self.path} is not empty, and holds no run", "use another -o, or --overwrite"
            )

    def _clear(self) -> None:
        """Remove the files of an earlier run, and nothing else, and write the recipe."""
        checkpoint.remove_all(self.path / checkpoint.FOLDER)
        for pattern in (
            f"{previews.FOLDER}/epoch-*.png",
            f"{TENSORBOARD}/events.out.tfevents.*",
            f"{profiler.FOLDER}/trace-*.json",
            f"{lora.FOLDER}/adapter_*",
            f"{BEST}/{lora.FOLDER}/adapter_*",
            *(f"{BEST}/{name}" for name in MODEL_FILES),
        ):
            for file in self.path.glob(pattern):
                file.unlink()
        for name in (f"{BEST}/{lora.FOLDER}", *SUBFOLDERS):
            with contextlib.suppress(OSError):  # it does not exist, or holds other files
                (self.path / name).rmdir()
        for name in (LOG_NAME, CURVES_NAME, tracker.IDS, *MODEL_FILES):
            (self.path / name).unlink(missing_ok=True)
        if not ((self.path / RECIPE_NAME).is_file() and self._holds_recipe()):
            with atomic_file(self.path / RECIPE_NAME) as temporary:
                temporary.write_text(self.recipe.to_yaml())

    def _holds_recipe(self) -> bool:
        """Return whether recipe.yaml is this run's recipe. Then it stays as it is, because
        somebody may have written it by hand, and may have left out the data."""
        try:
            found = with_absolute_paths(read_recipe(self.path / RECIPE_NAME))
        except UsageError:
            return False
        own = self.recipe
        data = replace(found.data, path=found.data.path or own.data.path)
        return replace(found, data=data, init_from=found.init_from or own.init_from) == own

    def _check_same_recipe(self, saved: dict[str, Any]) -> None:
        given = {k: v for k, v in self.recipe.to_dict().items() if k != "init_from"}
        # Keys that the version of the run did not know have their default.
        if lines := differences(Recipe.from_dict(saved).to_dict(), given):
            raise other_recipe(lines, self.path, self.options)

    def export(self, setup: TrainingSetup, result: dict[str, Any], within: str = "") -> None:
        """Write model.safetensors, config.json and hiera.json, in the reference's naming.

        With `lora`, the adapters are added to the weights, and are also written to adapter/.

        Args:
            setup: The setup of the run. All processes take part, because its model may be sharded.
            result: The last measurements of the run, for hiera.json.
            within: Folder in that of the run, for weights that are not the last ones.

        Raises:
            OutputError: A file cannot be written.
        """
        model = unwrap_model(setup.training.model)
        state = {}
        for name, tensor in model.state_dict().items():
            whole = whole_tensor(tensor)
            if self.world.is_main_process:
                state[name] = whole.cpu()
        with self.world.main_process_step() as is_main:
            if is_main:
                with translate_write_errors(self.path / within):
                    (self.path / within).mkdir(exist_ok=True)
                self._write_model(self.path / within, setup, state, result)

    def _write_model(
        self, folder: Path, setup: TrainingSetup, state: dict[str, Any], result: dict[str, Any]
    ) -> None:
        """Write the files of `export`, in the main process."""
        keys = ("step", "loss", "val", "probe", "unreadable")
        training = {key: result[key] for key in keys if key in result}
        model, settings = unwrap_model(setup.training.model), self.recipe.lora
        if settings is not None:
            with translate_write_errors(folder / lora.FOLDER):
                (folder / lora.FOLDER).mkdir(exist_ok=True)
            base = self.recipe.init_from or self.recipe.model.name
            lora.save_adapter(folder / lora.FOLDER, state, settings, base)
            state = lora.merge(state, settings)
        files.write_safetensors(folder / WEIGHTS, state)
        files.write_json(folder / CONFIG, model.config)
        files.write_json(folder / CARD, {**setup.card, "training": training})


def _is_after_save(event: dict[str, Any], save_every: float) -> bool:
    """Return whether a run had saved a checkpoint when it logged a step.

    Args:
        event: The event of the step.
        save_every: Number of passes over the data between checkpoints.
    """
    step, epoch = event["step"], event.get("epoch")
    if not (isinstance(epoch, int | float) and epoch > 0):
        return True  # this is not an event of ours
    # The first checkpoint is written in the background until, at the latest, the second one is due.
    return bool(step > 2 * math.ceil(save_every * step / epoch))
