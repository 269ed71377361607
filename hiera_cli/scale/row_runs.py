"""Runs whose results are rows of Parquet files (--rows), here or on Ray, and dry runs."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hiera_core.data.sources import Source
from hiera_core.errors import UsageError
from hiera_core.places.remote_requests import is_remote

from ..exit_codes import OK, SOME_FAILED, print_message
from ..output_files.claims import claim_folder, claim_part_of_folder
from ..output_formats import Format
from ..progress import progress_counter
from ..result_stream import ResultStream
from .input_selection import InputSelection, check_division_of
from .scale_options import Engine

if TYPE_CHECKING:
    from hiera_core.inference.columns.callables import Classifier, Embedder
    from hiera_core.scale.done_rows import DoneRows
    from hiera_core.scale.input_table import InputTable
    from hiera_core.scale.result_rows import RowLayout
    from hiera_core.scale.row_folder import RowFolder

SHOWN_ERRORS = 20  # on stderr; all of them are in the rows


@dataclass(frozen=True)
class RowRun:
    """The options of a run with --rows or --dry-run.

    Args:
        chosen: The inputs.
        rows: The folder; None for a dry run.
        engine, address, dry_run: The options of these names.
        overwrite, resume, retry_failed, quiet: The options of these names.
        stop: Whether to end at the first error.
        workers: CPUs of a Ray of its own; None for all.
        device: The value of --device.
        shard_size: The value of --shard-size, or None.
    """

    chosen: InputSelection
    rows: str | None
    engine: Engine
    address: str | None
    dry_run: int | None
    overwrite: bool
    resume: bool
    retry_failed: bool
    quiet: bool
    stop: bool
    workers: int | None
    device: str
    shard_size: int | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether results become rows, or nothing is written at all."""
        return self.rows is not None or self.dry_run is not None

    def check(self, others: dict[str, object]) -> None:
        """Check the options before anything is read.

        Args:
            others: Options that name another output, and their values.

        Raises:
            UsageError: They contradict one another, or a package is missing.
        """
        if self.engine is Engine.ray and self.rows is None and self.dry_run is None:
            raise UsageError("--engine ray needs --rows", "name a folder that all machines see")
        if self.address is not None and self.engine is not Engine.ray:
            raise UsageError("--address needs --engine ray", "leave it out")
        if self.retry_failed and (self.rows is None or not self.resume):
            raise UsageError("--retry-failed needs --rows and --resume", "give both")
        if not self.is_wanted:
            return
        for name, value in others.items():
            if value:
                what = "--rows" if self.rows is not None else "--dry-run"
                raise UsageError(f"{what} and {name} name two outputs", "choose one")
        if self.dry_run is not None and self.engine is not Engine.local:
            raise UsageError("--dry-run measures this process, not Ray", "leave out --engine")
        if self.chosen.are_none:
            raise UsageError("there are no INPUTS", "name files or folders, or give --manifest")
        if self.engine is Engine.ray and not self.chosen.shard.is_whole:
            raise UsageError(
                f"{self.chosen.shard.origin}: Ray divides the inputs itself", "use --shard none"
            )
        if self.engine is Engine.ray and (":" in self.device or "," in self.device):
            raise UsageError(
                f"--device {self.device}: Ray chooses the device of each worker", "use cuda or auto"
            )
        if self.engine is Engine.ray and self.stop:
            raise UsageError("--engine ray cannot stop at an error", "leave out --on-error")
        from hiera_core.scale.result_rows import check_pyarrow

        check_pyarrow()
        if self.engine is Engine.ray:
            from hiera_core.scale.ray_cluster import check_ray

            check_ray()

    def run(
        self,
        context: typer.Context,
        model: Embedder | Classifier,
        features: tuple[str, ...],
        settings: dict[str, object],
    ) -> int:
        """Compute the rows, and return the exit code.

        Args:
            context: The context of the command.
            model: What computes.
            features: Names of the features; empty for classes.
            settings: What the rows depend on, besides the model.

        Raises:
            UsageError, CheckpointError, HubError, DeviceError, OutputError: See `run_on_ray` and
                `Pipeline`.
        """
        from hiera_core.places.places import place_of
        from hiera_core.scale.input_table import id_type_of
        from hiera_core.scale.result_rows import RowLayout
        from hiera_core.scale.row_folder import ROWS_PER_FILE, RowFolder

        manifest = self.chosen.manifest
        layout = RowLayout(features, "none" if manifest is None else id_type_of(manifest))
        self.chosen.check()
        if self.dry_run is not None:
            return self._estimate(model, layout, self.dry_run)
        assert self.rows is not None
        shard, may_exist = self.chosen.shard, self.overwrite or self.resume
        prefix = "" if shard.is_whole else f"{shard.name}-"
        size = self.shard_size or ROWS_PER_FILE
        folder = RowFolder(place_of(self.rows), layout, prefix, size)
        check_division_of(folder.place.names("", ".parquet"), self.rows, shard)
        if is_remote(self.rows):  # there are no locks
            if folder.files() and not may_exist:
                hint = "--resume continues, --overwrite starts over"
                raise UsageError(f"{self.rows} holds rows already", hint)
        elif prefix:
            context.with_resource(claim_part_of_folder(Path(self.rows), prefix, may_exist))
        else:
            context.with_resource(claim_folder(Path(self.rows), may_exist, "rows"))
        if self.overwrite and not self.resume:
            folder.remove()
        if manifest is not None:
            settings = {**settings, "rows of the manifest": len(manifest)}
        done = self._read_done(folder)
        run = self._run_on_ray if self.engine is Engine.ray else self._run_here
        try:
            return run(model, folder, settings, done)
        except BaseException:  # also a signal
            with contextlib.suppress(Exception):
                folder.remove_replaced()
            raise

    def _read_done(self, folder: RowFolder) -> DoneRows:
        """Return the rows of an earlier run; with --retry-failed, without those that failed."""
        from hiera_core.scale.done_rows import DoneRows

        if not self.resume:
            return DoneRows()
        if self.retry_failed:
            folder.begin_retry()
        manifest = self.chosen.manifest
        return folder.read_done(None if manifest is None else len(manifest))

    def _run_here(
        self,
        model: Embedder | Classifier,
        folder: RowFolder,
        settings: dict[str, object],
        done: DoneRows,
    ) -> int:
        from hiera_core.inference.model_fingerprint import model_fingerprint
        from hiera_core.scale.row_folder import check_facts

        path, earlier = done.where, done.facts
        facts: dict[str, dict[str, Any]] = {"settings": settings}
        check_facts(path, earlier, facts)

        def note_model(runner: Any) -> None:
            found = {runner.kind: model_fingerprint(runner)}
            check_facts(path, earlier, found)
            facts.update(found)

        model.pipeline.on_model(note_model)
        out = self._messages(done)
        sources = self.chosen.sources(out.passed_over, numbered=True)
        records = folder.write_records(model.pipeline(done.skip(sources, are_all=True)), facts)
        with contextlib.closing(records):
            code = out.write_all(records, lambda record: None, stop=self.stop)
        folder.remove_replaced()
        self._say_where()
        return code

    def _run_on_ray(
        self,
        model: Embedder | Classifier,
        folder: RowFolder,
        settings: dict[str, object],
        done: DoneRows,
    ) -> int:
        from hiera_core.scale.ray_cluster import RayOptions
        from hiera_core.scale.ray_engine import run_on_ray
        from hiera_core.scale.run_summary import RunSummary

        out = self._messages(done)
        inputs = self._inputs_of_ray(folder, out.passed_over)
        shown = itertools.count()
        with progress_counter(not self.quiet and _is_terminal(), out.count) as advance:

            def show(summary: RunSummary) -> None:
                for error in summary.errors:
                    if next(shown) < SHOWN_ERRORS:
                        print_message(error)
                summary.errors.clear()
                advance(done.ok + summary.ok, done.failed + summary.failed)

            options = RayOptions(self.address, self.workers, self.device)
            summary = run_on_ray(
                inputs, model, folder, settings, options=options, done=done, on_progress=show
            )
        if summary.failed > SHOWN_ERRORS:
            print_message("further errors are in the rows whose status is 'error'")
        out.ok, out.failed = done.ok + summary.ok, done.failed + summary.failed
        if not (out.ok or out.failed):
            raise UsageError("no inputs", f"the {out.origin} is empty")
        out.print_summary()
        if not self.quiet:
            print_message(summary.text())
        self._say_where()
        return SOME_FAILED if out.failed else OK

    def _inputs_of_ray(self, folder: RowFolder, passed_over: Counter[str]) -> InputTable:
        """Return the inputs as a table that all workers can read."""
        from hiera_core.scale.input_table import (
            LISTING,
            ListedInputs,
            ManifestInputs,
            list_failed_again,
            write_listing,
        )

        table = self.chosen.manifest
        if table is not None:
            return ManifestInputs.of(table)
        # Positions are those of the first listing, also if there are other files now.
        if not (self.resume and folder.place.names(LISTING, "")):
            write_listing(self.chosen.sources(passed_over), folder.place)
        elif self.retry_failed:
            list_failed_again(folder.place, self.chosen.expand)
        return ListedInputs(folder.place)

    def _estimate(self, model: Embedder | Classifier, layout: RowLayout, count: int) -> int:
        from hiera_core.scale.estimate import estimate, spread

        manifest = self.chosen.manifest
        sources: Iterator[Source]
        if manifest is not None:
            total = len(manifest)
            sources = itertools.chain.from_iterable(map(manifest.read, spread(total, count)))
        else:
            total = sum(1 for _ in self.chosen.sources())
            step = max(1, total // count)
            sources = itertools.islice(self.chosen.sources(), 0, step * count, step)
        for line in estimate(model.pipeline, sources, total, layout).lines():
            print_message(line)
        return OK

    def _messages(self, done: DoneRows) -> ResultStream:
        """Return what prints messages and progress."""
        out = ResultStream(None, Format.jsonl, quiet=self.quiet)
        out.count, out.origin = self.chosen.count(), self.chosen.origin
        out.is_silent = out.is_numbered = True
        out.may_be_empty = not self.chosen.shard.is_whole or len(done) > 0
        out.ok, out.failed, out.skipped = done.ok, done.failed, len(done)
        return out

    def _say_where(self) -> None:
        if not self.quiet:
            print_message(f"rows are in {self.rows}")


def _is_terminal() -> bool:
    import sys

    return sys.stderr.isatty()
