"""The reference's one-call throughput measurement, with its signature."""

from __future__ import annotations

import time

import torch
from torch import nn


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
    """Inputs a second of `model` in evaluation on random input.

    Args:
        model: moved to the device and left there.
        device: where to run; an int is a CUDA device, as in the reference.
        input_size: (channels, *size) of one input.
        batch_size: inputs a run.
        runs: runs in all.
        throw_out: share of the runs that only warm up.
        use_fp16: half-precision input under autocast.
        verbose: print the result.
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    model = model.eval().to(device)
    x = torch.rand(batch_size, *input_size, device=device)
    x = x.half() if use_fp16 else x
    warm_up = int(runs * throw_out)
    with torch.autocast(device.type, enabled=use_fp16), torch.no_grad():
        for _ in range(warm_up):
            model(x)
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(runs - warm_up):
            model(x)
        _synchronise(device)
    rate = (runs - warm_up) * batch_size / (time.perf_counter() - start)
    if verbose:
        print(f"Throughput: {rate:.2f} im/s")
    return rate


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
