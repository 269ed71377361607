"""A tracker in a thread of its own, so that a server that is slow or gone does not stop the run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Literal, Protocol

from ...errors import first_line

# How a run ends. An interrupted one may be continued.
Outcome = Literal["finished", "failed", "interrupted"]
BEGIN_S = 60.0  # for a tracker to begin, e.g. for its server to answer
CLOSE_S = 30.0  # for a tracker to send what is left, at the end of the run
MOST_WAITING = 10_000  # measurements that wait to be sent
log = logging.getLogger("hiera")


class Tracker(Protocol):
    """Receives the measurements of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive measurements of a step, by names such as `step/loss` and `val/top1`."""

    def close(self, outcome: Outcome = "finished") -> None:
        """Send what has not been sent, and how the run has ended."""


class Sender:
    """A tracker whose calls are made by a thread, one after another, and whose errors do not end
    the run. After the first one, it gets no more numbers; all of them are in log.jsonl.

    Args:
        create: Makes the tracker.
        name: Its name, for messages.

    Attributes:
        id: What the tracker calls the run; None if it does not choose that.

    Raises:
        TimeoutError: The tracker does not begin within `BEGIN_S`.
        Exception: What `create` raises.
    """

    def __init__(self, create: Callable[[], Tracker], name: str) -> None:
        self._name, self._has_failed = name, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None]
        self._calls = queue.Queue(MOST_WAITING)
        begun: Future[Tracker] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(create, begun), name=name, daemon=True
        )
        self._thread.start()
        try:
            tracker = begun.result(BEGIN_S)
        except TimeoutError as error:
            if begun.done():  # an error of the tracker itself
                raise
            raise TimeoutError(f"no answer within {BEGIN_S:.0f} s") from error
        self.id: str | None = getattr(tracker, "id", None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`. This does not wait."""
        self._enqueue(lambda tracker: tracker.log(step, values))

    def close(self, outcome: Outcome = "finished") -> None:
        """See `Tracker.close`. This waits for `CLOSE_S` at most."""
        if self._has_failed:
            return
        self._enqueue(lambda tracker: tracker.close(outcome))
        self._enqueue(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._fail(f"no answer within {CLOSE_S:.0f} s")

    def _enqueue(self, call: Callable[[Tracker], None] | None) -> None:
        if self._has_failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail("it is too slow")

    def _run(self, create: Callable[[], Tracker], begun: Future[Tracker]) -> None:
        try:
            tracker = create()
        except BaseException as error:
            begun.set_exception(error)
            return
        begun.set_result(tracker)
        while (call := self._calls.get()) is not None and not self._has_failed:
            try:
                call(tracker)
            except Exception as error:
                self._fail(first_line(error))

    def _fail(self, reason: str) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        log.warning(
            "%s gets no more measurements (%s); log.jsonl has all of them", self._name, reason
        )
