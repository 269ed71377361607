"""Progress of commands that yield one record per input, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_counter(show: bool) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many inputs are done, how many failed, and the inputs per second.

    Yields:
        A function that takes the number of successful and the number of failed inputs.
    """
    if not show:
        yield lambda ok, failed: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed} done, {task.fields[failed]} failed, {task.fields[rate]}/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, failed=0, rate="-")

        def advance(ok: int, failed: int) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:.1f}" if speed else "-"
            progress.update(task, completed=ok + failed, failed=failed, rate=rate)

        yield advance
