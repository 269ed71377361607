"""A batch on its way from the workers to the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .mixing import PairMix


class Erasure(NamedTuple):
    """A box of a view that becomes Gaussian noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int  # of the noise


@dataclass
class Batch:
    """Tensors for n samples x r repeats. The pixels are bytes until they are on the device."""

    x: torch.Tensor  # [n r, 3, *size], uint8 until `FinishViews`; see `LoadedSample.views`
    weight: torch.Tensor  # [n r], 1, or 0 for padding and unreadable samples
    target: torch.Tensor | None = None  # [n r, classes], for classifiers
    visible_units: torch.Tensor | None = None  # [n r, k], for autoencoders
    bad: tuple[tuple[str, str], ...] = ()  # name and error of each unreadable sample
    views: int = 0  # number of views without padding, also of unreadable samples
    repeats: int = 1  # r
    erasures: tuple[tuple[int, Erasure], ...] = ()  # rows of `x` that `FinishViews` erases
    mixes: list[PairMix] = field(default_factory=list)  # for each view of each pair; or empty

    def to(self, device: torch.device) -> Batch:
        """Return a copy on a device."""
        # Only CUDA copies without waiting. MPS would read memory that may be freed by then
        # (https://github.com/pytorch/pytorch/issues/189690).
        non_blocking = device.type == "cuda"

        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            x=move(self.x),
            weight=move(self.weight),
            target=move(self.target),
            visible_units=move(self.visible_units),
        )

    def pin_memory(self) -> Batch:
        """Pin `x`, the only large tensor. DataLoader calls this if `pin_memory` is set."""
        self.x = self.x.pin_memory()
        return self
