"""A classifier ready to run: model, preprocessing and class names, on a device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import factory
from .device import (
    compile_faults,
    compile_for_inference,
    is_out_of_memory,
    select_device,
    select_dtype,
)
from .errors import DeviceError, UsageError
from .model import Hiera
from .preprocess.image import ImageTransform
from .preprocess.video import VideoTransform
from .records import Kind

log = logging.getLogger("hiera")

# Views in one pass. On a CPU larger batches only leave the cache; a GPU wants many.
AUTO_BATCH = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16},
    "video": {"cpu": 1, "cuda": 16, "mps": 2},
}


class Classifier:
    """Class probabilities of preprocessed views.

    Args:
        model: a built classifier.
        borrowed: the model is the caller's: `auto` is the device and dtype it has, and it is copied
            where something about it has to change.
        device, dtype: see `select_device`, `select_dtype`.
        batch_size: views in one pass, or None for a size that suits the device. Out of memory
            halves it.
        class_names: in place of the model's own.
        compile: run the model through torch.compile.

    Raises:
        UsageError: no classifier.
        DeviceError: the device is not there, or too small for the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        borrowed: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        class_names: Sequence[str] | None = None,
        compile: bool = False,
    ) -> None:
        self.model = _placed(_checked(model), device, dtype, borrowed)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        card: dict[str, Any] = getattr(model, "card", {})
        size = self.model.config["input_size"]
        self.kind: Kind = "video" if len(size) == 3 else "image"
        self.name = str(card.get("model") or type(model).__name__)
        transforms: dict[Kind, Any] = {"image": ImageTransform, "video": VideoTransform}
        self.transform: Any = transforms[self.kind].from_card(card.get("preprocessing"), size)
        self.class_names = class_names or factory.class_names_of(self.model)
        self.batch_size = batch_size or AUTO_BATCH[self.kind][self.device.type]
        # Logits: the softmax is taken in fp32, where 1000 probabilities do not fall together.
        logits = self.model.forward_logits
        self._run = compile_for_inference(logits, self.device) if compile else logits
        self._compiled_for = 0 if compile else None  # views: another number compiles anew

    def __call__(self, views: Sequence[np.ndarray]) -> torch.Tensor:
        """Views as the transform makes them -> float32 [views, classes] on the CPU.

        Raises:
            DeviceError: out of memory with a single view.
        """
        done: list[torch.Tensor] = []
        first = 0
        while first < len(views):
            last = min(first + self.batch_size, len(views))
            try:
                done.append(self.probabilities(np.stack([views[i] for i in range(first, last)])))
            except (RuntimeError, MemoryError) as error:
                self._halve(error, last - first)
            else:
                first = last
        return torch.cat(done)

    def probabilities(self, pixels: np.ndarray) -> torch.Tensor:
        """One batch."""
        count = len(pixels)
        if self._compiled_for is not None:  # the last batch of many is filled up
            missing = max(0, self._compiled_for - count)
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, 0)])
            self._compiled_for = len(pixels)
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        with torch.inference_mode():
            x = self.transform.normalise(batch).to(self.dtype)
            with compile_faults():
                return self._run(x)[:count].float().softmax(-1).cpu()

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


def _checked(model: torch.nn.Module) -> Hiera:
    if not isinstance(model, Hiera):
        raise UsageError(
            "this is an autoencoder: it reconstructs, it does not classify",
            "use a classifier such as hiera_base_224",
        )
    if not model.config["num_classes"]:
        raise UsageError("this model has no classifier (num_classes=0)", "give it a head")
    if len(model.config["input_size"]) == 1:
        raise UsageError("this model takes signals", "prediction is for pictures and videos")
    return model


def _placed(model: Hiera, device: str, dtype: str, borrowed: bool) -> Hiera:
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
