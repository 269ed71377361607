"""Run a model on a device, with its preprocessing, in batches that fit in memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import torch

from ..compiling.compiled import compile_for_inference, translate_compile_errors
from ..data.clip_reader import ClipView, unresized
from ..data.transforms import check_channels, transform_for
from ..data.video_files.frame_store import ON_HOST, FrameStore
from ..device import (
    dtype_name,
    empty_cache,
    exact_fp32,
    is_out_of_memory,
    select_device,
    select_dtype,
    single_thread,
    wide_half,
)
from ..errors import DeviceError, UsageError
from ..models.cpu import optimize_for_inference
from ..models.encoder import Encoder
from ..records import Kind
from .launched import Launched, Started, StartedElsewhere, all_finite
from .transfer import Download, Pixels, Uploads

log = logging.getLogger("hiera")
Result = TypeVar("Result")
T = TypeVar("T")
M = TypeVar("M", bound=Encoder)

# Views of 224x224 in one forward pass. A GPU needs many; on a CPU, more only overflow the cache.
DEFAULT_BATCH_SIZES: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 8, "cuda": 64, "mps": 16, "xpu": 64},
    "video": {"cpu": 1, "cuda": 16, "mps": 2, "xpu": 16},
}
PIXELS: dict[Kind, int] = {"image": 224 * 224, "video": 16 * 224 * 224}  # of such a view
# Of smaller views. Clips wait for their batch with frames that may be larger than the view.
MAX_CPU_BATCH: dict[Kind, int] = {"image": 64, "video": 8}

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
        self.replicas: list[BatchRunner[M, Result]] = []  # on other devices
        self._threads: list[ThreadPoolExecutor] = []
        self._turn = -1
        self._wider: BatchRunner[M, Result] | None = None  # computes what fp16 cannot hold
        self._fp16_overflows = self.dtype is torch.float16
        self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.uploads = Uploads(self.device) if self.device.type == "cuda" else None
        # A compiled program takes a fixed number of views; smaller batches are padded to it.
        self._compile, self._compiled_for, self._expects_more = compile, 0, False

    def bind(self) -> None:
        """Set the functions of the model that `compute` calls; see `compiled`. A subclass calls
        this when it is made. It is called again for a copy with another model."""

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
        return self.start(views).results()

    def start(self, views: Sequence[Pixels], *, more: bool = False) -> Started[Result]:
        """Give views to the device, and return what their results can be had from.

        On CUDA, or with replicas, this does not wait for the device. Otherwise, the results are
        complete.

        Args:
            views: The views, as the transform returns them.
            more: More views may follow, in whole batches. A model that is compiled now is compiled
                for these.

        Raises:
            DeviceError: There is not enough memory for a single view.
        """
        if not self.replicas:
            return self._start(views, more)
        runners = self._runners()
        self._turn = (self._turn + 1) % len(runners)
        # Each has a thread of its own, and always the same one, which CUDA graphs need.
        return StartedElsewhere(
            self._threads[self._turn].submit(runners[self._turn]._start, views, more)
        )

    def _start(self, views: Sequence[Pixels], more: bool) -> Started[Result]:
        """Give views to the device of this runner."""
        self._expects_more = more
        try:
            if self.uploads is None:
                done = self._batches(views, self._run_batch)
                return Started([result for results in done for result in results])
            return Started(batches=list(self._batches(views, self._launch)))
        finally:
            self._expects_more = False

    @property
    def overlaps(self) -> bool:
        """Whether a device computes while this process goes on."""
        return self.uploads is not None or bool(self.replicas)

    @property
    def depth(self) -> int:
        """Number of batches that can be started before the first of them is read."""
        return 1 + len(self.replicas)

    def _runners(self) -> list[BatchRunner[M, Result]]:
        """Return this runner and its replicas."""
        return [self, *self.replicas]

    def add_replica(self, runner: BatchRunner[M, Result]) -> None:
        """Let another runner of the same model compute on its device, too. Batches take turns."""
        self.replicas.append(runner)
        while len(self._threads) < self.depth:
            name = f"replica {len(self._threads)}"
            self._threads.append(ThreadPoolExecutor(1, thread_name_prefix=name))

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

    def shares_device(self, pixels: torch.Tensor) -> bool:
        """Return whether pixels are where this model computes, so that nothing has to be copied."""
        return not self.replicas and pixels.device == self.device

    def settle(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels on the device when the work of this thread on them is done. Called by
        workers, because another thread, and another stream, reads them next."""
        if self.uploads is not None:
            self.uploads.finish()
        elif self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return pixels

    def begin_stream(self) -> None:
        """Prepare for the images of a new stream."""
        for runner in self._runners():
            if runner.uploads is not None:
                runner.uploads.begin()

    @property
    def frame_store(self) -> FrameStore:
        """Where the frames of clips are kept: on CUDA, in memory that the device reads itself, and
        as the planes that it turns into RGB."""
        if self.uploads is None:
            return ON_HOST
        return FrameStore(self.uploads.empty, takes_planes=True)

    def end_stream(self) -> None:
        """Forget the images that `stage` returned, since nobody will release them."""
        for runner in self._runners():
            if runner.uploads is not None:
                runner.uploads.forget()

    def release(self, pixels: Pixels) -> None:
        """Let the memory of an image that `stage` returned be used again."""
        if self.uploads is not None and isinstance(pixels, np.ndarray):
            self.uploads.release(pixels)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, compiled with torch.compile if `compile` is set."""
        if not self._compile:
            return function
        return compile_for_inference(function, self.device, self.model)

    def _batches(self, views: Sequence[Pixels], function: Callable[[Any], T]) -> Iterator[T]:
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
        self, views: Sequence[Pixels | ClipView], function: Callable[[Any], T]
    ) -> T | None:
        """Return what a function returns for a batch, or None if memory ran out.

        The error is not kept: its traceback refers to every tensor of the failed batch, and these
        have to be freed before the next try.

        Raises:
            DeviceError: Memory ran out for a single view.
        """
        try:
            is_array = self.uploads is None and all(isinstance(v, np.ndarray) for v in views)
            return function(np.stack(views) if is_array else views)  # type: ignore[arg-type]
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
            with self._settings(x):
                found = self.compute(x)
            again = None
            if self._fp16_overflows:
                again = functools.partial(self._compute_again, pixels[:count])
            return Launched(self._download(found), count, self._split, again)

    def _settings(self, x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Return the settings of PyTorch with which a batch is computed."""
        if self._is_little_work(x):
            return single_thread()
        is_exact = self.device.type == "cuda" and self.dtype is torch.float32
        return exact_fp32() if is_exact else contextlib.nullcontext()

    def _compute_again(self, pixels: Any) -> Sequence[Result] | None:
        """Return results in a dtype with a larger range than fp16, or None if they are not finite
        in that, either: then the model is at fault, and nothing is computed again.

        Raises:
            DeviceError: There is not enough memory for a second copy of the model.
        """
        wider = self._wider
        if wider is None:
            dtype = wide_half(self.device)
            wider = copy.copy(self)
            wider.model = _place(self.model, self.device, dtype, borrowed=True)
            wider.dtype, wider._fp16_overflows = dtype, False
            wider._compile, wider._compiled_for = False, 0
            wider.replicas = []
            wider.bind()
            self._wider = wider
            log.warning(
                "fp16 overflows in this model: such batches are computed again in %s; "
                "--dtype %s computes all of them in it",
                dtype_name(dtype),
                dtype_name(dtype),
            )
        launched = list(wider._batches(pixels, wider._launch))
        if not all(all_finite(batch.found) for batch in launched):
            self._fp16_overflows, self._wider = False, None
            return None
        return [result for batch in launched for result in batch.results()]

    def _download(self, found: Any) -> Download:
        return Download(found) if self.uploads is None else self.uploads.download(found)

    @contextlib.contextmanager
    def _normalised(self, pixels: Any) -> Iterator[torch.Tensor]:
        """Copy a batch to the device, and normalise it there."""
        is_clips = isinstance(pixels[0], ClipView)
        if any(isinstance(view, torch.Tensor) for view in pixels):
            yield self.transform.normalise(self._gathered(pixels))
        elif self.uploads is None:
            if is_clips:
                batch = torch.stack([view.tensor() for view in pixels])
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

    def _gathered(self, views: Sequence[Pixels]) -> torch.Tensor:
        """Return images as a batch on the device, where some of them are already."""
        rows = [torch.as_tensor(view) for view in views]
        if self.uploads is not None:
            for row in rows:
                self.uploads.keep(row)
        return torch.stack([row.to(self.device) for row in rows])

    def _is_little_work(self, x: torch.Tensor) -> bool:
        """Return whether one thread computes this batch. Threads wait for one another after each
        layer, which takes longer than a small layer if other threads need the cores, too."""
        return self.device.type == "cpu" and self._parameters * x[:, 0].numel() < LITTLE_WORK

    def _padded(self, count: int) -> int:
        """Return the number of views, with padding, that the model gets for `count` views.

        A compiled model has one program, for its first batch, unless a larger one follows: then it
        gets a second one, for whole batches.
        """
        if not self._compile or count <= self._compiled_for:
            return max(count, self._compiled_for)
        return self.batch_size if self._compiled_for or self._expects_more else count

    def _halve_batch(self, count: int) -> None:
        """Halve the batch size after memory ran out for `count` views."""
        self.batch_size = self._padded(count) // 2
        self._compiled_for = 0  # the next batch is compiled for its own, smaller size
        log.warning("out of memory: continuing with batches of %d", self.batch_size)
        empty_cache(self.device)


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
    most = MAX_CPU_BATCH[kind] if device == "cpu" else size
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
