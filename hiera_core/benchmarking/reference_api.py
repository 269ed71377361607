"""The reference's function that measures throughput, with the same signature."""

from __future__ import annotations

import time

import torch
from torch import nn

from .timer import synchronise


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = 0,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Return the throughput of a model, in evaluation mode on random input.

    Args:
        model: The model. It is moved to the device and stays there.
        device: Where to run. An int is the index of a CUDA device, as in the reference.
        input_size: (channels, *size) of one input.
        batch_size: Number of inputs in a run.
        runs: Number of runs, including warm-up runs.
        throw_out: Fraction of the runs that are warm-up runs.
        use_fp16: Run with half-precision input under autocast.
        verbose: Print the result.

    Returns:
        Inputs/s.
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    model = model.eval().to(device)
    x = torch.rand(batch_size, *input_size, device=device)
    x = x.half() if use_fp16 else x
    warm_up = int(runs * throw_out)
    with torch.autocast(device.type, enabled=use_fp16), torch.no_grad():
        for _ in range(warm_up):
            model(x)
        synchronise(device)
        start = time.perf_counter()
        for _ in range(runs - warm_up):
            model(x)
        synchronise(device)
    rate = (runs - warm_up) * batch_size / (time.perf_counter() - start)
    if verbose:
        print(f"Throughput: {rate:.2f} im/s")
    return rate
