"""Pixels on their way to a CUDA device, and results on their way back, beside the model's work.

Worker threads decode images into `PixelSlots`, page-locked memory that the device reads by itself.
`Uploads` copies them on a stream of its own, so that the next batch arrives while the model
computes. Nothing here waits for the device, except for a slot that is to be filled again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from ..data.clip_reader import ClipView, ClipViews

MAX_SLOT_BYTES = 256 << 20  # page-locked memory cannot be swapped out
log = logging.getLogger("hiera")
Pixels: TypeAlias = np.ndarray | torch.Tensor  # an array, or a tensor on the model's device
BUFFERS = 2  # on the device: one is read by the model while the other is filled


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class Cuda:
    """The part of `torch.cuda` that is used here. Tests have a stand-in that notes the order."""

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)

    def new_event(self) -> Event:
        event: Event = torch.cuda.Event()
        return event

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Give the operations within the block to a stream."""
        return torch.cuda.stream(stream)

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return page-locked memory. PyTorch keeps it until all copies from and to it are done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def finish(self, device: torch.device) -> None:
        """Wait until what the current stream of this thread has to do is done."""
        torch.cuda.current_stream(device).synchronize()

    def keep_for(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keep the memory of a tensor until what a stream has to do by now is done."""
        tensor.record_stream(stream)


class PixelSlots:
    """Page-locked memory for decoded images, allocated once.

    A slot that was given back is filled again only after the event of its copy has passed.

    Args:
        memory: uint8 [count, height, width, channels], page-locked.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._pixels: np.ndarray = memory.numpy()
        self._size = self._pixels[0].nbytes
        self._lock = threading.Lock()
        self._free: collections.deque[tuple[int, Event | None]]
        self._free = collections.deque((number, None) for number in range(len(memory)))

    def put(self, pixels: np.ndarray) -> np.ndarray:
        """Return an image in a free slot, or as it is if there is none. Called by workers."""
        with self._lock:
            if not self._free or pixels.shape != self._pixels.shape[1:]:
                return pixels
            number, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()
        slot: np.ndarray = self._pixels[number]
        slot[:] = pixels
        return slot

    def give_back(self, number: int, copied: Event | None = None) -> None:
        """Free a slot.

        Args:
            number: See `number_of`.
            copied: Passes when the device has read the image. None if it was not copied.
        """
        with self._lock:
            self._free.append((number, copied))

    def number_of(self, pixels: np.ndarray) -> int | None:
        """Return the number of the slot that holds an image, or None if no slot does."""
        offset = pixels.ctypes.data - self._pixels.ctypes.data
        return offset // self._size if 0 <= offset < self._pixels.nbytes else None


class Uploads:
    """Copies pixels to a device on a stream of its own.

    If there is no page-locked memory left, ordinary memory takes its place, which is slower.

    Args:
        device: A CUDA device.
        cuda: CUDA, or a stand-in.
    """

    def __init__(self, device: torch.device, cuda: Cuda | None = None) -> None:
        self._cuda = cuda or Cuda()
        self._device, self._lock = device, threading.Lock()
        self._slots: PixelSlots | None = None
        self._is_ended = False  # whether a stream of inputs has ended, and none has begun since
        self._copying = threading.RLock()  # held while a batch is copied and launched
        self._is_short_of_memory = False
        self._copied: dict[int, Event] = {}  # of the images in slots, by number
        self._stream = self._cuda.new_stream(device)
        self._buffers = [_Buffer(self._cuda.new_event()) for _ in range(BUFFERS)]
        self._next = 0
        # Frames that are on the device already: several batches can show views of one video.
        self._resident: tuple[weakref.ref[ClipViews], torch.Tensor, torch.Tensor] | None = None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return page-locked memory for the frames of a video. PyTorch keeps it for the next one
        when the device has read it."""
        pinned = self._page_locked(shape, _dtype_of(np.empty(0, dtype)))
        return np.empty(shape, dtype) if pinned is None else pinned.numpy()

    def download(self, found: Any) -> Download:
        """Start to copy results to the host, behind the work that computes them."""
        return Download(found, self._device, self._cuda)

    def slots(self, count: int, pixels: np.ndarray) -> PixelSlots | None:
        """Return the slots for images such as `pixels`, or None if there is no memory for them, or
        the stream has ended. They are made for the first image.

        Args:
            count: Number of slots.
            pixels: uint8 [height, width, 3].
        """
        with self._lock:
            if self._slots is None and not self._is_ended:
                count = max(1, min(count, MAX_SLOT_BYTES // pixels.nbytes))
                memory = self._page_locked((count, *pixels.shape), torch.uint8)
                self._slots = None if memory is None else PixelSlots(memory)
            return self._slots

    def finish(self) -> None:
        """Wait for the work of this thread on the device."""
        self._cuda.finish(self._device)

    def keep(self, pixels: torch.Tensor) -> None:
        """Keep the memory of pixels that are on the device until what is launched now has read
        them."""
        if not pixels.is_cpu:
            self._cuda.keep_for(pixels, self._cuda.current_stream(self._device))

    def begin(self) -> None:
        """Make slots again, for a new stream of inputs."""
        self._is_ended = False

    def release(self, pixels: np.ndarray) -> None:
        """Let the slot of an image be filled again, once the image is copied."""
        slots = self._slots
        number = None if slots is None else slots.number_of(pixels)
        if slots is not None and number is not None:
            slots.give_back(number, self._copied.pop(number, None))

    def forget(self) -> None:
        """Forget the slots, which nobody gives back if a stream ends early, and the last frames."""
        with self._lock:
            self._slots, self._copied, self._resident = None, {}, None
            self._is_ended = True  # workers may still decode

    def _page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return page-locked memory, or None if there is none left."""
        if self._is_short_of_memory:
            return None
        try:
            return self._cuda.pinned(shape, dtype)
        except (RuntimeError, MemoryError) as error:
            log.debug("no page-locked memory: %s", error)
            self._is_short_of_memory = True
            return None

    @contextlib.contextmanager
    def images(self, views: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Copy images. The buffer may be filled again after what is launched within the block.

        Args:
            views: uint8 [height, width, 3] each.

        Yields:
            uint8 [b, height, width, 3] on the device, which the current stream may read.
        """
        with self._copying:
            buffer = self._buffers[self._next]
            self._next = (self._next + 1) % BUFFERS
            if not buffer.fits(views):
                shape, dtype = (len(views), *views[0].shape), _dtype_of(views[0])
                buffer.pixels = torch.empty(shape, dtype=dtype, device=self._device)
                # The allocator may hand out memory that earlier work of this stream still reads.
                buffer.read.record(self._cuda.current_stream(self._device))
                buffer.is_used = True
            assert buffer.pixels is not None
            if buffer.is_used:
                self._stream.wait_event(buffer.read)
            copied = self._cuda.new_event()
            with self._cuda.on(self._stream):
                for row, view in enumerate(views):
                    buffer.pixels[row].copy_(self._pinned(view, copied), non_blocking=True)
                copied.record(self._stream)
            current = self._cuda.current_stream(self._device)
            current.wait_event(copied)
            try:
                yield buffer.pixels[: len(views)]
            finally:
                buffer.read.record(current)
                buffer.is_used = True

    def clips(self, views: Sequence[ClipView]) -> torch.Tensor:
        """Copy the frames of clips once, and resize and cut the views on the device.

        -> float32 [b, length, height, width, 3] in 0..255
        """
        cut: list[torch.Tensor] = []
        last: tuple[ClipViews, int] | None = None
        with self._copying:  # a batch that overflowed is computed again by another thread
            for view in views:
                parent = view.parent
                if last is None or last[0] is not parent or last[1] != view.clip:
                    frames, clips = self._frames_of(parent)
                    resized = parent.resize_clip(frames, clips[view.clip])
                    last = parent, view.clip
                cut.append(parent.crop(resized, view.index))
            return torch.stack(cut)

    def _frames_of(self, parent: ClipViews) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frames and the clips of a video on the device, where they may be already."""
        if self._resident is None or self._resident[0]() is not parent:
            self._resident = None  # its memory is free before the next frames are copied
            current = self._cuda.current_stream(self._device)
            with self._cuda.on(self._stream):  # the memory belongs to this stream
                clips = torch.empty(parent.clips.shape, dtype=torch.int64, device=self._device)
                clips.copy_(self._pinned(parent.clips), non_blocking=True)
                if isinstance(parent.frames, torch.Tensor):  # they are there
                    frames = parent.frames
                else:  # they were read into page-locked memory: see `empty`
                    shape, dtype = parent.frames.shape, _dtype_of(parent.frames)
                    frames = torch.empty(shape, dtype=dtype, device=self._device)
                    frames.copy_(torch.from_numpy(parent.frames), non_blocking=True)
            current.wait_stream(self._stream)
            for tensor in (frames, clips):
                self._cuda.keep_for(tensor, current)
            self._resident = weakref.ref(parent), frames, clips
        return self._resident[1:]

    def _pinned(self, pixels: np.ndarray, copied: Event | None = None) -> torch.Tensor:
        """Return pixels in page-locked memory: as they are in a slot, or else a copy.

        PyTorch keeps such a copy until the device has read it. A slot waits for `copied`.
        """
        tensor = torch.from_numpy(pixels)
        number = None if self._slots is None else self._slots.number_of(pixels)
        if number is not None and copied is not None:
            self._copied[number] = copied
            return tensor
        pinned = self._page_locked(tuple(tensor.shape), tensor.dtype)
        return tensor if pinned is None else pinned.copy_(tensor)


@dataclasses.dataclass
class _Buffer:
    """Pixels of a batch on the device, and when the model has read them."""

    read: Event
    pixels: torch.Tensor | None = None
    is_used: bool = False

    def fits(self, views: Sequence[np.ndarray]) -> bool:
        """Return whether these views fit into the memory that is there."""
        return (
            self.pixels is not None
            and len(views) <= len(self.pixels)
            and self.pixels.shape[1:] == views[0].shape
            and self.pixels.dtype == _dtype_of(views[0])
        )


class Download:
    """Results on their way from a device to the host. Results on a CPU stay where they are.

    Args:
        found: A tensor, or a dictionary or dataclass of tensors.
        device: The CUDA device that computes them; None for another device.
        cuda: CUDA, or a stand-in.
    """

    def __init__(
        self, found: Any, device: torch.device | None = None, cuda: Cuda | None = None
    ) -> None:
        self._done: Event | None = None
        if device is not None and cuda is not None:
            self._found = map_tensors(functools.partial(_start_copy, cuda), found)
            self._done = cuda.new_event()
            self._done.record(cuda.current_stream(device))
        else:
            self._found = map_tensors(lambda tensor: tensor.cpu(), found)

    def wait(self) -> Any:
        """Return the results on the host, when they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._found


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], found: Any) -> Any:
    """Apply a function to a tensor, or to all tensors of a dictionary or dataclass."""
    if isinstance(found, torch.Tensor):
        return function(found)
    if isinstance(found, dict):
        return {name: map_tensors(function, value) for name, value in found.items()}
    values = (getattr(found, field.name) for field in dataclasses.fields(found))
    return type(found)(*(map_tensors(function, value) for value in values))


def _start_copy(cuda: Cuda, tensor: torch.Tensor) -> torch.Tensor:
    return cuda.pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)


def _dtype_of(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype
