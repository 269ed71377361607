"""Run a model on a device, with its preprocessing, in batches that fit in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import torch

from ..data.clip_reader import ClipView, unresized
from ..data.transforms import check_channels, transform_for
from ..device import (
    compile_for_inference,
    is_out_of_memory,
    select_device,
    select_dtype,
    single_thread,
    translate_compile_errors,
)
from ..errors import DeviceError, UsageError
from ..models.cpu import optimize_for_inference
from ..models.encoder import Encoder
from ..records import Kind
from .transfer import Download, Uploads

log = logging.getLogger("hiera")
Result = TypeVar("Result")
T = TypeVar("T")
M = TypeVar("M", bound=Encoder)

# Views of 224x224 in one forward pass. A GPU needs many; on a CPU, more only overflow the cache.
DEFAULT_BATCH_SIZES: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16},
    "video": {"cpu": 1, "cuda": 16, "mps": 2},
}
PIXELS: dict[Kind, int] = {"image": 224 * 224, "video": 16 * 224 * 224}  # of such a view
MAX_CPU_BATCH = 64  # of smaller views

# Less work than this, in parameters x pixels of a batch, is done by one CPU thread. The smallest
# model of the paper has seven times as much for one image; a batch of the nano models has a tenth.
LITTLE_WORK = 2e11


class BatchOptions(TypedDict, total=False):
    """Keyword arguments of `BatchRunner`."""

    borrowed: bool
    device: str | torch.device
    dtype: str | torch.dtype
    batch_size: int | None
    compile: bool


class Launched(Generic[Result]):
    """A batch that the device computes.

    Args:
        found: Its results on their way to the host.
        count: Number of inputs, without those that only fill the batch.
        split: See `BatchRunner._split`.
    """

    def __init__(
        self, found: Download, count: int, split: Callable[[Any], Sequence[Result]]
    ) -> None:
        self._found, self._count, self._split = found, count, split

    def results(self) -> Sequence[Result]:
        """Return one result for each input, when the device has computed them."""
        return self._split(self._found.wait())[: self._count]


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
        if not compile and not (borrowed and self.model is model):
            optimize_for_inference(self.model)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        card: dict[str, Any] = getattr(model, "card", {})
        self.name = str(card.get("model") or type(model).__name__)
        pixels = math.prod(model.config["input_size"])
        self.batch_size = batch_size or default_batch_size(self.kind, self.device.type, pixels)
        self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.uploads = Uploads(self.device) if self.device.type == "cuda" else None
        # A compiled program takes a fixed number of views; smaller batches are padded to it.
        self._compile, self._compiled_for = compile, 0

    def compute(self, x: torch.Tensor) -> object:
        """Return the results of a batch, on the device: a tensor, or a dictionary or dataclass of
        tensors.

        Args:
            x: [b, 3, *size], normalised, float32, on the device.
        """
        raise NotImplementedError

    def _split(self, found: Any) -> Sequence[Result]:
        """Return one result for each input of a batch, from what `compute` returned, on the CPU."""
        raise NotImplementedError

    def run(self, views: Sequence[np.ndarray]) -> list[Result]:
        """Return one result for each view.

        Args:
            views: The views, as the transform returns them.

        Raises:
            DeviceError: There is not enough memory for a single view.
        """
        if self.overlaps:
            return self.start(views).results()
        return [result for results in self._batches(views, self._run_batch) for result in results]

    def start(self, views: Sequence[np.ndarray]) -> Started[Result]:
        """Give views to the device, and return what their results can be had from.

        On CUDA, this does not wait for the device. Elsewhere, the results are complete.

        Raises:
            DeviceError: There is not enough memory for a single view.
        """
        if not self.overlaps:
            return Started(self.run(views))
        return Started(batches=list(self._batches(views, self._launch)))

    @property
    def overlaps(self) -> bool:
        """Whether the device computes while this process goes on."""
        return self.uploads is not None

    # Images in page-locked memory ---------------------------------------------------------------

    def stage(self, pixels: np.ndarray, count: int) -> np.ndarray:
        """Return a decoded image in memory that the device reads by itself. Called by workers.

        Args:
            pixels: uint8 [height, width, 3].
            count: Number of images that can be on their way at a time.
        """
        if self.uploads is None:
            return pixels
        slots = self.uploads.slots(count, pixels)
        return pixels if slots is None else slots.put(pixels)

    def begin_stream(self) -> None:
        """Prepare for the images of a new stream."""
        if self.uploads is not None:
            self.uploads.begin()

    def pixels_of_clips(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Return memory for the frames of clips: on CUDA, memory that the device reads itself."""
        if self.uploads is None:
            return np.empty(shape, dtype)
        return self.uploads.empty(shape, dtype)

    def end_stream(self) -> None:
        """Forget the images that `stage` returned, since nobody will release them."""
        if self.uploads is not None:
            self.uploads.forget()

    def release(self, pixels: np.ndarray) -> None:
        """Let the memory of an image that `stage` returned be used again."""
        if self.uploads is not None:
            self.uploads.release(pixels)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, compiled with torch.compile if `compile` is set."""
        return compile_for_inference(function, self.device) if self._compile else function

    def _batches(self, views: Sequence[np.ndarray], function: Callable[[Any], T]) -> Iterator[T]:
        """Yield what a function returns for each batch, in batches that fit in memory."""
        waiting, done = unresized(views), 0
        while done < len(waiting):
            last = min(done + self.batch_size, len(waiting))
            found = self._try_batch([waiting[i] for i in range(done, last)], function)
            if found is None:
                self._halve_batch(last - done)
            else:
                done = last
                yield found

    def _try_batch(
        self, views: Sequence[np.ndarray | ClipView], function: Callable[[Any], T]
    ) -> T | None:
        """Return what a function returns for a batch, or None if memory ran out.

        The error is not kept: its traceback refers to every tensor of the failed batch, and these
        have to be freed before the next try.

        Raises:
            DeviceError: Memory ran out for a single view.
        """
        try:
            is_copied_one_by_one = self.overlaps or isinstance(views[0], ClipView)
            return function(views if is_copied_one_by_one else np.stack(views))  # type: ignore[arg-type]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._padded(len(views)) > 1:
                return None
            raise DeviceError(
                f"{self.device} has no memory left for one {self.kind}",
                "use a smaller model or --dtype bf16",
            ) from error

    def _run_batch(self, pixels: np.ndarray | Sequence[Any]) -> Sequence[Result]:
        return self._launch(pixels).results()

    def _launch(self, pixels: np.ndarray | Sequence[Any]) -> Launched[Result]:
        """Start a batch. `pixels` is an array of images, or a list of images or views of clips."""
        count = len(pixels)
        missing = self._padded(count) - count
        if missing and isinstance(pixels, np.ndarray):
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, 0)])
        elif missing:
            pixels = [*pixels, *[pixels[0]] * missing]
        if self._compile:
            self._compiled_for = len(pixels)
        with torch.inference_mode(), translate_compile_errors(), self._normalised(pixels) as x:
            with single_thread() if self._is_little_work(x) else contextlib.nullcontext():
                found = self.compute(x)
            return Launched(self._download(found), count, self._split)

    def _download(self, found: Any) -> Download:
        return Download(found) if self.uploads is None else self.uploads.download(found)

    @contextlib.contextmanager
    def _normalised(self, pixels: Any) -> Iterator[torch.Tensor]:
        """Copy a batch to the device, and normalise it there."""
        is_clips = isinstance(pixels[0], ClipView)
        if self.uploads is None:
            if is_clips:
                batch = torch.stack([torch.from_numpy(view.pixels()) for view in pixels])
            else:
                batch = torch.from_numpy(pixels)
            # Only a copy from pinned memory may go on in the background: on devices other than
            # CUDA, `pixels` could be freed before it is done.
            yield self.transform.normalise(batch.to(self.device))
        elif is_clips:
            yield self.transform.normalise(self.uploads.clips(pixels))
        else:
            with self.uploads.images(pixels) as batch:
                x = self.transform.normalise(batch)
            yield x

    def _is_little_work(self, x: torch.Tensor) -> bool:
        """Return whether one thread computes this batch. Threads wait for one another after each
        layer, which takes longer than a small layer if other threads need the cores, too."""
        return self.device.type == "cpu" and self._parameters * x[:, 0].numel() < LITTLE_WORK

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


def default_batch_size(kind: Kind, device: str, pixels: int) -> int:
    """Return the number of views that suits a device.

    Args:
        kind: What a view is.
        device: The type of the device.
        pixels: Of a view, in all its frames. Larger views come in smaller batches; on a CPU,
            smaller views come in larger ones, because each call of a layer costs time.
    """
    sizes = DEFAULT_BATCH_SIZES[kind]
    size = sizes.get(device, sizes["cpu"])
    most = MAX_CPU_BATCH if device == "cpu" else size
    return max(1, min(most, size * PIXELS[kind] // pixels))


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
