"""Batches that devices compute, and what their results can be had from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

from .transfer import Download, map_tensors

Result = TypeVar("Result")


class Launched(Generic[Result]):
    """A batch that the device computes.

    Args:
        found: Its results on their way to the host.
        count: Number of inputs, without those that only fill the batch.
        split: See `BatchRunner._split`.
        again: Computes the results again in a dtype of a larger range, or returns None if that is
            of no use. It is called if one is NaN or infinite; None: it is not.
    """

    def __init__(
        self,
        found: Download,
        count: int,
        split: Callable[[Any], Sequence[Result]],
        again: Callable[[], Sequence[Result] | None] | None = None,
    ) -> None:
        self._found, self._count, self._split, self._again = found, count, split, again

    @property
    def found(self) -> Any:
        """What was computed, on the host."""
        return self._found.wait()

    def results(self) -> Sequence[Result]:
        """Return one result for each input, when the device has computed them."""
        found = self.found
        if self._again is not None and not all_finite(found):
            wider = self._again()
            if wider is not None:
                return wider
        return self._split(found)[: self._count]


class Started(Generic[Result]):
    """Views that were given to a device: see `BatchRunner.start`.

    Args:
        done: Results that are complete.
        batches: Batches that the device computes.
    """

    def __init__(
        self, done: Sequence[Result] = (), batches: Sequence[Launched[Result]] = ()
    ) -> None:
        self._done, self._batches = done, batches

    @property
    def is_running(self) -> bool:
        """Whether the device may still compute."""
        return bool(self._batches)

    def results(self) -> list[Result]:
        """Return one result for each view, when the device has computed them."""
        return [*self._done, *(r for batch in self._batches for r in batch.results())]


class StartedElsewhere(Started[Result]):
    """Views that were given to a replica, in its thread."""

    def __init__(self, future: Future[Started[Result]]) -> None:
        self._future = future

    @property
    def is_running(self) -> bool:
        return True

    def results(self) -> list[Result]:
        return self._future.result().results()


def all_finite(found: Any) -> bool:
    """Return whether no value of a tensor, or of a dictionary or dataclass of tensors, is NaN or
    infinite."""
    finite: list[bool] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        finite.append(bool(tensor.isfinite().all()))
        return tensor

    map_tensors(look, found)
    return all(finite)
