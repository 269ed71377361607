"""The step that `hiera train` runs, on drawn batches: the work of `--mode train`.

The samples are random, and are not read while a step is timed. Everything else is that of a run:
the model's recipe, autocast, the part of augmentation that runs on the device, gradient clipping,
AdamW with the recipe's groups, EMA, and the compiled form.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from ... import zoo
from ...data.datasets import MediaDataset
from ...data.sources import Source
from ...device import is_out_of_memory
from ...errors import DeviceError
from ...models.hiera import HieraEncoder
from ...training.build import RunOptions, TrainingSetup, build_training
from ...training.dataloader import Batch, Collator, LoadedSample
from ...training.distributed import World, unwrap_model
from ...training.loading.finish_views import draw_erasure
from ...training.recipe import Recipe
from ...training.recipe_reader import read_recipe
from ...training.sampler import SampleKey, StepSampler
from ...training.settings.recipe_parts import ModelSettings
from ...training.steps.train_step import TrainStep
from ..job import Job

STEPS = 100  # of the pretended run; then it begins again
DRAWN_BATCHES = 4  # that take turns
CLASSES = 1000  # of a checkpoint that has no head


class TrainingWork:
    """Steps of training with one model. Call it to carry out a step.

    Args:
        job: The job, of one of our classifiers or autoencoders.

    Attributes:
        model: The model.
        notes: How the step differs from the model's recipe.

    Raises:
        HieraError: See `build_training`.
    """

    def __init__(self, job: Job) -> None:
        device = torch.device(job.device)
        recipe, self.notes = recipe_of(job)
        samples = _samples(job.entry, recipe)
        options = RunOptions(compile=job.compile, workers=0)
        setup = build_training(recipe, samples, World(device), options)
        sampler = StepSampler(len(samples), recipe)
        self._step = TrainStep(setup, recipe, sampler)
        self._batches = itertools.cycle([*_draw_batches(setup, samples, recipe, sampler)])
        self._numbers = itertools.cycle(range(sampler.steps))
        inner = unwrap_model(setup.training.model)
        assert isinstance(inner, HieraEncoder)
        self.model: HieraEncoder = inner

    def __call__(self) -> None:
        """Carry out a step, compiled if the job is.

        Raises:
            RuntimeError, MemoryError: Memory runs out; the runner halves the batch then.
            DeviceError: See `TrainStep.run`.
        """
        try:
            self._step.run(next(self._numbers), self._batches)
        except DeviceError as error:
            cause = error.__cause__
            if isinstance(cause, RuntimeError | MemoryError) and is_out_of_memory(cause):
                raise cause from None
            raise

    def uncompiled(self) -> None:
        """Carry out a step without the compiled program."""
        with torch.compiler.set_stance("force_eager"):
            self()


def recipe_of(job: Job) -> tuple[Recipe, list[str]]:
    """Return the recipe of a job's model for its batch size, dtype and input size, and notes about
    what differs from the model's own recipe."""
    entry, notes = job.entry, list[str]()
    recipe = read_recipe(entry.name)
    augment, data = recipe.augment, recipe.data
    mixes = not entry.autoencoder and (augment.mixup > 0 or augment.cutmix > 0)
    unit = 2 if mixes else 1
    if job.batch % (data.repeats * unit):
        data = dataclasses.replace(data, repeats=1)
    if job.batch % unit:
        augment = dataclasses.replace(augment, mixup=0.0, cutmix=0.0)
        notes.append(f"without mixup and cutmix, which need pairs: a batch of {job.batch} is odd")
    config: dict[str, Any] = dict(recipe.model.config)
    if job.description is not None:
        config |= entry.config
    elif job.size is not None:
        config["input_size"] = entry.config["input_size"]
    if not entry.autoencoder:
        config["num_classes"] = entry.config.get("num_classes") or CLASSES
    return dataclasses.replace(
        recipe,
        model=ModelSettings(entry.name, config),
        batch_size=job.batch,
        accumulate=1,
        augment=augment,
        data=data,
        precision=cast(Any, job.dtype),
    ), notes


def _samples(entry: zoo.ModelEntry, recipe: Recipe) -> MediaDataset:
    """Return a data set whose samples are never read."""
    count = STEPS * recipe.batch_size
    sources = [Source("drawn")] * count
    if entry.autoencoder:
        return MediaDataset(sources)
    classes = int(recipe.model.config["num_classes"])
    return MediaDataset(sources, np.arange(count) % classes, class_count=classes)


def _draw_batches(
    setup: TrainingSetup, samples: MediaDataset, recipe: Recipe, sampler: StepSampler
) -> Iterator[Batch]:
    """Yield batches as the workers of a run collate them, of random pixels."""
    collate = Collator(setup.view_shape, setup.num_classes, recipe)
    for keys in itertools.islice(sampler.batches(), DRAWN_BATCHES):
        batch = collate([_draw_sample(setup, samples, recipe, key) for key in keys])
        yield batch.pin_memory() if setup.device.type == "cuda" else batch


def _draw_sample(
    setup: TrainingSetup, samples: MediaDataset, recipe: Recipe, key: SampleKey
) -> LoadedSample:
    repeats, shape = recipe.data.repeats, setup.view_shape
    assert key.sample is not None
    erasing = recipe.augment.erasing
    erasures = tuple(draw_erasure(erasing, *shape[-2:]) for _ in range(repeats))
    units = None
    if setup.masking is not None:
        draws = [setup.masking.draw(str(key.sample), repeat) for repeat in range(repeats)]
        units = torch.stack(draws)
    return LoadedSample(
        key,
        torch.randint(256, (repeats, *shape), dtype=torch.uint8),
        erasures=erasures,
        label=0 if samples.labels is None else int(samples.labels[key.sample]),
        visible_units=units,
    )
