"""Prefetch in threads: results in order, a bounded number of them, and a sign when one is late."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch_map(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    pool: ThreadPoolExecutor,
    limit: int,
    cost: Callable[[T], int] = lambda item: 1,
    patience: float = 0.5,
) -> Iterator[R | None]:
    """Yield `function(item)` for every item, in order, computed in the threads of the pool.

    Items are drawn in a thread of their own, so a slow source does not delay finished results.

    Args:
        function, items: What to compute.
        pool: The threads.
        limit: Maximum total cost of the items that are being computed or wait to be yielded.
        cost: Cost of an item. One that costs more than `limit` still gets its turn.
        patience: Seconds. If a result takes longer, None is yielded, so that the caller can use
            what it holds, and the wait goes on.

    Raises:
        Whatever drawing an item or `function` raises, in the position of that item.
    """
    pending: queue.SimpleQueue[tuple[Future[R], int] | BaseException | None]
    pending = queue.SimpleQueue()
    permits, stopped = threading.Semaphore(limit), threading.Event()

    def feed() -> None:
        try:
            for item in items:
                price = min(cost(item), limit)
                for _ in range(price):
                    permits.acquire()
                if stopped.is_set():
                    return
                pending.put((pool.submit(function, item), price))
            pending.put(None)
        except BaseException as error:
            pending.put(error)

    threading.Thread(target=feed, name="feed", daemon=True).start()
    try:
        while True:
            try:
                entry = pending.get(timeout=patience)
            except queue.Empty:
                yield None
                continue
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            future, price = entry
            while True:
                try:
                    result = future.result(timeout=patience)
                    break
                except FutureTimeout:
                    if future.done():  # the function itself raised it
                        raise
                    yield None
            permits.release(price)
            yield result
    finally:
        stopped.set()
        permits.release(limit)


def prefetch_next(items: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Yield the items, while the pool makes the next one."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]
