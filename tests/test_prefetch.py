"""Tests of prefetching in threads: order, limits, slow sources, errors."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hiera_core.inference.prefetch import prefetch_map, prefetch_next


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_order_is_kept(pool: ThreadPoolExecutor) -> None:
    def slow_at_times(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number * number

    assert list(prefetch_map(slow_at_times, range(50), pool=pool, limit=8)) == [
        n * n for n in range(50)
    ]
    assert list(prefetch_next(iter(range(20)), pool)) == list(range(20))


def test_prefetch_stays_within_its_limit(pool: ThreadPoolExecutor) -> None:
    drawn, used = 0, 0

    def source() -> Iterator[int]:
        nonlocal drawn
        for number in range(200):
            drawn += 1
            assert drawn - used <= 10 + 2, "too many items were prefetched"
            yield number

    for _ in prefetch_map(lambda n: n, source(), pool=pool, limit=10):
        used += 1
    assert used == 200


def test_costly_items_use_more_of_the_limit(pool: ThreadPoolExecutor) -> None:
    lock, running, most_running = threading.Lock(), 0, 0

    def busy(_: int) -> None:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    list(prefetch_map(busy, range(20), pool=pool, limit=10, cost=lambda n: 5))
    assert most_running <= 2
    assert len(list(prefetch_map(busy, range(3), pool=pool, limit=2, cost=lambda n: 100))) == 3


def test_results_do_not_wait_for_a_slow_source(pool: ThreadPoolExecutor) -> None:
    """Finished results come while the source still prepares the next item."""
    is_ready = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        assert is_ready.wait(10)
        yield 2

    results = prefetch_map(lambda n: n, source(), pool=pool, limit=4, patience=0.01)
    seen = [next(results)]
    while seen[-1] is None:  # the machine is busy
        seen.append(next(results))
    assert seen[-1] == 1 and next(results) is None
    is_ready.set()
    assert [r for r in results if r is not None] == [2]


def test_errors_are_raised_in_order(pool: ThreadPoolExecutor) -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise KeyError("the source")

    results = prefetch_map(lambda n: n, source(), pool=pool, limit=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="the source"):
        next(results)
    with pytest.raises(ZeroDivisionError):
        list(prefetch_map(lambda n: 1 // (n - 2), range(5), pool=pool, limit=2))


def test_closing_the_results_stops_the_source(pool: ThreadPoolExecutor) -> None:
    drawn = 0

    def source() -> Iterator[int]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    results = prefetch_map(lambda n: n, source(), pool=pool, limit=4)
    next(results)
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    before = drawn
    time.sleep(0.1)
    assert drawn == before


def test_slow_items_are_not_lost(pool: ThreadPoolExecutor) -> None:
    """Items take about as long as the patience, and threads switch all the time. A result that
    arrives at the very moment when the wait ends is a result."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    draw = random.Random(0)
    seconds = [draw.uniform(0.004, 0.006) for _ in range(1000)]

    def work(number: int) -> int:
        time.sleep(seconds[number])
        return number

    try:
        results = prefetch_map(work, range(1000), pool=pool, limit=4, patience=0.005)
        assert [r for r in results if r is not None] == list(range(1000))
    finally:
        sys.setswitchinterval(before)


def test_a_timeout_that_the_function_raises_is_its_error(pool: ThreadPoolExecutor) -> None:
    def fail(number: int) -> int:
        raise TimeoutError("the server does not answer")

    with pytest.raises(TimeoutError, match="the server"):
        list(prefetch_map(fail, range(3), pool=pool, limit=2, patience=0.001))


def test_a_huge_limit_costs_nothing(pool: ThreadPoolExecutor) -> None:
    """A limit or a cost is a number to subtract, and not a number of permits to take one by one."""
    results = prefetch_map(lambda n: n, range(3), pool=pool, limit=10**18, cost=lambda n: 10**17)
    assert list(results) == [0, 1, 2]
