"""What a model computes for an input size, kept for the next input of this size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Self, TypeVar

import torch

from ..probes import ORDINARY_TYPES, PROBES_EXIST, is_watched

MAX_CACHED = 8  # input sizes whose position embedding and token order are kept

T = TypeVar("T")


class KeptPosition(NamedTuple):
    """A position embedding, and the parameters that it was computed from."""

    embedding: torch.Tensor
    sources: tuple[torch.Tensor, ...]  # on a CPU copies; elsewhere they share the memory
    versions: tuple[int, ...]  # how often each had been written to

    @classmethod
    def of(cls, embedding: torch.Tensor, parameters: Sequence[torch.Tensor]) -> KeptPosition:
        """Return an embedding with the present values of its parameters."""
        sources = tuple(p.detach().clone() if p.is_cpu else p.detach() for p in parameters)
        return cls(embedding, sources, tuple(p._version for p in parameters))

    def is_current(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Return whether the parameters still have the same values.

        On a CPU, the values are compared, which takes far less time than a block. Elsewhere, this
        would make the program wait for the device, so memory and version are compared.
        """
        return all(
            torch.equal(p, source)
            if p.is_cpu
            else (p.data_ptr(), p._version) == (source.data_ptr(), version)
            for p, source, version in zip(parameters, self.sources, self.versions, strict=True)
        )


class SizeCache:
    """Token orders and position embeddings of the last input sizes, at most `MAX_CACHED` of each.

    Under a compiler, nothing is read from the cache or kept in it. A copy of a model begins with an
    empty cache, and so does a model that is loaded.

    Attributes:
        orders, positions: What is kept, the oldest first.
    """

    def __init__(self) -> None:
        self.orders: dict[Hashable, object] = {}
        self.positions: dict[Hashable, KeptPosition] = {}

    def order(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the token order for `key`, which `compute` makes if it is not kept.

        It is neither kept nor read where a tracer, a mode or a functional transform sees each
        operation, because `compute` then returns tensors of another kind; and while a CUDA graph is
        captured, because their memory is then that of the graph.
        """
        if torch.compiler.is_compiling() or not PROBES_EXIST or is_watched() or _is_captured():
            return compute()
        kept = self.orders.get(key)  # one step, since another thread can remove it
        if kept is not None:
            return kept  # type: ignore[return-value]
        with torch.inference_mode(False):
            found = compute()
        _keep(self.orders, key, found)
        return found

    def position(
        self,
        key: Hashable,
        parameters: Sequence[torch.Tensor],
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Return the position embedding for `key`, which `compute` makes if it is not kept.

        It is not kept where gradients are computed, or a tracer, a mode or a functional transform
        sees each operation.

        Args:
            key: The size.
            parameters: The parameters that the embedding is computed from. New values, another
                dtype or another device make the kept embedding invalid. On a GPU, values that are
                written through `parameter.data` are not noticed until `train()` or `eval()` is
                called.
            compute: Returns the embedding.
        """
        if torch.compiler.is_compiling() or not _may_keep(parameters):
            return compute()
        key = (key, *((p.dtype, p.device) for p in parameters))
        found = self.positions.get(key)
        if found is None or not found.is_current(parameters):
            found = KeptPosition.of(compute(), parameters)
            _keep(self.positions, key, found)
        return found.embedding

    def forget_positions(self) -> None:
        """Remove all position embeddings."""
        self.positions.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def _is_captured() -> bool:
    """Return whether a CUDA graph is being captured. CUDA is not initialised for the question."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _may_keep(parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether an embedding of these parameters is a plain tensor that stays valid."""
    if torch.is_grad_enabled() or not PROBES_EXIST or is_watched() or _is_captured():
        return False
    return not any(
        type(p) not in ORDINARY_TYPES
        or p.is_meta
        or p.is_inference()  # writes to it are not counted
        or p.layout is not torch.strided
        for p in parameters
    )


def _keep(cache: dict[Hashable, T], key: Hashable, value: T) -> None:
    """Keep a value, in place of the oldest one if the cache is full."""
    cache.pop(key, None)
    for oldest in list(cache)[: max(0, len(cache) + 1 - MAX_CACHED)]:
        cache.pop(oldest, None)
    cache[key] = value
