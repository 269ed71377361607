"""Progress of commands that yield one record per input, on stderr."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hiera_core.data import sources

# From these widths of the terminal on, there is space for a bar and for the elapsed time.
BAR_FROM, ELAPSED_FROM = 80, 90


@dataclass
class InputCount:
    """Number of inputs. It is counted in the background, because a folder may be large.

    Args:
        inputs: The inputs, as for `sources.expand`.
        recursive: As for `sources.expand`.
        total: The number, or None while it is not known.
        share: Returns how many of all inputs this process takes.
    """

    inputs: Sequence[str]
    recursive: bool = False
    total: int | None = None
    share: Callable[[int], int] = lambda total: total
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to count, if that reads no stream."""
        if self.total is None and all(map(sources.can_be_listed_twice, self.inputs)):
            threading.Thread(target=self._count, name="count", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _count(self) -> None:
        count = 0
        for _ in sources.expand(self.inputs, recursive=self.recursive):
            count += 1
            if self._stop.is_set():
                return
        self.total = self.share(count)


class Rate:
    """Inputs per second since the first result, and the time that the others will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin: tuple[int, float] | None = None

    def text(self, done: int, failed: int, total: int | None) -> str:
        """Return `120 of 1000 done, 2 failed, 30.1/s, 0:00:29 left`, as far as it is known."""
        now = self._clock()
        if self._begin is None:  # earlier results are those of a resumed run
            self._begin = (done, now)
        first, begin = self._begin
        parts = [f"{done} of {total} done" if total else f"{done} done", f"{failed} failed"]
        if done > first and now > begin:
            rate = (done - first) / (now - begin)
            parts.append(f"{rate:.1f}/s")
            if total is not None and total >= done:
                left = round((total - done) / rate)
                parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(parts)


@contextlib.contextmanager
def progress_counter(
    show: bool, count: InputCount | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many inputs are done, of how many, how many failed, the inputs per second
    and the time that is left.

    Args:
        show: Whether to show anything.
        count: Counts the inputs in the background.

    Yields:
        A function that takes the number of successful and the number of failed inputs.
    """
    if not show:
        yield lambda ok, failed: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.fields[text]}")]
    if console.width >= BAR_FROM:
        columns[1:1] = [BarColumn(bar_width=10)]
    if console.width >= ELAPSED_FROM:
        columns.append(TimeElapsedColumn())
    rate = Rate()
    if count is not None:
        count.start()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None, text="starting")

            def advance(ok: int, failed: int) -> None:
                total = None if count is None else count.total
                text = rate.text(ok + failed, failed, total)
                progress.update(task, completed=ok + failed, total=total, text=text)

            yield advance
    finally:
        if count is not None:
            count.stop()
