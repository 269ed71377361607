"""Worker process: build the variants of a job, and time them on request.

`python -m hiera_core.benchmarking.worker JOB` reads requests from standard input and writes answers
to standard output. Each is a line of JSON. The first answer describes the variants; the following
ones hold the samples of a round.
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
from ..errors import HieraError, first_line
from . import flops, peers, workloads
from .job import Job
from .timer import PeakMemory, timed_for, timed_together

WARM_UP_S = 1.0


def main() -> None:
    """Run the job in `sys.argv` until standard input ends."""
    warnings.simplefilter("ignore")
    channel = _open_answer_channel()
    job = Job(**json.loads(sys.argv[1]))
    try:
        if job.dtype == "fp32" and torch.device(job.device).type == "cuda":
            exact_fp32().__enter__()  # for the whole process, and for peers, too
        with workloads.translate_errors(job):
            variants = _prepare(job)
        _send(channel, rows=[variant.row.to_json() for variant in variants])
        for line in sys.stdin:
            request = json.loads(line)
            variant = variants[request["variant"]]
            _send(channel, **_run_round(variant, torch.device(job.device), request["seconds"]))
    except Exception as error:
        traceback.print_exc()
        _send(channel, **_failure(error))
    channel.flush()
    os._exit(0)  # a normal exit unloads device libraries, which is slow and can fail


def _run_round(variant: workloads.Variant, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time a variant: each run on an idle device, and, on devices that compute beside the host,
    runs that follow one another, half of the time each."""
    if device.type == "cpu":
        return {"samples": timed_for(variant.step, device, seconds)}
    samples = timed_for(variant.step, device, seconds / 2)
    return {"samples": samples, "together": timed_together(variant.step, device, seconds / 2)}


def _prepare(job: Job) -> list[workloads.Variant]:
    """Build and warm up the variants of a job, and measure their peak memory.

    If one of several variants fails, its measurement holds the error.
    """
    device = torch.device(job.device)
    torch.manual_seed(0)
    memory = PeakMemory(device)
    rate = flops.matmul_gflops(device, DTYPES[job.dtype])
    variants = workloads.build(job)
    for variant in variants:
        variant.row.matmul_gflops = rate
        try:
            with translate_compile_errors():
                variant.step()
                memory.start()
                variant.step()
                variant.row.memory_mib = memory.peak()
                timed_for(variant.step, device, WARM_UP_S)
        except Exception as error:
            if is_out_of_memory(error) or len(variants) == 1:
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
