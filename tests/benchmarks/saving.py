"""Share of the time of a training run that saving takes, if it saves every 50 steps.

    python -m tests.benchmarks.saving                             # hiera_tiny_224, batches of 8
    python -m tests.benchmarks.saving --model mae_hiera_tiny_224
    python -m tests.benchmarks.saving --blocking                  # as with --blocking-saves

The trainer of `hiera train` runs on digits, which are resized to the input of the model, and saves
every 100 steps. So 50 steps that begin with a save come after 50 steps without one: all that a save
costs is in the former, also the steps that are slower while a thread writes. Each round compares
the two. As both may drift, the cost is also measured directly: the time that the run waits, and
what the steps during which a thread writes take longer than the median step. The first 50 steps are
not counted. Nothing is validated, and no pictures are drawn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiera_core.data.datasets import MediaDataset, Splits, open_dataset
from hiera_core.training import run_folder
from hiera_core.training.build import RunOptions
from hiera_core.training.dataloader import Batch
from hiera_core.training.distributed import World
from hiera_core.training.recipe import Recipe
from hiera_core.training.recipe_reader import read_recipe
from hiera_core.training.trainer import Trainer

EVERY = 50  # steps between two saves
PERIOD = 2 * EVERY


class TimedTrainer(Trainer):
    """The trainer, which notes when steps end, and how long saves take.

    Attributes:
        ends: When each step has ended, in seconds, by the number of steps that are done.
        waits: Seconds for which the run has waited for each save.
        writes: When each checkpoint was begun and complete, in seconds.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends, self.waits = list[float](), list[float]()
        self.writes = list[tuple[float, float]]()
        manager: Any = self.checkpoints
        manager._write = _timed(manager._write, self.writes)

    def _step(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        if not self.ends:
            self.ends.append(time.perf_counter())
        values = super()._step(step, batches)
        self.ends.append(time.perf_counter())
        return values

    def _save(self, last: dict[str, Any], step: int, **unfinished_work: Any) -> None:
        begin = time.perf_counter()
        super()._save(last, step, **unfinished_work)
        self.waits.append(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="hiera_tiny_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--blocking", action="store_true")
    arguments = parser.parse_args()
    steps = PERIOD * arguments.rounds + EVERY
    with tempfile.TemporaryDirectory() as name:
        run = trained(arguments.model, arguments.batch, steps, Path(name), arguments.blocking)
    report(run, arguments.rounds)


def trained(model: str, batch: int, steps: int, folder: Path, blocking: bool) -> TimedTrainer:
    """Run the trainer for some steps, and return it."""
    settings = {
        "batch_size": batch,
        "data.repeats": 1,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "save_every": PERIOD / steps,
    }
    recipe: Recipe = read_recipe(model, settings)
    world, options = World(torch.device("cpu")), RunOptions(live=False, blocking_saves=blocking)
    with run_folder.locked(folder / "run", world):
        trainer = TimedTrainer(
            recipe, Splits(digits(steps * batch)), folder / "run", world, options
        )
        trainer.run()
    return trainer


def digits(count: int) -> MediaDataset:
    """Return as many digits, which come again and again."""
    found = open_dataset("digits")
    return found.subset(np.arange(count) % len(found))


def report(run: TimedTrainer, rounds: int) -> None:
    """Print what the saves have cost."""
    size = sum(tensor.nbytes for tensor in run.training.tensors().values())
    median = statistics.median(durations(run))
    print(
        f"{run.recipe.model.name}, batches of {run.recipe.batch_size}, {run.setup.precision}: "
        f"{median:.3g} s for a step, {size / 2**20:.0f} MiB for a checkpoint"
    )
    shares, direct = [], []
    for number in range(rounds):
        middle = PERIOD * (number + 1)
        begin, save, end = (run.ends[middle + n * EVERY] for n in (-1, 0, 1))
        shares.append(1 - (save - begin) / (end - save))
        cost = direct_cost(run, number)
        direct.append(cost / (EVERY * median + cost))
        written = run.writes[number]
        print(
            f"round {number + 1}: {EVERY} steps take {end - save:.1f} s with a save and "
            f"{save - begin:.1f} s without: {shares[-1]:.1%}; directly {cost:.2f} s: "
            f"{direct[-1]:.1%} (waiting {run.waits[number]:.2f} s, writing "
            f"{written[1] - written[0]:.2f} s)"
        )
    print(
        f"saving takes {statistics.median(shares):.1%} of the time, directly "
        f"{statistics.median(direct):.1%}"
    )


def direct_cost(run: TimedTrainer, number: int) -> float:
    """Return the seconds that a save has cost: waiting, and slower steps while a thread writes."""
    begin, end = run.writes[number]
    median = statistics.median(durations(run))
    slower = 0.0
    for step in range(PERIOD * (number + 1) + 1, len(run.ends)):
        if run.ends[step - 1] < end and run.ends[step] > begin:
            first = run.waits[number] if step == PERIOD * (number + 1) + 1 else 0.0
            slower += run.ends[step] - run.ends[step - 1] - first - median
    return run.waits[number] + max(0.0, slower)


def durations(run: TimedTrainer) -> list[float]:
    """Return the seconds of each step between the saves, after the first ones."""
    return [
        run.ends[n] - run.ends[n - 1]
        for n in range(EVERY + 1, len(run.ends))
        if n % PERIOD > EVERY or n % PERIOD == 0
    ]


def _timed(function: Callable[..., Any], spans: list[tuple[float, float]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spans.append((begin, time.perf_counter()))

    return call


if __name__ == "__main__":
    main()
