"""The one object that prints: records to a stream or file, as they come, in any format."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hiera_core.data.sources import Source
from hiera_core.errors import InputError, OutputError, UsageError
from hiera_core.records import Record

from .exit_codes import OK, SOME_FAILED, ReaderGone, print_message
from .output_formats import WRITERS, Format

PARTIAL = ".partial"


class ResultStream:
    """Results to stdout or a file, messages and progress to stderr.

    A file is written as NAME.partial and gets its name when it is whole, so an interrupted run
    leaves what it has done, marked as such.

    Args:
        path: a file, or None for standard output.
        topk: columns of csv for classes; details: for what a task says besides.

    Raises:
        UsageError: the file exists, its folder is missing or read-only, nothing to resume.
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
        self.ok = self.failed = self.done = 0  # done: by the run that is resumed
        self.whole = True  # False: stopped early, so a file keeps its .partial name
        if resume and (path is None or self.format is not Format.jsonl):
            raise UsageError("--resume needs -o with jsonl", "write to -o results.jsonl")
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
                _cut_torn_line(self.partial)
            stream = self._open(self.partial)
        self.stream = stream
        self.writer = WRITERS[self.format](stream, self.topk, self.details)
        self._progress = contextlib.ExitStack()
        self._advance = self._progress.enter_context(_progress(self._shows_progress()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the results are not
            self._progress.close()
        if kind is None:
            self.writer.close()
        # After an error it stands, not what flushing would say of it again.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
            self.stream.flush()
        if self.partial is not None and self.path is not None:
            os.fsync(self.stream.fileno())
            self.stream.close()
            if kind is None and self.whole:
                self.partial.replace(self.path)
            elif not (self.ok or self.failed or self.partial.stat().st_size):
                self.partial.unlink()  # nothing was done: nothing to resume

    def skip_done(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Pass over the inputs that the resumed run has records of, and count those.

        Raises:
            UsageError: they are other inputs, or not in that order.
        """
        sources = iter(sources)
        for name, status in _finished(self.partial) if self.resume and self.partial else ():
            source = next(sources, None)
            if source is None or source.name != name:
                now = "nothing" if source is None else repr(source.name)
                raise UsageError(
                    f"--resume: input {self.done} was {name!r} and is {now} now",
                    "give the same inputs in the same order, or --overwrite",
                )
            self.done += 1
            self.failed += status == "error"
            self.ok += status != "error"
        yield from sources

    def record(self, record: Record) -> None:
        """Write one record, at once; say on stderr what went wrong with it."""
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
        """Write records as they come, after `each` has seen them, and give the exit code.

        Args:
            each: may raise InputError, which makes the record an error.
            stop: end at the first error.

        Raises:
            UsageError: there are none.
        """
        with self:
            for record in records:
                record.index += self.done
                if record.error is None:
                    try:
                        each(record)
                    except InputError as error:
                        record.fail(error)
                self.record(record)
                if record.error is not None and stop:
                    self.whole = False
                    break
        if not (self.ok or self.failed):
            raise UsageError("no inputs", "the list, pattern or standard input holds none")
        self.closing_line()
        return SOME_FAILED if self.failed else OK

    def closing_line(self) -> None:
        """`n ok, m failed`, where there was more than one input or anything failed."""
        if self.failed or (self.ok > 1 and not self.quiet):
            path = self.path if self.whole else self.partial
            where = f" -> {path}" if path else ""
            print_message(f"{self.ok} ok, {self.failed} failed{where}")

    def _shows_progress(self) -> bool:
        """On a terminal that shows no results itself: those are progress enough."""
        busy = self.path is None and sys.stdout.isatty()
        return sys.stderr.isatty() and not busy and not self.quiet

    def _open(self, path: Path) -> IO[str]:
        try:
            return path.open(
                "a" if self.resume else "w", encoding="utf-8", errors="surrogateescape", newline=""
            )
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror})") from error


def resolve_format(format: Format, path: Path | None) -> Format:
    """What `auto` means: by the file's ending; else a table on a terminal, jsonl elsewhere."""
    if format is not Format.auto:
        return format
    if path is None:
        return Format.table if sys.stdout.isatty() else Format.jsonl
    endings = {".json": Format.json, ".jsonl": Format.jsonl, ".csv": Format.csv}
    if path.suffix.lower() in endings:
        return endings[path.suffix.lower()]
    return Format.table if path.suffix.lower() == ".txt" else Format.jsonl


def check_file(path: Path | None, overwrite: bool) -> None:
    """Raise UsageError unless the output (if there is one) can be written."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder", "name a file in it")
    if path.exists() and not overwrite:
        raise UsageError(f"output {str(path)!r} exists", "--overwrite replaces it")
    if not path.parent.is_dir():
        raise UsageError(f"no folder {str(path.parent)!r} to write to", "make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"folder {str(path.parent)!r} is read-only", "write elsewhere")


def check_folder(folder: Path, may_exist: bool) -> None:
    """A folder to write files to: new or empty, unless told otherwise.

    Raises:
        UsageError: it holds something, is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file", "name a folder")
    if folder.is_dir() and not may_exist and any(folder.iterdir()):
        raise UsageError(f"folder {str(folder)!r} is not empty", "--overwrite writes into it")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"folder {str(there)!r} is read-only", "write elsewhere")


def _cut_torn_line(partial: Path) -> None:
    """An interrupted run may have left half a line."""
    with partial.open("rb+") as file:
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)


def _finished(partial: Path) -> Iterator[tuple[str, str]]:
    """Input and status of every record of an interrupted run."""
    with partial.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield record["input"], record["status"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{str(partial)!r}: line {number} is no record", "--overwrite starts over"
                ) from error


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[Any]:
    """A counter on stderr: done, failed, rate."""
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, failed=0, rate="-")

        def advance(ok: int, failed: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.1f}" if speed else "-"
            bar.update(task, completed=ok + failed, failed=failed, rate=rate)

        yield advance
