"""Write a checkpoint in a thread, from a copy of the tensors, while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from .checkpoint_file import whole_tensor


class Snapshot:
    """A copy of tensors in the memory of the host, whose buffers are used again for the next one.

    A sharded tensor is gathered from all processes, which take the snapshot together. Only the
    main process keeps a copy.

    Args:
        keeps: Whether this process keeps a copy.
    """

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies of all tensors. They change at the next call."""
        for name, tensor in tensors.items():
            whole = whole_tensor(tensor)
            if not self.keeps:
                continue
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != whole.shape or buffer.dtype is not whole.dtype:
                buffer = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
                self.buffers[name] = buffer
            buffer.copy_(whole, non_blocking=whole.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self.buffers[name] for name in tensors} if self.keeps else {}


class BackgroundWrite:
    """One write at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write. The one before it has been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised in the main thread, by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress, if there is one, and raise its error."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
