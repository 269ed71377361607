"""Classify a stream of inputs: decode in workers, compute in batches, one record each, in order."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import factory, inputs
from .device import is_out_of_memory, select_device, select_dtype
from .errors import DeviceError, HieraError, InputError, UsageError
from .inputs import Source
from .model import Hiera
from .preprocess.image import MAX_PIXELS, ImageTransform, open_image, trusted_sizes
from .records import Guess, Record

log = logging.getLogger("hiera")

# Pictures in one pass. On a CPU larger batches only leave the cache; a GPU wants many.
AUTO_BATCH = {"cpu": 8, "cuda": 64, "mps": 16}


@dataclass
class _Decoded:
    """A picture on its way to the model: pixels, or the reason why there are none."""

    record: Record
    pixels: np.ndarray | None


class Predictor:
    """A classifier with its preprocessing and class names, on a device.

    Args:
        model: a name, hub repository, folder or file (see `create_model`), or a built `Hiera`.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`, see `select_dtype`.
        batch_size: pictures in one pass, or None for a size that suits the device. Out of memory
            halves it.
        workers: decoding threads, or None for one a core.
        topk: classes in a record.
        class_names: in place of the model's own.
        max_pixels: larger pictures are refused before decoding.
        compile: run the model through torch.compile.

    Raises:
        UsageError: no image classifier, or an unknown name.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    def __init__(
        self,
        model: str | Hiera = "hiera_base_224",
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        compile: bool = False,
    ) -> None:
        self.device = select_device(device)
        self.dtype = select_dtype(dtype, self.device)
        built = factory.create_model(model, pretrained=True) if isinstance(model, str) else model
        self.model = _image_classifier(built).to(self.device, self.dtype).eval()
        self.model_name = str(getattr(built, "card", {}).get("model") or type(built).__name__)
        self.transform = ImageTransform.from_card(
            getattr(built, "card", {}).get("preprocessing"), self.model.config["input_size"]
        )
        self.class_names = class_names or factory.class_names_of(self.model)
        self.batch_size = batch_size or AUTO_BATCH[self.device.type]
        self.workers = workers or os.cpu_count() or 1
        self.topk, self.max_pixels = topk, max_pixels
        # Logits: the softmax is taken in fp32, where 1000 probabilities do not fall together.
        logits = self.model.forward_logits
        self._run = torch.compile(logits) if compile else logits

    def __call__(self, sources: Iterable[Source]) -> Iterator[Record]:
        """One record for each source, in order. Memory does not grow with their number.

        Raises:
            DeviceError: out of memory with a single picture.
        """
        pending: list[_Decoded] = []
        with trusted_sizes():
            for decoded in self._decode_ahead(sources):
                pending.append(decoded)
                if len(pending) >= self.batch_size:
                    yield from self._classify(pending)
                    pending = []
            yield from self._classify(pending)

    def probabilities(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [b, height, width, 3], resized and cropped -> float32 [b, classes] on the CPU."""
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        with torch.inference_mode():
            x = self.transform.normalise(batch).to(self.dtype)
            try:
                return self._run(x).float().softmax(-1).cpu()
            except RuntimeError as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                raise DeviceError(
                    f"torch.compile failed ({type(error).__name__})",
                    "it needs a C++ compiler (or Triton on a GPU); or leave out --compile",
                ) from error

    def _decode_ahead(self, sources: Iterable[Source]) -> Iterator[_Decoded]:
        """Decode in threads (Pillow lets go of the interpreter lock), two batches ahead."""
        queue: collections.deque[Future[_Decoded]] = collections.deque()
        ahead = 2 * self.batch_size + self.workers
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            for index, source in enumerate(sources):
                queue.append(pool.submit(self._decode, source, index))
                if len(queue) > ahead:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, source: Source, index: int) -> _Decoded:
        record = Record(source.name, index, self.model_name)
        if source.path is not None and source.path.suffix.lower() in inputs.VIDEO_ENDINGS:
            record.kind = "video"
            return _Decoded(
                record.fail(InputError("a video, and this model takes pictures", "")), None
            )
        try:
            image, record.notes = open_image(source.content(), self.max_pixels)
            return _Decoded(record, self.transform.crop(image))
        except HieraError as error:
            return _Decoded(record.fail(error), None)
        except Exception as error:  # resizing can fail too (memory); the batch goes on without it
            return _Decoded(record.fail(InputError(str(error) or type(error).__name__)), None)

    def _classify(self, batch: list[_Decoded]) -> Iterator[Record]:
        good = [d.pixels for d in batch if d.pixels is not None]
        rows = iter(self._in_parts(np.stack(good)) if good else torch.empty(0))
        for decoded in batch:
            if decoded.pixels is not None:
                self._fill(decoded.record, next(rows))
            yield decoded.record

    def _in_parts(self, pixels: np.ndarray) -> torch.Tensor:
        """Run a batch, in halves for as long as memory runs out."""
        try:
            parts = np.split(pixels, range(self.batch_size, len(pixels), self.batch_size))
            return torch.cat([self.probabilities(part) for part in parts])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if min(self.batch_size, len(pixels)) == 1:
                raise DeviceError(
                    f"{self.device} has no memory left for one picture",
                    "use a smaller model or --dtype bf16",
                ) from error
        self.batch_size = max(1, min(self.batch_size, len(pixels)) // 2)
        log.warning("out of memory: going on with batches of %d", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._in_parts(pixels)

    def _fill(self, record: Record, probs: torch.Tensor) -> None:
        if not bool(probs.isfinite().all()):
            record.fail(InputError("the model's output is not finite", "use --dtype bf16 or fp32"))
            return
        values, ids = probs.topk(min(self.topk, len(probs)))
        names = self.class_names
        record.topk = [
            Guess(i, names[i] if names is not None and i < len(names) else None, value)
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]


def predict(
    source: str | Path | Iterable[str | Path], model: str | Hiera = "hiera_base_224", **options: Any
) -> Any:
    """Classify in one line: `hiera_core.predict("x.jpg")["topk"][0]["label"]`.

    Args:
        source: a file, folder, glob or URL, or several of them.
        model, options: see `Predictor`.

    Returns:
        A record (a dict: input, status, topk, ...) for a single file or URL, else a list of them.
        Inputs that fail have status "error" and say why.
    """
    single = isinstance(source, str | Path)
    names = [str(source)] if single else [str(s) for s in source]  # type: ignore[union-attr]
    records = [r.to_json() for r in Predictor(model, **options)(inputs.expand(names))]
    return records[0] if single and len(records) == 1 else records


def _image_classifier(model: Any) -> Hiera:
    if not isinstance(model, Hiera):
        raise UsageError(
            "this is an autoencoder: it reconstructs, it does not classify",
            "use a classifier such as hiera_base_224",
        )
    if len(model.config["input_size"]) != 2:
        raise UsageError(
            "this model takes video clips, and predict reads pictures",
            "use an image model such as hiera_base_224",
        )
    return model
