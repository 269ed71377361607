"""Count the operations of a model, and measure how many a device performs per second."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import cpu
from ..models.factory import model_class
from ..models.masking import MASK_RATIOS, draw_units
from . import peers
from .job import OURS, Job
from .timer import timed


def count_gmacs(job: Job) -> float:
    """Return the number of multiply-adds in the forward pass of one input, divided by 1e9.

    They are counted with eager attention, because the counter may not see fused and compiled
    kernels. The model is on the meta device, so nothing is computed.
    """
    entry = job.entry
    with torch.device("meta"):
        if job.implementation == OURS or peers.PEERS[job.implementation].same_model:
            model: nn.Module = model_class(entry)(**entry.config)
            model.set_attention("eager")  # type: ignore[operator]
        else:
            model = peers.PEERS[job.implementation].build(entry, job.mode)
        x = torch.empty(1, entry.config.get("in_chans", 3), *entry.config["input_size"])
        arguments = {}
        if entry.autoencoder:
            windows = model.layout.windows  # type: ignore[union-attr]
            arguments["keep_ids"] = draw_units(1, windows, MASK_RATIOS[entry.kind], device=x.device)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x, **arguments)
    return counter.get_total_flops() / 2e9


def matmul_gflops(device: torch.device, dtype: torch.dtype, runs: int = 8) -> float:
    """Return the throughput of a large matrix multiplication, in 1e9 operations/s.

    It is a practical limit of the device. On a CPU it uses the fastest library that is available,
    which may not be the one behind `torch.matmul`. The best of `runs` counts.
    """
    size = 2048 if device.type == "cpu" else 8192
    layer = nn.Linear(size, size, device=device, dtype=dtype)
    x = torch.randn(size, size, device=device, dtype=dtype)
    with torch.inference_mode():
        timed(lambda: cpu.linear(layer, x), device)
        best = min(timed(lambda: cpu.linear(layer, x), device) for _ in range(runs))
    return 2 * size**3 / best / 1e9
