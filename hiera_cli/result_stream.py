"""Output of commands that yield one record per input: results, messages, progress, exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from hiera_core.data.sources import Source
from hiera_core.errors import InputError, OutputError, UsageError
from hiera_core.records import Record

from .exit_codes import OK, SOME_FAILED, ReaderGone, print_message
from .output_formats import WRITERS, Format, open_text, resolve_format

PARTIAL = ".partial"


class ResultStream:
    """Writes results to standard output or a file, and messages and progress to stderr.

    A file is written as NAME.partial, and renamed to NAME when all inputs are done. So an
    interrupted run leaves its results under a name that shows that some are missing.

    Args:
        path: The output file, or None for standard output.
        format: Format of the results.
        topk: Number of classes in a record, for the columns of csv.
        details: Names of the task's own fields, for the columns of csv.
        overwrite: Replace the file.
        resume: Append to the NAME.partial of an interrupted run.
        quiet: Print no progress, and a summary only if an input fails.

    Raises:
        UsageError: The file exists, its folder is missing or read-only, an interrupted run left
            results, or this format cannot be resumed.
    """

    def __init__(
        self,
        path: Path | None,
        format: Format,
        *,
        topk: int = 0,
        details: tuple[str, ...] = (),
        overwrite: bool = False,
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        self.path, self.quiet = path, quiet
        self.partial = None if path is None else path.with_name(path.name + PARTIAL)
        self.format = resolve_format(format, path)
        self.topk, self.details, self.resume = topk, details, resume
        self.ok = self.failed = 0
        self.skipped = 0  # inputs that the interrupted run has finished; also in `ok` or `failed`
        self.complete = True  # False if the run stops early, so that the file stays .partial
        if resume and (path is None or self.format is not Format.jsonl):
            raise UsageError("--resume needs -o with jsonl", "use -o results.jsonl")
        if path is not None:
            check_file(path, overwrite)
            if self.partial is not None and self.partial.exists() and not (resume or overwrite):
                raise UsageError(
                    f"an interrupted run left {str(self.partial)!r}",
                    "--resume continues it, --overwrite starts over",
                )

    def __enter__(self) -> ResultStream:
        stream: IO[str] = sys.stdout
        if self.partial is not None:
            if self.resume and self.partial.exists():
                _remove_incomplete_line(self.partial)
            stream = self._open(self.partial)
        self.stream = stream
        self.writer = WRITERS[self.format](stream, self.topk, self.details)
        self._progress = contextlib.ExitStack()
        self._advance = self._progress.enter_context(_progress_counter(self._shows_progress()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._progress.close()
        if kind is None:
            self.writer.close()
        # If there is an error already, an error in flushing must not replace it.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
            self.stream.flush()
        if self.partial is not None and self.path is not None:
            os.fsync(self.stream.fileno())
            self.stream.close()
            if kind is None and self.complete:
                self.partial.replace(self.path)
            elif not (self.ok or self.failed or self.partial.stat().st_size):
                self.partial.unlink()  # there is nothing to resume

    def skip_done(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yield the inputs that the resumed run has not finished, and count the others.

        Raises:
            UsageError: The inputs differ from those of the resumed run, or their order does.
        """
        sources = iter(sources)
        for name, status in _finished(self.partial) if self.resume and self.partial else ():
            source = next(sources, None)
            if source is None or source.name != name:
                now = "nothing" if source is None else repr(source.name)
                raise UsageError(
                    f"--resume: input {self.skipped} was {name!r}, and is {now} now",
                    "give the same inputs in the same order, or --overwrite",
                )
            self.skipped += 1
            self.failed += status == "error"
            self.ok += status != "error"
        yield from sources

    def record(self, record: Record) -> None:
        """Write one record at once, and print its error on stderr if it has one.

        Raises:
            ReaderGone: The reader of standard output has closed it.
            OutputError: The record cannot be written.
        """
        try:
            self.writer.write(record)
            self.stream.flush()
        except BrokenPipeError as error:
            raise ReaderGone from error
        except OSError as error:
            name = self.partial or "standard output"
            raise OutputError(f"{name} cannot be written ({error.strerror})") from error
        if record.error is not None:
            self.failed += 1
            print_message(f"{record.input}: {record.error}")
        else:
            self.ok += 1
        self._advance(self.ok, self.failed)

    def write_all(
        self, records: Iterable[Record], each: Callable[[Record], None], stop: bool = False
    ) -> int:
        """Write all records as they arrive.

        Args:
            records: The records of a `Pipeline`.
            each: Called with each record without an error, before it is written. If it raises an
                InputError, the record gets this error.
            stop: End at the first error.

        Returns:
            The exit code.

        Raises:
            UsageError: There are no records.
        """
        with self:
            for record in records:
                record.index += self.skipped
                if record.error is None:
                    try:
                        each(record)
                    except InputError as error:
                        record.fail(error)
                self.record(record)
                if record.error is not None and stop:
                    self.complete = False
                    break
        if not (self.ok or self.failed):
            raise UsageError("no inputs", "the list, pattern or standard input is empty")
        self.print_summary()
        return SOME_FAILED if self.failed else OK

    def print_summary(self) -> None:
        """Print `n ok, m failed`, if anything failed or there was more than one input."""
        if self.failed or (self.ok > 1 and not self.quiet):
            path = self.path if self.complete else self.partial
            target = f" -> {path}" if path else ""
            print_message(f"{self.ok} ok, {self.failed} failed{target}")

    def _shows_progress(self) -> bool:
        """Return whether to show a counter: on a terminal that does not also show the results."""
        prints_results = self.path is None and sys.stdout.isatty()
        return sys.stderr.isatty() and not prints_results and not self.quiet

    def _open(self, path: Path) -> IO[str]:
        try:
            return open_text(path, "a" if self.resume else "w")
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror})") from error


def check_file(path: Path | None, overwrite: bool) -> None:
    """Check that an output file can be written, if one is given.

    Raises:
        UsageError: The file exists (without `overwrite`), is a folder, or its folder is missing or
            read-only.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder", "name a file in it")
    if path.exists() and not overwrite:
        raise UsageError(f"output {str(path)!r} exists", "--overwrite replaces it")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r}", "make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"folder {str(path.parent)!r} is read-only", "write to another folder")


def check_folder(folder: Path, may_exist: bool) -> None:
    """Check that files can be written to a folder. It may be missing.

    Args:
        folder: The folder.
        may_exist: Whether the folder may hold files.

    Raises:
        UsageError: The folder is not empty (without `may_exist`), is a file, or is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file", "name a folder")
    if folder.is_dir() and not may_exist and any(folder.iterdir()):
        raise UsageError(f"folder {str(folder)!r} is not empty", "--overwrite writes into it")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"folder {str(nearest)!r} is read-only", "write to another folder")


def _remove_incomplete_line(partial: Path) -> None:
    """Remove an incomplete last line, which an interrupted run may have left."""
    with partial.open("rb+") as file:
        size = 0
        for line in file:
            size += len(line) if line.endswith(b"\n") else 0
        file.truncate(size)


def _finished(partial: Path) -> Iterator[tuple[str, str]]:
    """Yield input and status of every record of an interrupted run."""
    with open_text(partial, "r") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield record["input"], record["status"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{str(partial)!r}: line {number} is no record", "--overwrite starts over"
                ) from error


@contextlib.contextmanager
def _progress_counter(show: bool) -> Iterator[Callable[[int, int], None]]:
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
