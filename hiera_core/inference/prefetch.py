"""Prefetch results in threads: in order, bounded in number, with a signal when one is late."""

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

    Items are taken from `items` in a separate thread, so a slow source does not delay finished
    results.

    Args:
        function, items: What to compute.
        pool: The threads.
        limit: Maximum total cost of the items that are being computed or wait to be yielded.
        cost: Cost of an item. A cost above `limit` counts as `limit`.
        patience: Seconds to wait for a result before None is yielded, so that the caller can
            process what it has. The wait then continues.

    Raises:
        Whatever `items` or `function` raises, at the position of that item.
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
    """Yield the items. The pool computes the next one in the meantime."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]
