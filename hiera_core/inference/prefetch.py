"""Prefetch results in threads: in order, bounded in number, with a signal when one is late."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    budget = _Budget(limit)

    def feed() -> None:
        try:
            for item in items:
                price = min(cost(item), limit)
                if not budget.take(price):
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
            # `future.result(timeout=...)` would raise the same error for a late result as for a
            # function that raises TimeoutError.
            while not wait([future], timeout=patience).done:
                yield None
            budget.give_back(price)
            yield future.result()
    finally:
        budget.close()


def prefetch_next(items: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Yield the items. The pool computes the next one in the meantime."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]


class _Budget:
    """A number that threads take from, and wait for if too little is left."""

    def __init__(self, amount: int) -> None:
        self._left = amount
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, amount: int) -> bool:
        """Take an amount, or wait for it. Return False if the budget is closed instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._left >= amount)
            self._left -= amount
            return not self._is_closed

    def give_back(self, amount: int) -> None:
        with self._changed:
            self._left += amount
            self._changed.notify()

    def close(self) -> None:
        """End the wait in `take`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
