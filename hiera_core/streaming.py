"""Work ahead in threads: results in order, a bounded number of them, a word when one is late."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    pool: ThreadPoolExecutor,
    ahead: int,
    cost: Callable[[T], int] = lambda item: 1,
    patience: float = 0.5,
) -> Iterator[R | None]:
    """`function` of every item, in order, computed in the pool's threads.

    Items are drawn in a thread of their own, so a slow source does not hold back what is done.

    Args:
        ahead: how much is under way or waiting at a time, in units of `cost`.
        cost: of an item; one that costs more than `ahead` still gets its turn.
        patience: seconds after which a result that is not there is answered with None, so that the
            caller can use what it holds. Then the wait goes on.

    Raises:
        whatever drawing an item or `function` raises, in its place.
    """
    under_way: queue.SimpleQueue[tuple[Future[R], int] | BaseException | None]
    under_way = queue.SimpleQueue()
    permits, stopped = threading.Semaphore(ahead), threading.Event()

    def feed() -> None:
        try:
            for item in items:
                price = min(cost(item), ahead)
                for _ in range(price):
                    permits.acquire()
                if stopped.is_set():
                    return
                under_way.put((pool.submit(function, item), price))
            under_way.put(None)
        except BaseException as error:
            under_way.put(error)

    threading.Thread(target=feed, name="feed", daemon=True).start()
    try:
        while True:
            try:
                entry = under_way.get(timeout=patience)
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
                except NotYet:
                    if future.done():  # the function's own
                        raise
                    yield None
            permits.release(price)
            yield result
    finally:
        stopped.set()
        permits.release(ahead)


def one_ahead(items: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """The same items, the next one being made in the pool while the caller uses this one."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]
