"""Run a model on a device, with its preprocessing, in batches that fit in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import torch

from ..data.transforms import check_channels, transform_for
from ..device import (
    compile_for_inference,
    is_out_of_memory,
    select_device,
    select_dtype,
    translate_compile_errors,
)
from ..errors import DeviceError, UsageError
from ..models.encoder import Encoder
from ..records import Kind

log = logging.getLogger("hiera")
Result = TypeVar("Result")
M = TypeVar("M", bound=Encoder)

# Views in one forward pass. A GPU needs many; on a CPU, more views only overflow the cache.
DEFAULT_BATCH_SIZES: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16},
    "video": {"cpu": 1, "cuda": 16, "mps": 2},
}


class BatchOptions(TypedDict, total=False):
    """Keyword arguments of `BatchRunner`."""

    borrowed: bool
    device: str | torch.device
    dtype: str | torch.dtype
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
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        self.kind: Kind = model.input_kind()
        check_channels(model)
        self.transform: Any = transform_for(model)
        self.model: M = _place(model, device, dtype, borrowed)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        card: dict[str, Any] = getattr(model, "card", {})
        self.name = str(card.get("model") or type(model).__name__)
        sizes = DEFAULT_BATCH_SIZES[self.kind]
        self.batch_size = batch_size or sizes.get(self.device.type, sizes["cpu"])
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
            results = self._try_batch([views[i] for i in range(len(done), last)])
            if results is None:
                self._halve_batch(last - len(done))
            else:
                done += results
        return done

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, compiled with torch.compile if `compile` is set."""
        return compile_for_inference(function, self.device) if self._compile else function

    def _try_batch(self, views: Sequence[np.ndarray]) -> Sequence[Result] | None:
        """Return one result for each view, or None if memory ran out.

        The error is not kept: its traceback refers to every tensor of the failed batch, and these
        have to be freed before the next try.

        Raises:
            DeviceError: Memory ran out for a single view.
        """
        try:
            return self._run_batch(np.stack(views))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._padded(len(views)) > 1:
                return None
            raise DeviceError(
                f"{self.device} has no memory left for one {self.kind}",
                "use a smaller model or --dtype bf16",
            ) from error

    def _run_batch(self, pixels: np.ndarray) -> Sequence[Result]:
        count = len(pixels)
        missing = self._padded(count) - count
        if missing:
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, 0)])
        if self._compile:
            self._compiled_for = len(pixels)
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            # Only a copy from pinned memory may go on in the background: PyTorch keeps that memory
            # until the copy is done. On other devices `pixels` could be freed before.
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        else:
            batch = batch.to(self.device)
        with torch.inference_mode(), translate_compile_errors():
            return self.compute(self.transform.normalise(batch))[:count]

    def _padded(self, count: int) -> int:
        """Return the number of views, with padding, that the model gets for `count` views."""
        return max(count, self._compiled_for)

    def _halve_batch(self, count: int) -> None:
        """Halve the batch size after memory ran out for `count` views."""
        self.batch_size = self._padded(count) // 2
        self._compiled_for = 0  # the next batch is compiled for its own, smaller size
        log.warning("out of memory: continuing with batches of %d", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()


def _place(model: M, device: str | torch.device, dtype: str | torch.dtype, borrowed: bool) -> M:
    """Return the model in evaluation mode, on a device and in a dtype.

    Raises:
        UsageError: The model has no weights.
        DeviceError: The device does not exist, or does not suit the model.
    """
    weight = next(model.parameters())
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(
            "the weights of this model are on the meta device or offloaded",
            "load them first, for example with create_model(..., pretrained=True)",
        )
    keep_device, keep_dtype = (borrowed and choice == "auto" for choice in (device, dtype))
    where = weight.device if keep_device else select_device(device)
    number = weight.dtype if keep_dtype else select_dtype(dtype, where)
    if where.type == "mps" and number is torch.float64:
        raise DeviceError("mps has no float64", "use --dtype fp32")
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
