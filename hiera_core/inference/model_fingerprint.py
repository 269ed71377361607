"""What the results of a model depend on: its weights, dtype, preprocessing and class names."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch

from ..device import dtype_name
from .batching import BatchRunner
from .fingerprint import plain, text_digest

SAMPLES = 1024  # values of each tensor whose positions count
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def model_fingerprint(runner: BatchRunner[Any, Any]) -> dict[str, Any]:
    """Return what the results of a model depend on, ready for JSON."""
    names = getattr(runner, "class_names", None)
    return {
        "model": runner.name,
        "dtype": dtype_name(runner.dtype),
        "preprocessing": plain(asdict(runner.transform)),
        "weights": weights_digest(runner.model),
        "class names": None if names is None else text_digest(list(names)),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Return a short text that differs for models with different weights.

    It is quick: of each tensor it takes the sum of all bits, as integers, and some of the values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
        some = bits[:: max(1, len(bits) // SAMPLES)].cpu()
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
