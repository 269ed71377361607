"""Output of commands that yield one record per input: results, messages, progress, exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hiera_core import zoo
from hiera_core.atomic import atomic_file, sync_folder, unfinished
from hiera_core.data.folders import describe
from hiera_core.data.media_types import ENDINGS
from hiera_core.data.sources import Source
from hiera_core.errors import InputError, OutputError, UsageError
from hiera_core.inference import fingerprint
from hiera_core.places.uploads import Upload
from hiera_core.plain_data import counted
from hiera_core.records import Record

from .exit_codes import OK, SOME_FAILED, ReaderGone, print_message
from .output_files.claims import claim_file, target_of
from .output_files.partial_results import (
    FinishedInput,
    finished_inputs,
    read_facts,
    remove_incomplete_line,
)
from .output_files.remote_outputs import RESUME_HINT
from .output_formats import WRITERS, Format, open_text, resolve_format
from .progress import InputCount, progress_counter

PARTIAL, FACTS = ".partial", ".json"  # endings that are added to the name of the output file


class ResultStream:
    """Writes results to standard output or a file, and messages and progress to stderr.

    A file is written as NAME.partial, and renamed to NAME when all inputs are done. So an
    interrupted run leaves its results under a name that shows that some are missing. What they
    depend on is in NAME.partial.json, so that the run is only continued with the same settings.

    Args:
        path: The output file, or None for standard output.
        format: Format of the results.
        topk: Number of classes in a record, for the columns of csv.
        details: Names of the task's own fields, for the columns of csv.
        overwrite: Replace the file.
        resume: Append to the NAME.partial of an interrupted run.
        quiet: Print no progress, and a summary only if an input fails.
        upload: Sends the file to a remote place when it is complete; None if it stays here.

    Raises:
        UsageError: The file cannot be written (see `target_of`), its extension is unknown, or this
            format cannot be resumed.
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
        upload: Upload | None = None,
    ) -> None:
        self.path, self.quiet, self.upload = path, quiet, upload
        if path is not None:
            target_of(path)  # a folder or device has no extension that decides the format
            if path.suffix.lower() in ENDINGS:  # it may be one of the inputs
                raise UsageError(
                    f"output {str(path)!r} is named like an image or video", "choose another name"
                )
        self.format = resolve_format(format, path)
        self.topk, self.details = topk, details
        self.overwrite, self.resume = overwrite, resume
        self.partial: Path | None = None  # set by `claim`
        self._continues = False  # whether the partial file has results of an interrupted run
        self.facts: dict[str, dict[str, Any]] = {}  # what the results depend on
        self.ok = self.failed = 0
        self.skipped = 0  # inputs that the interrupted run has finished; also in `ok` or `failed`
        self.count: InputCount | None = None  # counts the inputs for the progress
        self.pictures: Path | str | None = None  # a folder with pictures, for the summary
        self.passed_over = Counter[str]()  # files in folders that are no inputs, by extension
        self.complete = True  # False if the run stops early, so that the file stays .partial
        self.origin = "list, pattern or standard input"  # where inputs come from, for messages
        self.is_numbered = False  # True if inputs know their position among those of all processes
        self.is_silent = False  # True if records are not printed, because they go elsewhere
        self.may_be_empty = False  # True if there may be fewer inputs than processes
        self.is_finished = False  # True if there is nothing to resume, because the file is complete
        if resume and (path is None or self.format is not Format.jsonl):
            raise UsageError("--resume needs -o with jsonl", "use -o results.jsonl")
        if resume and upload is not None:
            raise UsageError("--resume does not continue a remote file", RESUME_HINT)

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the lock of the file within the block. Nothing is written before `write_all`.

        Raises:
            UsageError: The file exists, its folder is missing or read-only, another process writes
                to it, an interrupted run left results, or NAME.partial is a link or device.
        """
        if self.path is None:
            yield
            return
        target = target_of(self.path)
        partial = target.with_name(target.name + PARTIAL)
        self.is_finished = (
            self.resume and not self.overwrite and target.exists() and not partial.exists()
        )
        with claim_file(self.path, self.overwrite or self.is_finished):
            if partial.exists() and not (self.resume or self.overwrite):
                raise UsageError(
                    f"an interrupted run left {str(partial)!r}",
                    "--resume continues it, --overwrite starts over",
                )
            if partial.is_symlink() or (partial.exists() and not partial.is_file()):
                raise UsageError(f"{str(partial)!r} is not a regular file", "remove it")
            self.path, self.partial = target, partial
            self._continues = self.resume and partial.exists()
            if self._continues:
                self.facts = read_facts(self._facts_path)
            elif self.is_finished:  # the run was killed before it removed them
                unfinished.remove(self._facts_path)
            yield

    def depends_on(self, what: str, facts: dict[str, Any]) -> None:
        """Store what the results depend on, for a later --resume.

        Args:
            what: `settings`, or the kind of input that a model is for.
            facts: Values for JSON, see `fingerprint`.

        Raises:
            UsageError: The results of the interrupted run depend on something else.
            OutputError: The values cannot be written.
        """
        if not self.is_resumable:
            return
        assert self.partial is not None
        if what in self.facts:
            hint = "resume with the same options and weights, or --overwrite"
            fingerprint.check_same(self.partial, self.facts[what], facts, hint)
            return
        if not (self.facts or self._continues):
            # Results of another model must not stand beside the facts about this one.
            unfinished.remove(self.partial)
        self.facts[what] = facts
        with atomic_file(self._facts_path) as temporary:
            temporary.write_text(json.dumps(self.facts), encoding="utf-8")

    def __enter__(self) -> ResultStream:
        self.stream: IO[str] = sys.stdout
        self._progress = contextlib.ExitStack()
        try:
            with self._write_errors():
                if self.partial is not None:
                    self.stream = self._open(self.partial)
                self.writer = WRITERS[self.format](self.stream, self.topk, self.details)
        except BaseException as error:
            self._close(error)
            raise
        self._advance = self._progress.enter_context(
            progress_counter(self._shows_progress(), self.count)
        )
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._progress.close()
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        """Write what is still held back, and give the file its final name.

        Args:
            error: The error that ends the stream early. No error of this method replaces it.
        """
        try:
            with self._write_errors():
                if error is None:
                    self.writer.close()
                self.stream.flush()
                if self.partial is not None:
                    os.fsync(self.stream.fileno())
        except (OutputError, ReaderGone) as failure:
            if error is None:
                error = failure
                raise
        finally:
            if self.partial is not None:
                with contextlib.suppress(OSError):  # closing flushes again
                    if self.stream is not sys.stdout:
                        self.stream.close()
                self._finish(self.partial, error)

    def _finish(self, partial: Path, error: BaseException | None) -> None:
        """Rename the file if it is complete, and remove it if it holds nothing."""
        assert self.path is not None
        if error is None and self.complete:
            with self._write_errors():
                partial.replace(self.path)
                unfinished.remove(self._facts_path)
                sync_folder(self.path.parent)
            if self.upload is not None:
                self.upload.send(self.path)
        elif self.ok or self.failed or self._continues:
            if self.upload is not None:
                self.upload.is_kept = True
            # Who has made an error of usage knows the file, unless it is a temporary one.
            is_known = isinstance(error, UsageError) and self.upload is None
            if error is not None and not is_known:
                count = self.ok + self.failed
                verb = "is" if count == 1 else "are"
                can_resume = self.format is Format.jsonl and self.upload is None
                hint = "; --resume continues" if can_resume else ""
                error.add_note(f"{counted(count, 'input')} {verb} in {partial}{hint}")
        else:  # there is nothing to resume
            unfinished.remove(partial)
            unfinished.remove(self._facts_path)

    def skip_done(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yield the inputs that the resumed run has not finished, and count the others.

        Raises:
            UsageError: The inputs differ from those of the resumed run, or their order does.
        """
        sources = iter(sources)
        earlier = self.path if self.is_finished else self.partial
        for done in finished_inputs(earlier) if self.resume and earlier else ():
            source = next(sources, None)
            if source is None or source.name != done.name:
                now = "nothing" if source is None else repr(source.name)
                raise UsageError(
                    f"--resume: input {self.skipped} was {done.name!r}, and is {now} now",
                    "give the same inputs in the same order, or --overwrite",
                )
            self.skipped += 1
            self.failed += done.status == "error"
            self.ok += done.status != "error"
        yield from sources

    def check_finished(
        self, sources: Iterable[Source], models: Mapping[str, str], note: str = ""
    ) -> int:
        """Say that the file to resume is complete, and return the exit code of the run that wrote
        it.

        Args:
            sources: The inputs.
            models: The name of the model for each kind of input, where it is known.
            note: What to add to the message.

        Raises:
            UsageError: There are other inputs now, or another model or number of classes.
        """
        assert self.path is not None
        for done in finished_inputs(self.path):
            if done.status != "error":
                self._check_same(done, models.get(done.kind, done.model))
        further = next(self.skip_done(sources), None)
        if further is not None:
            raise UsageError(
                f"{str(self.path)!r} is finished, without {further.name!r}",
                "give the same inputs, or --overwrite",
            )
        print_message(f"{self.path} is finished: {self.ok} ok, {self.failed} failed{note}")
        return SOME_FAILED if self.failed else OK

    def _check_same(self, done: FinishedInput, model: str) -> None:
        """Check that a finished record has the model and the number of classes of this run."""
        entry = zoo.models().get(done.model)
        most = self.topk if entry is None else min(self.topk, entry.config["num_classes"])
        facts = {"model": (done.model, model), "topk": (done.classes, self.topk)}
        same_topk = done.classes == most or (entry is None and done.classes < self.topk)
        for name, (earlier, now) in facts.items():
            if earlier != now and not (name == "topk" and same_topk):
                raise UsageError(
                    f"{self.path} is finished, and was made with {name} {earlier}, not {now}",
                    "use the same options, another file, or --overwrite",
                )

    def record(self, record: Record) -> None:
        """Write one record at once, and print its error on stderr if it has one.

        Raises:
            ReaderGone: The reader of standard output has closed it.
            OutputError: The record cannot be written.
        """
        if not self.is_silent:
            with self._write_errors():
                self.writer.write(record)
                self.stream.flush()
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
                record.index += 0 if self.is_numbered else self.skipped
                if record.error is None:
                    try:
                        each(record)
                    except InputError as error:
                        record.fail(error)
                self.record(record)
                if record.error is not None and stop:
                    self.complete = False
                    break
            if not (self.ok or self.failed or self.may_be_empty):
                self.complete = False
        if not (self.ok or self.failed or self.may_be_empty):
            raise UsageError("no inputs", f"the {self.origin} is empty")
        self.print_summary()
        return SOME_FAILED if self.failed else OK

    def print_summary(self) -> None:
        """Print `n ok, m failed`, and where the results are. If the records are on standard output,
        this is only printed if anything failed or there was more than one input."""
        path: Path | str | None = self.path if self.complete else self.partial
        if self.upload is not None and self.path is not None and self.complete:
            path = self.upload.name_of(self.path)
        says_more = self.ok > 1 or self.is_silent or self.passed_over or path or self.pictures
        if self.failed or (says_more and not self.quiet):
            target = f" -> {path}" if path else ""
            shown = ""
            if self.pictures and self.ok:
                shown = f"; {_what_is(str(self.pictures))} {self.pictures}"
            counts = f"{self.ok} ok, {self.failed} failed{self._passed_over()}"
            print_message(f"{counts}{target}{shown}")

    def _passed_over(self) -> str:
        """`, passed over: 3 .txt, 1 hidden`, if files in folders were left out."""
        return f", passed over: {describe(self.passed_over)}" if self.passed_over else ""

    @property
    def is_resumable(self) -> bool:
        """Whether a later --resume may continue this stream."""
        return self.partial is not None and self.format is Format.jsonl and not self.is_finished

    @property
    def _facts_path(self) -> Path:
        """The file beside NAME.partial that says what its results depend on."""
        assert self.partial is not None
        return self.partial.with_name(self.partial.name + FACTS)

    def _shows_progress(self) -> bool:
        """Return whether to show a counter: on a terminal that does not also show the results."""
        prints_results = self.path is None and sys.stdout.isatty()
        return sys.stderr.isatty() and not prints_results and not self.quiet

    def _open(self, path: Path) -> IO[str]:
        if self._continues:
            remove_incomplete_line(path)
        return open_text(path, "a" if self._continues else "w")

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Convert errors of writing to the stream."""
        try:
            yield
        except BrokenPipeError as error:
            raise ReaderGone from error
        except OSError as error:
            name = self.partial or "standard output"
            raise OutputError(f"{name} cannot be written ({error.strerror or error})") from error


def _what_is(pictures: str) -> str:
    """Return what the summary says of a folder with pictures, or of a single file."""
    ending = Path(pictures).suffix.lower()
    if ending not in (".png", ".mp4") or Path(pictures).is_dir():
        return "pictures are in"
    return "the picture is" if ending == ".png" else "the movie is"
