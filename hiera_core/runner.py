"""A model ready to run: its preprocessing, on a device, in batches that fit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from .device import (
    compile_faults,
    compile_for_inference,
    is_out_of_memory,
    select_device,
    select_dtype,
)
from .errors import DeviceError, UsageError
from .model import HieraEncoder
from .preprocess.image import ImageTransform
from .preprocess.video import VideoTransform
from .records import Kind

log = logging.getLogger("hiera")
Result = TypeVar("Result")
M = TypeVar("M", bound=HieraEncoder)

# Views in one pass. On a CPU larger batches only leave the cache; a GPU wants many.
AUTO_BATCH = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16},
    "video": {"cpu": 1, "cuda": 16, "mps": 2},
}


class Runner(Generic[M, Result]):
    """What all tasks do with a model; a subclass says what it makes of a batch.

    Args:
        model: a built model.
        borrowed: the model is the caller's: `auto` is the device and dtype it has, and it is copied
            where something about it has to change.
        device, dtype: see `select_device`, `select_dtype`.
        batch_size: views in one pass, or None for a size that suits the device. Out of memory
            halves it.
        compile: run the model through torch.compile.

    Raises:
        UsageError: the model takes signals.
        DeviceError: the device is not there, or too small for the model.
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
        size = model.config["input_size"]
        if len(size) == 1:
            raise UsageError("this model takes signals", "give one for pictures or videos")
        self.model: M = _placed(model, device, dtype, borrowed)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        card: dict[str, Any] = getattr(model, "card", {})
        self.kind: Kind = "video" if len(size) == 3 else "image"
        self.name = str(card.get("model") or type(model).__name__)
        transforms: dict[Kind, Any] = {"image": ImageTransform, "video": VideoTransform}
        self.transform: Any = transforms[self.kind].from_card(card.get("preprocessing"), size)
        self.batch_size = batch_size or AUTO_BATCH[self.kind][self.device.type]
        # A compiled program is for one number of views; the last batch is filled up to it.
        self._compile, self._compiled_for = compile, 0

    def compute(self, x: torch.Tensor) -> Sequence[Result]:
        """One batch, normalised, float32 on the device [b, 3, *size] -> a result for each."""
        raise NotImplementedError

    def run(self, views: Sequence[np.ndarray]) -> list[Result]:
        """Views as the transform makes them -> a result for each.

        Raises:
            DeviceError: out of memory with a single view.
        """
        done: list[Result] = []
        while len(done) < len(views):
            last = min(len(done) + self.batch_size, len(views))
            try:
                pixels = np.stack([views[i] for i in range(len(done), last)])
                done += self._batch(pixels)
            except (RuntimeError, MemoryError) as error:
                self._halve(error, last - len(done))
        return done

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function through torch.compile, where that was asked for."""
        return compile_for_inference(function, self.device) if self._compile else function

    def _batch(self, pixels: np.ndarray) -> Sequence[Result]:
        count = len(pixels)
        if self._compile:
            missing = max(0, self._compiled_for - count)
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, 0)])
            self._compiled_for = len(pixels)
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        with torch.inference_mode(), compile_faults():
            return self.compute(self.transform.normalise(batch))[:count]

    def _halve(self, error: Exception, tried: int) -> None:
        if not is_out_of_memory(error):
            raise error
        if tried == 1:
            raise DeviceError(
                f"{self.device} has no memory left for one {self.kind}",
                "use a smaller model or --dtype bf16",
            ) from error
        self.batch_size = tried // 2
        log.warning("out of memory: going on with batches of %d", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _placed(model: M, device: str, dtype: str, borrowed: bool) -> M:
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
            f"{where} has no memory for the model", "use a smaller model or --dtype bf16"
        ) from error
