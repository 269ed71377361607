"""Measures jobs, each in a process of its own, and lets those of one model take turns."""

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
from .job import OURS, Job, Measurement, RunLength, add_ratios
from .peers import NotOffered

log = logging.getLogger("hiera")
Progress = Callable[[str], None]


class OutOfMemory(Exception):
    """A worker's device, or its process, had no memory for the batch."""


class WorkerFailed(Exception):
    """A worker could not build or run its job."""


@dataclass
class _Turn:
    """A variant and the worker that runs it."""

    worker: Worker
    number: int
    row: Measurement


def measure(
    jobs: Sequence[Job], length: RunLength, progress: Progress = lambda text: None
) -> list[Measurement]:
    """Rows of jobs on one model and batch, measured in turns. Out of memory halves the batch of
    all of them, down to 1; a job that fails is a row with its error, and the others go on."""
    wanted = jobs[0].batch
    batch = wanted
    while True:
        now = [replace(job, batch=batch) for job in jobs]
        try:
            rows = _in_turns(now, length, progress)
        except OutOfMemory:
            if batch == 1:
                return [_failed(job, "out of memory with a batch of 1") for job in now]
            log.warning(
                "%s: out of memory with a batch of %d, trying %d", jobs[0].model, batch, batch // 2
            )
            batch //= 2
            continue
        if batch != wanted:
            for row in rows:
                row.notes.append(f"out of memory with a batch of {wanted}")
        add_ratios(rows)
        return rows


def _in_turns(jobs: Sequence[Job], length: RunLength, progress: Progress) -> list[Measurement]:
    with contextlib.ExitStack() as stack:
        turns, failed = [], []
        for job in jobs:
            progress(f"{job.model}, {job.dtype}, batch {job.batch}: preparing {job.implementation}")
            try:
                worker = stack.enter_context(Worker(job))
            except NotOffered as error:
                log.info("%s", error)
                continue
            except WorkerFailed as error:
                if job.implementation == OURS:
                    raise DeviceError(f"{job.model}: {error}") from error
                failed.append(_failed(job, str(error)))
                continue
            turns += [_Turn(worker, n, row) for n, row in enumerate(worker.rows)]
        going = [t for t in turns if t.row.error is None]
        while going:
            for turn in going:
                samples = turn.worker.run(turn.number, length.turn)
                turn.row.samples_s += samples
                turn.row.rounds.append(statistics.median(samples))
            runs = min(len(t.row.samples_s) for t in going)
            progress(f"{jobs[0].model}, batch {jobs[0].batch}: {runs} runs of each")
            # Together to the end, so that their turns can be compared.
            if all(length.is_over(t.row.samples_s) for t in going):
                break
        return [t.row for t in turns] + failed


def _failed(job: Job, error: str) -> Measurement:
    compiled, attention = False, None
    if job.implementation == OURS:
        attention = job.attentions[0]
    return Measurement(
        job.model, job.implementation, attention, compiled, job.mode, job.device, job.dtype,
        job.batch, error=error,
    )  # fmt: skip


class Worker:
    """A process that has built a job. Use as a context: the process ends with it.

    Raises:
        OutOfMemory, WorkerFailed, NotOffered: when it is made, or runs.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        command = [sys.executable, "-m", "hiera_core.benchmarking.worker", json.dumps(asdict(job))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.rows = [Measurement.from_json(values) for values in self._answer()["rows"]]
        except BaseException:
            self.close()
            raise

    def run(self, variant: int, seconds: float) -> list[float]:
        """Seconds of each call of a variant, for about so long."""
        assert self._process.stdin is not None
        request = json.dumps({"variant": variant, "seconds": seconds})
        with contextlib.suppress(BrokenPipeError):  # the answer will say what happened
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        samples: list[float] = self._answer()["samples"]
        return samples

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code == -signal.SIGKILL:  # Linux does this to the largest when memory runs out
                raise OutOfMemory
            raise WorkerFailed(f"its process ended with code {code}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("failed") == "memory":
            raise OutOfMemory
        if answer.get("failed") == "not offered":
            raise NotOffered(answer["message"])
        if "failed" in answer:
            raise WorkerFailed(answer["message"])
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
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
    """What is measured together: ours and its peers on one model at one batch size. A peer may
    carry a dtype of its own: `reference:fp32`."""
    for model in models:
        for batch in batches:
            ours = replace(template, model=model, batch=batch)
            jobs = [ours]
            for peer in peers:
                name, _, dtype = peer.partition(":")
                jobs.append(replace(ours, implementation=name, dtype=dtype or ours.dtype))
            yield jobs
