"""From files to answers by the pipeline of `hiera predict`, and the pipeline without its model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch

from ...data import sources
from ...data.sources import Source
from ...errors import HieraError, InputError
from ...inference.predict import Classifier, Predictor
from ...models import factory
from ...models.encoder import Encoder
from ..job import FileInputs, Job
from ..measurement import ANSWERS, DECODING, Measurement, Variant
from .busy_clock import BusyClock

WARM_UP_INPUTS = 64  # as many as fill a batch


class TimedPredictor(Predictor):
    """A `Predictor` that knows how long its model computes, and that can leave it out.

    Args:
        job: The job. Weights are those of the checkpoint, or, for a model in the zoo, random.
        compile: Compile the model.

    Attributes:
        clock: How long the model computes.
        is_decoding_only: Whether the model is left out.
    """

    def __init__(self, job: Job, compile: bool = False) -> None:
        assert job.files is not None
        self.job, self.clock = job, BusyClock(torch.device(job.device))
        self.is_decoding_only = False
        super().__init__(
            job.model,
            sampling=job.files.sampling,
            workers=job.files.workers,
            device=job.device,
            dtype=job.dtype,
            batch_size=job.batch,
            compile=compile,
        )

    def load(self, name: str) -> Any:
        """Return the model of the job."""
        entry, job = self.job.entry, self.job
        size = {} if job.size is None else {"input_size": entry.config["input_size"]}
        if job.description is not None:
            return factory.create_encoder(name, None, size.get("input_size"))
        model: Encoder = factory.create_model(entry.name, **size)
        return model

    def make_runner(self, model: torch.nn.Module, **options: Any) -> Classifier:
        runner = _TimedClassifier(model, **options)
        runner.predictor = self
        return runner


class _TimedClassifier(Classifier):
    predictor: TimedPredictor

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        if self.predictor.is_decoding_only:
            return torch.zeros(len(x), int(self.model.config["num_classes"]), device=x.device)
        with self.predictor.clock.running():
            return super().compute(x)


class FilesRun:
    """Classifies the inputs of a job each time it is called.

    Args:
        predictor: What classifies them.
        without_model: Only decode them.

    Attributes:
        facts: Fields of the measurement, after a run.
    """

    def __init__(self, predictor: TimedPredictor, without_model: bool = False) -> None:
        self.predictor, self.without_model = predictor, without_model
        self.facts: dict[str, Any] = {}

    def __call__(self) -> None:
        """Go through all inputs.

        Raises:
            InputError: None of them can be read; the error is that of the first.
        """
        answers, failed, first = self._run(read_inputs(self.predictor.job.files))
        check_answers(answers, failed, first)

    def warm_up(self) -> None:
        """Go through the first inputs."""
        self._run(itertools.islice(read_inputs(self.predictor.job.files), WARM_UP_INPUTS))

    def _run(self, found: Iterator[Source]) -> tuple[int, int, HieraError | None]:
        """Go through inputs. Return how many have an answer and how many do not, and the first
        error."""
        predictor = self.predictor
        predictor.is_decoding_only = self.without_model
        predictor.clock.reset()
        answers = failed = 0
        first: HieraError | None = None
        start = time.perf_counter()
        for record in predictor(found):
            failed += record.status == "error"
            answers += record.status != "error"
            first = first or record.error
        seconds = time.perf_counter() - start
        self.facts |= {"inputs": answers, "unreadable": failed, "batch": self._batch_size()}
        if not self.without_model:
            self.facts["waiting"] = predictor.clock.idle_share(seconds)
        return answers, failed, first

    def _batch_size(self) -> int:
        kind = self.predictor.kinds[0]
        return self.predictor.classifier(kind).batch_size


def build(job: Job) -> list[Variant]:
    """Return the runs of a job: from files to answers, uncompiled and compiled, and decoding alone.

    Raises:
        UsageError: The model is no classifier.
    """
    predictor = TimedPredictor(job)
    model = predictor.classifier(predictor.kinds[0]).model
    params = sum(parameter.numel() for parameter in model.parameters())
    runs = [(ANSWERS, False, FilesRun(predictor))]
    if job.compile:
        runs.append((ANSWERS, True, FilesRun(TimedPredictor(job, compile=True))))
    runs.append((DECODING, False, FilesRun(predictor, without_model=True)))
    variants, reading = [], None if job.files is None else job.files.reading
    for part, compiled, run in runs:
        row = Measurement.of_job(job, None, compiled, part=part, reading=reading)
        row.params = params if part == ANSWERS else None
        variants.append(Variant(row, run, run.warm_up, run.facts))
    return variants


def read_inputs(files: FileInputs | None) -> Iterator[Source]:
    """Yield the inputs of a job."""
    assert files is not None
    return sources.expand(files.inputs, recursive=files.recursive)


def check_answers(answers: int, failed: int, first: HieraError | None) -> None:
    """Check that a run had something to do.

    Raises:
        InputError: No input could be read.
    """
    if not answers:
        reason = "" if first is None else f"; the first: {first.message}"
        raise InputError(f"none of {failed} inputs can be read{reason}")
