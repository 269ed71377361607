"""Weights of linear layers in the order in which oneDNN reads them.

oneDNN otherwise reorders the weights anew in each call, which costs a tenth of a product with the
number of rows that a Hiera has. So a model that is only used for inference keeps them reordered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Largest total size, in bytes, of the weights that are kept twice: Hiera-L has 850 MB in fp32.
MAX_PACKED_BYTES = 1 << 30
ATTRIBUTE = "packed_weight"  # of a linear layer


class PackedWeight:
    """The weight of a linear layer in oneDNN's order, made when the layer is first called.

    It is made again when the parameter is replaced, changed in place, or given other memory, as
    `model.to(dtype)` does. Only changes in place through `.data` pass unnoticed. Copies and pickles
    of it are empty.
    """

    def __init__(self) -> None:
        self._weight: torch.Tensor | None = None
        self._state: tuple[int, int, torch.dtype] | None = None  # changes, address and dtype
        self._kept: torch.Tensor | None = None  # so that no other memory gets this address
        self._packed: torch.Tensor | None = None

    def of(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the packed weight.

        Args:
            weight: The parameter, [dim_out, dim_in].
            rows: Rows of the input. The order suits this number, and works with all.
        """
        state = weight._version, weight.data_ptr(), weight.dtype
        packed = self._packed
        if packed is None or weight is not self._weight or state != self._state:
            self._kept = weight.detach()
            packed = torch.ops.mkldnn._reorder_linear_weight(self._kept, rows)
            self._packed, self._weight, self._state = packed, weight, state
        return packed

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def pack_weights(model: nn.Module) -> None:
    """Let the linear layers of a model keep packed weights, in all up to `MAX_PACKED_BYTES`. They
    are made when a layer is first called on a CPU.

    The largest layers come last, because they gain least: their reordering costs less than their
    product.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    left = MAX_PACKED_BYTES
    for layer in sorted(layers, key=lambda layer: layer.weight.numel()):
        left -= layer.weight.numel() * layer.weight.element_size()
        if left < 0:
            return
        if not layer.weight.is_inference():  # such tensors do not count their changes
            layer.__dict__[ATTRIBUTE] = PackedWeight()


def packed_weight(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the weight that oneDNN reads fastest: the packed one, if the layer keeps one."""
    packed: PackedWeight | None = layer.__dict__.get(ATTRIBUTE)
    return weight if packed is None else packed.of(weight, x.numel() // x.shape[-1])
