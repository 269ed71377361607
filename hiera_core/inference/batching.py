"""Run a model on a device, with its preprocessing, in batches that fit in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import torch

from ..data.transforms import transform_for
from ..device import (
    compile_for_inference,
    is_out_of_memory,
    select_device,
    select_dtype,
    translate_compile_errors,
)
from ..errors import DeviceError
from ..models.hiera import HieraEncoder
from ..records import Kind

log = logging.getLogger("hiera")
Result = TypeVar("Result")
M = TypeVar("M", bound=HieraEncoder)

# Views in one forward pass. A GPU needs many; on a CPU, more views only overflow the cache.
DEFAULT_BATCH_SIZES: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16},
    "video": {"cpu": 1, "cuda": 16, "mps": 2},
}


class BatchOptions(TypedDict, total=False):
    """Keyword arguments of `BatchRunner`."""

    borrowed: bool
    device: str
    dtype: str
    batch_size: int | None
    compile: bool


class BatchRunner(Generic[M, Result]):
    """The part of inference that all tasks share; a subclass computes the results of a batch.

    Args:
        model: A built model.
        borrowed: The model belongs to the caller: `auto` keeps its device and dtype, and it is
            copied before anything about it changes.
        device, dtype: See `select_device` and `select_dtype`.
        batch_size: Views in one forward pass, or None for a size that suits the device. It is
            halved when memory runs out.
        compile: Compile the model with torch.compile.

    Raises:
        UsageError: The model takes one-dimensional signals.
        DeviceError: The device does not exist, or has too little memory for the model.
    """

    def __init__(
        self,
        model: M,
        *,
        borrowed: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        self.kind: Kind = model.input_kind()
        self.transform: Any = transform_for(model)
        self.model: M = _place(model, device, dtype, borrowed)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        card: dict[str, Any] = getattr(model, "card", {})
        self.name = str(card.get("model") or type(model).__name__)
        self.batch_size = batch_size or DEFAULT_BATCH_SIZES[self.kind][self.device.type]
        # A compiled program takes a fixed number of views; smaller batches are padded to it.
        self._compile, self._compiled_for = compile, 0

    def compute(self, x: torch.Tensor) -> Sequence[Result]:
        """Return one result for each input of a batch.

        Args:
            x: [b, 3, *size], normalised, float32, on the device.
        """
        raise NotImplementedError

    def run(self, views: Sequence[np.ndarray]) -> list[Result]:
        """Return one result for each view.

        Args:
            views: The views, as the transform returns them.

        Raises:
            DeviceError: There is not enough memory for a single view.
        """
        done: list[Result] = []
        while len(done) < len(views):
            last = min(len(done) + self.batch_size, len(views))
            try:
                pixels = np.stack([views[i] for i in range(len(done), last)])
                done += self._run_batch(pixels)
            except (RuntimeError, MemoryError) as error:
                self._halve_batch(error, last - len(done))
        return done

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, compiled with torch.compile if `compile` is set."""
        return compile_for_inference(function, self.device) if self._compile else function

    def _run_batch(self, pixels: np.ndarray) -> Sequence[Result]:
        count = len(pixels)
        if self._compile:
            missing = max(0, self._compiled_for - count)
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, 0)])
            self._compiled_for = len(pixels)
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":  # a copy from pinned memory does not block
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        with torch.inference_mode(), translate_compile_errors():
            return self.compute(self.transform.normalise(batch))[:count]

    def _halve_batch(self, error: Exception, tried: int) -> None:
        """Halve the batch size if memory ran out; raise any other error."""
        if not is_out_of_memory(error):
            raise error
        if tried == 1:
            raise DeviceError(
                f"{self.device} has no memory left for one {self.kind}",
                "use a smaller model or --dtype bf16",
            ) from error
        self.batch_size = tried // 2
        log.warning("out of memory: continuing with batches of %d", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _place(model: M, device: str, dtype: str, borrowed: bool) -> M:
    """Return the model in evaluation mode, on a device and in a dtype."""
    weight = next(model.parameters())
    keep_device, keep_dtype = (borrowed and choice == "auto" for choice in (device, dtype))
    where = weight.device if keep_device else select_device(device)
    number = weight.dtype if keep_dtype else select_dtype(dtype, where)
    if not model.training and (weight.device, weight.dtype) == (where, number):
        return model
    try:
        return (copy.deepcopy(model) if borrowed else model).to(where, number).eval()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{where} has too little memory for the model", "use a smaller model or --dtype bf16"
        ) from error
