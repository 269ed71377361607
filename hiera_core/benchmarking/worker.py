"""Worker process: build the variants of a job, and time them on request.

`python -m hiera_core.benchmarking.worker` reads the job and then requests from standard input, and
writes answers to standard output. Each is a line of JSON. The first answer describes the variants;
the following ones hold the samples of a round.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import IO, Any

import torch

from ..compiling.compiled import translate_compile_errors
from ..device import DTYPES, exact_fp32, is_out_of_memory
from ..errors import DeviceError, HieraError, InputError, first_line
from ..process.allocator import keep_freed_memory
from . import flops, peers, workloads
from .job import Job
from .measurement import Variant
from .timer import PeakMemory, timed_for, timed_together


def main() -> None:
    """Run the job until standard input ends."""
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as in the commands, and for peers, too
    channel = _open_answer_channel()
    job = Job.from_json(json.loads(sys.stdin.readline()))
    device = torch.device(job.device)
    try:
        # `hiera train` computes what is outside of autocast exactly, too.
        if (job.dtype == "fp32" or job.mode == "train") and device.type == "cuda":
            exact_fp32().__enter__()  # for the whole process, and for peers, too
        memory = PeakMemory(device)
        with workloads.translate_errors(job):
            variants = _prepare(job, memory)
        _send(channel, rows=[variant.row.to_json() for variant in variants])
        for line in sys.stdin:
            request = json.loads(line)
            variant = variants[request["variant"]]
            if variant.warm_up is not None:
                try:
                    answer = _run_whole(variant, device, request["seconds"], memory)
                except InputError as error:  # the other variants say so, too
                    answer = _failure(error)
                _send(channel, **answer)
                continue
            _send(channel, **_run_round(variant, device, request["seconds"]))
    except Exception as error:
        traceback.print_exc()
        _send(channel, **_failure(error))
    channel.flush()
    os._exit(0)  # a normal exit unloads device libraries, which is slow and can fail


def _run_round(variant: Variant, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time a variant: each run on an idle device, and, on devices that compute beside the host,
    runs that follow one another, half of the time each."""
    if device.type == "cpu":
        return {"samples": timed_for(variant.step, device, seconds)}
    samples = timed_for(variant.step, device, seconds / 2)
    return {"samples": samples, "together": timed_together(variant.step, device, seconds / 2)}


def _run_whole(
    variant: Variant, device: torch.device, seconds: float, memory: PeakMemory
) -> dict[str, Any]:
    """Time runs from files to answers, and add what is known after them."""
    memory.start()
    samples = timed_for(variant.step, device, seconds)
    return {"samples": samples, "facts": {**variant.facts, "memory_mib": memory.peak()}}


def _prepare(job: Job, memory: PeakMemory) -> list[Variant]:
    """Build and warm up the variants of a job, and measure their peak memory.

    If one of several variants fails, its measurement holds the error.
    """
    device = torch.device(job.device)
    torch.manual_seed(0)
    if job.mode == "files":
        return _prepare_files(job)
    variants = workloads.build(job)  # first, because a peer without the model needs no rate
    rate = flops.matmul_gflops(device, DTYPES[job.dtype], runs=max(2, round(8 * job.warm_up_s)))
    for variant in variants:
        variant.row.matmul_gflops = rate
        try:
            with translate_compile_errors():
                variant.step()
                memory.start()
                variant.step()
                variant.row.memory_mib = memory.peak()
                timed_for(variant.step, device, job.warm_up_s)
        except Exception as error:
            if is_out_of_memory(error) or len(variants) == 1:
                raise
            variant.row.error = first_line(error)
    return variants


def _prepare_files(job: Job) -> list[Variant]:
    """Build and warm up what reads files. If the compiled variant fails, its measurement holds the
    error."""
    variants = workloads.build(job)
    for variant in variants:
        assert variant.warm_up is not None
        try:
            with translate_compile_errors():
                variant.warm_up()
        except DeviceError as error:
            if not variant.row.compiled:
                raise
            variant.row.error = first_line(error)
    return variants


def _failure(error: Exception) -> dict[str, Any]:
    """Return the answer that reports an error."""
    if is_out_of_memory(error):
        return {"failed": "memory", "message": "out of memory"}
    if isinstance(error, peers.NotOffered):
        return {"failed": "not offered", "message": str(error)}
    kind = "ours" if isinstance(error, HieraError) else "error"
    return {"failed": kind, "message": first_line(error)}


def _open_answer_channel() -> IO[str]:
    """Return standard output, for answers only, and send what libraries print to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _send(channel: IO[str], **answer: Any) -> None:
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
