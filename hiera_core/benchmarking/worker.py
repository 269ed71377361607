"""One process: builds a job's variants and times them, a turn at a time, as it is asked.

`python -m hiera_core.benchmarking.worker JOB` reads requests from standard input and answers on
standard output, a line of JSON each; the first answer says what was built.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import IO, Any

import torch

from ..device import DTYPES, compile_faults, is_out_of_memory
from ..errors import HieraError, first_line
from . import peers, workloads
from .job import Job
from .timer import PeakMemory, timed_for

WARM_UP_S = 1.0


def main() -> None:
    warnings.simplefilter("ignore")
    channel = _own_channel()
    job = Job(**json.loads(sys.argv[1]))
    try:
        with workloads.in_words(job):
            variants = _prepare(job)
        _say(channel, rows=[v.row.to_json() for v in variants])
        for line in sys.stdin:
            asked = json.loads(line)
            variant = variants[asked["variant"]]
            samples = timed_for(variant.step, torch.device(job.device), asked["seconds"])
            _say(channel, samples=samples)
    except Exception as error:
        traceback.print_exc()
        _say(channel, **_failure(error))
    channel.flush()
    os._exit(0)  # tearing down a device and its libraries takes long, and may fail


def _prepare(job: Job) -> list[workloads.Variant]:
    """Build, warm up, and take each variant's peak memory; a form that fails is a row that says
    so, as long as there is another."""
    device = torch.device(job.device)
    torch.manual_seed(0)
    memory = PeakMemory(device)
    rate = workloads.matmul_gflops(device, DTYPES[job.dtype])
    variants = workloads.build(job)
    for variant in variants:
        variant.row.matmul_gflops = rate
        try:
            with compile_faults():
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
    if is_out_of_memory(error):
        return {"failed": "memory", "message": "out of memory"}
    if isinstance(error, peers.NotOffered):
        return {"failed": "not offered", "message": str(error)}
    kind = "ours" if isinstance(error, HieraError) else "error"
    return {"failed": kind, "message": first_line(error)}


def _own_channel() -> IO[str]:
    """Standard output for answers only; what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _say(channel: IO[str], **answer: Any) -> None:
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
