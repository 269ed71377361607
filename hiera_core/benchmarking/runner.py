"""Run jobs, each in a worker process, and measure the jobs of one model alternately."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import DeviceError
from ..process import allocator
from .job import OURS, Job, RunLength
from .measurement import Measurement, add_ratios
from .peers import NotOffered

log = logging.getLogger("hiera")
Progress = Callable[[str], None]


class OutOfMemory(Exception):
    """The batch does not fit in the memory of the device, or of the worker process."""


class WorkerFailed(Exception):
    """A worker cannot build or run its job."""


@dataclass
class _TimedVariant:
    """A variant of a job, the worker that runs it, and the measurement to complete."""

    worker: Worker
    number: int  # of the variant in its worker
    measurement: Measurement


def measure(
    jobs: Sequence[Job], length: RunLength, progress: Progress = lambda text: None
) -> list[Measurement]:
    """Measure jobs that share a model and a batch size.

    If a job runs out of memory, the batch size of all jobs is halved, down to 1. If a peer cannot
    be built, or a worker fails while it is measured, the measurement holds the error, and the
    others continue.

    Args:
        jobs: The jobs, ours first.
        length: How long to measure each variant.
        progress: Called with a line of text at each step of the work.

    Returns:
        A measurement of each variant, with the ratios between them.

    Raises:
        DeviceError: Our own job cannot be built, for a reason other than memory.
    """
    requested = batch = jobs[0].batch
    # Who measures for less than a second does not want to wait for one.
    warm_up_s = min(jobs[0].warm_up_s, length.seconds)
    while True:
        resized = [replace(job, batch=batch, warm_up_s=warm_up_s) for job in jobs]
        try:
            # On a GPU, one after another: peers that wait would take memory from the others.
            is_cpu = jobs[0].device == "cpu"
            groups = [resized] if is_cpu else [[job] for job in resized]
            measurements = [
                one for group in groups for one in _measure_alternately(group, length, progress)
            ]
        except OutOfMemory:
            if batch == 1:
                return [failed(job, "out of memory with a batch of 1") for job in resized]
            log.warning(
                "%s: out of memory with a batch of %d, trying %d", jobs[0].model, batch, batch // 2
            )
            batch //= 2
            continue
        if batch != requested:
            for measurement in measurements:
                measurement.notes.append(f"out of memory with a batch of {requested}")
        add_ratios(measurements)
        return measurements


def _measure_alternately(
    jobs: Sequence[Job], length: RunLength, progress: Progress
) -> list[Measurement]:
    """Start a worker for each job, and run their variants in rounds until all have enough samples.

    Raises:
        OutOfMemory: A worker runs out of memory.
        DeviceError: See `measure`.
    """
    with contextlib.ExitStack() as stack:
        variants, without_worker = _start_workers(jobs, stack, progress)
        running = [v for v in variants if v.measurement.error is None]
        while running:
            for variant in running:
                _run_round(variant, length.round_seconds)
            running = [v for v in running if v.measurement.error is None]
            if not running:
                break
            runs = min(len(v.measurement.samples_s) for v in running)
            progress(f"{jobs[0].model}, batch {jobs[0].batch}: {runs} runs of each")
            # All variants run in every round, so that rounds can be compared.
            if all(length.is_over(v.measurement.samples_s) for v in running):
                break
        return [v.measurement for v in variants] + without_worker


def _run_round(variant: _TimedVariant, seconds: float) -> None:
    """Run a variant once more. If its worker fails, the measurement holds the error alone.

    Raises:
        OutOfMemory: The worker runs out of memory.
    """
    measurement = variant.measurement
    try:
        samples, together = variant.worker.run(variant.number, seconds)
    except WorkerFailed as error:
        measurement.error = str(error)
        measurement.samples_s, measurement.together_s, measurement.rounds = [], [], []
        return
    measurement.samples_s += samples
    if measurement.mode == "files":
        for name, value in variant.worker.facts.items():
            setattr(measurement, name, value)
    if together is not None:
        measurement.together_s.append(together)
    measurement.rounds.append(together or statistics.median(samples))


def _start_workers(
    jobs: Sequence[Job], stack: contextlib.ExitStack, progress: Progress
) -> tuple[list[_TimedVariant], list[Measurement]]:
    """Start a worker for each job. Models of the zoo that a peer does not offer are left out.

    Args:
        jobs: The jobs.
        stack: Ends the workers when it closes.
        progress: Called with a line of text for each job.

    Returns:
        The variants of all workers, and the measurements of peers that have failed, or do not offer
        a model that is not in the zoo.

    Raises:
        OutOfMemory: A worker runs out of memory.
        DeviceError: Our own job cannot be built.
    """
    variants: list[_TimedVariant] = []
    without_worker = []
    for job in jobs:
        progress(f"{job.model}, {job.dtype}, batch {job.batch}: preparing {job.implementation}")
        try:
            worker = stack.enter_context(Worker(job))
        except NotOffered as error:
            log.info("%s", error)
            if job.description is not None or job.mode == "files":
                without_worker.append(replace(failed(job, None), unavailable=str(error)))
            continue
        except WorkerFailed as error:
            if job.implementation == OURS:
                raise DeviceError(f"{job.model}: {error}") from error
            without_worker.append(failed(job, str(error)))
            continue
        variants += [
            _TimedVariant(worker, number, measurement)
            for number, measurement in enumerate(worker.rows)
        ]
    return variants, without_worker


def failed(job: Job, error: str | None) -> Measurement:
    """Return a measurement that has no samples, and an error if there is one."""
    compiled, attention = False, None
    if job.implementation == OURS:
        attention = job.attentions[0]
    return Measurement(
        job.model, job.implementation, attention, compiled, job.mode, job.device, job.dtype,
        job.batch, error=error,
    )  # fmt: skip


class Worker:
    """A process that builds a job and runs its variants on request.

    Use it as a context manager, which ends the process. `rows` holds a measurement of each variant,
    without samples.

    Raises:
        OutOfMemory: The batch does not fit in memory. `run` raises this, too.
        WorkerFailed: The job cannot be built or run. `run` raises this, too.
        NotOffered: The peer has no such model.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts: dict[str, Any] = {}  # fields of the measurement that the last run has shown
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        command = [sys.executable, "-m", "hiera_core.benchmarking.worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=allocator.environment(),  # as in the commands
        )
        try:
            self._send(asdict(job))  # a job with many files is too long for a command line
            self.rows = [Measurement.from_json(v) for v in self._read_answer()["rows"]]
        except BaseException:
            self.close()
            raise

    def run(self, variant: int, seconds: float) -> tuple[list[float], float | None]:
        """Run a variant for `seconds`, at least once. Return the seconds of each call on an idle
        device, and of a call among calls that follow one another; None for that on a CPU."""
        self._send({"variant": variant, "seconds": seconds})
        answer = self._read_answer()
        self.facts = answer.get("facts", {})
        return answer["samples"], answer.get("together")

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading the answer then raises the error
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code == -signal.SIGKILL:  # Linux kills processes when memory runs out
                raise OutOfMemory
            raise WorkerFailed(f"its process ended with code {code}: {self._last_error_line()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:  # it was cut, when the process died
            raise WorkerFailed(f"its answer is damaged: {self._last_error_line()}") from error
        if answer.get("failed") == "memory":
            raise OutOfMemory
        if answer.get("failed") == "not offered":
            raise NotOffered(answer["message"])
        if "failed" in answer:
            raise WorkerFailed(answer["message"])
        return answer

    def _last_error_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def job_groups(
    models: Sequence[str], batches: Sequence[int], template: Job, peers: Sequence[str]
) -> Iterator[list[Job]]:
    """Yield the jobs to measure together, for each model and batch size: ours and the peers'.

    Args:
        models: Names of models.
        batches: Batch sizes.
        template: Our job. Its model and batch size are replaced.
        peers: Names of peers. `reference:fp32` has a dtype of its own.
    """
    for model in models:
        for batch in batches:
            ours = replace(template, model=model, batch=batch)
            jobs = [ours]
            for peer in peers:
                name, _, dtype = peer.partition(":")
                jobs.append(replace(ours, implementation=name, dtype=dtype or ours.dtype))
            yield jobs
