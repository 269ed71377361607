"""`probe:` in a recipe: accuracy of a simple classifier on the features of the model so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from ...data.datasets import MediaDataset, Splits
from ...data.remote.web_ranges import PRIVATE_HINT
from ...errors import UsageError
from ...probing.frozen_features import FrozenFeatures
from ...probing.probe import ProbeData, judge, open_probe_data
from ..build import TrainingSetup
from ..dataloader import Collator, EvalDataset, make_loader
from ..distributed import World, unwrap_model
from ..recipe import Recipe
from ..validate import MAX_BATCH, ema_weights, eval_batches

POLL_S = 0.5  # between the looks of all processes at a solver that works


class RunProbe:
    """Measures how well k-NN or a linear classifier recognises classes by the model's features.

    Args:
        recipe: The recipe, with a probe.
        setup, splits: The setup and the data of the run.
        world: The processes of the run. Each computes the features of its share.

    Raises:
        UsageError: The data has no labels, or nothing is held out.
    """

    def __init__(self, recipe: Recipe, setup: TrainingSetup, splits: Splits, world: World) -> None:
        assert recipe.probe is not None
        self.settings, self.setup, self.world = recipe.probe, setup, world
        self.batch = max(1, min(MAX_BATCH, recipe.batch_size // world.size))
        found = _open(recipe, splits, setup.public_urls)
        count = min(self.settings.samples, len(found.train))
        rows = np.linspace(0, len(found.train) - 1, count).round().astype(int)
        self.data = ProbeData(found.train.subset(rows), found.val)

    @torch.no_grad()
    def measure(self, stops: Callable[[], bool]) -> dict[str, Any] | None:
        """Return `top1` and, for more than five classes, `top5` in percent, and the numbers of
        `samples` and `train_samples`; None if it is to end early.

        Args:
            stops: Called after each batch: whether to end early.

        Raises:
            UsageError: No sample can be read.
        """
        model = self.setup.training.model
        model.eval()
        try:
            with ema_weights(self.setup.training):
                parts = [self._features(part, stops) for part in (self.data.train, self.data.val)]
        finally:
            model.train()
        train, val = parts
        if train is None or val is None:
            return None
        return self._solve(train, val, stops)

    def _solve(
        self, train: FrozenFeatures, val: FrozenFeatures, stops: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Judge the features in a thread of the main process.

        Meanwhile, all processes ask each other again and again whether it is done: a collective in
        which the others wait until then would time out, and nobody would see a signal.
        """
        job: _Job | None = None
        if self.world.is_main_process:
            job = _Job(lambda on_step: self._judge(train, val, on_step))
        try:
            while self.world.any(job is not None and not job.wait(POLL_S)):
                if stops():
                    return None
        finally:
            if job is not None:
                job.end()
        found: dict[str, Any] | None = None
        with self.world.main_process_step():
            if job is not None:
                found = job.result()
        return next(values for values in self.world.gather(found) if values is not None)

    def _judge(
        self, train: FrozenFeatures, val: FrozenFeatures, on_step: Callable[[], None]
    ) -> dict[str, Any]:
        settings = self.settings
        evaluation = judge(
            self.data,
            train,
            val,
            method=settings.method,
            neighbours=settings.neighbours,
            on_step=on_step,
        )
        found = {"top1": evaluation.top1, "top5": evaluation.top5}
        counts = {"samples": evaluation.samples, "train_samples": len(train)}
        return {name: value for name, value in (found | counts).items() if value is not None}

    def _features(self, samples: MediaDataset, stops: Callable[[], bool]) -> FrozenFeatures | None:
        """Return the features of all processes, in the order of the samples; None to end early."""
        setup, model = self.setup, unwrap_model(self.setup.training.model)
        dataset = EvalDataset(samples, setup.transform)
        keys = list(eval_batches(len(samples), self.batch, self.world.rank, self.world.size))
        loader = make_loader(
            dataset, keys, Collator(setup.pixel_shape, None), setup.workers, setup.device
        )
        cast = setup.precision is not torch.float32
        numbers: list[int] = []
        vectors: list[torch.Tensor] = []
        for batch_keys, loaded in zip(keys, loader, strict=True):
            batch = loaded.to(setup.device)
            with torch.autocast(setup.device.type, setup.precision if cast else None, enabled=cast):
                found = model.embed(setup.transform.normalise(batch.x)).float().cpu()
            read = [row for row, weight in enumerate(loaded.weight.tolist()) if weight]
            numbers += [int(batch_keys[row].sample or 0) for row in read]
            vectors.append(found[read])
            if stops():
                return None
        gathered = self.world.gather((numbers, torch.cat(vectors)))
        order = np.argsort([number for part, _ in gathered for number in part], kind="stable")
        rows = np.array([number for part, _ in gathered for number in part], np.int64)[order]
        assert samples.labels is not None
        labels = torch.from_numpy(np.asarray(samples.labels[rows], np.int64))
        unread = set(range(len(samples))) - set(rows.tolist())
        failed = [(samples.sources[row].name, "it cannot be read") for row in sorted(unread)]
        return FrozenFeatures(torch.cat([part for _, part in gathered])[order], labels, failed)


class _Cancelled(Exception):
    """Nobody waits for the result any more."""


class _Job:
    """A function that runs in a thread.

    Args:
        function: Gets a function that it calls now and then, which ends it when it is cancelled.
    """

    def __init__(self, function: Callable[[Callable[[], None]], dict[str, Any]]) -> None:
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(1, "probe")
        self._future = self._pool.submit(torch.no_grad()(function), self._check)
        self._pool.shutdown(wait=False)

    def wait(self, seconds: float) -> bool:
        """Return whether it is done, after some time at most."""
        return bool(wait([self._future], seconds).done)

    def result(self) -> dict[str, Any]:
        """Return what the function returns, or raise what it raises."""
        return self._future.result()

    def end(self) -> None:
        """End it, and wait for that. The process could not end before it."""
        self._cancelled.set()
        wait([self._future])

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise _Cancelled


def _open(recipe: Recipe, splits: Splits, public_urls: Container[str]) -> ProbeData:
    """Return the data of a probe: that of the run, if the recipe names no other.

    Args:
        recipe, splits: See `RunProbe`.
        public_urls: See `open_splits`.

    Raises:
        UsageError: The data has no labels, or nothing is held out.
    """
    settings = recipe.probe
    assert settings is not None
    uses_own = settings.data is None and settings.val is None
    if uses_own and splits.train.labels is not None and splits.val is not None:
        return ProbeData(splits.train, splits.val)
    location = recipe.data.path if settings.data is None else settings.data
    if location is None:
        raise UsageError("the data has no labels for a probe", "set probe.data")
    own_val = recipe.data.val if settings.data is None else None
    val = own_val if settings.val is None else settings.val
    try:
        return open_probe_data(location, val, public_urls=public_urls)
    except UsageError as error:
        if error.hint == PRIVATE_HINT:
            raise
        hint = "set probe.data to data with labels, and probe.val to what is held out of it"
        raise UsageError(f"probe: {error.message}", hint) from error


def probe_of(recipe: Recipe, setup: TrainingSetup, splits: Splits, world: World) -> RunProbe | None:
    """Return the probe of a run, if its recipe has one."""
    return None if recipe.probe is None else RunProbe(recipe, setup, splits, world)
