"""What the inputs of a command are, by its arguments, --manifest and --shard."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hiera_core.data import sources
from hiera_core.data.division.shards import (
    SHARD_FILE,
    WHOLE_FILE,
    Shard,
    launched_shard,
    parse_shard,
)
from hiera_core.data.division.shards import unused_tasks as find_unused_tasks
from hiera_core.data.sources import Source
from hiera_core.errors import UsageError
from hiera_core.places.remote_requests import is_remote

from ..exit_codes import OK, SOME_FAILED, print_message
from ..output_files import remote_outputs
from ..output_formats import ID
from ..progress import InputCount

if TYPE_CHECKING:
    from hiera_core.data.division.manifest import Manifest
    from hiera_core.places.uploads import Upload


@dataclass(frozen=True)
class InputSelection:
    """The inputs of this process.

    Args:
        inputs: The arguments, see `sources.expand`.
        recursive: See `sources.expand`.
        manifest: A table that takes the place of the arguments, or None.
        shard: The part of the inputs that this process takes.
    """

    inputs: Sequence[str]
    recursive: bool
    manifest: Manifest | None
    shard: Shard

    @classmethod
    def parse(
        cls,
        inputs: Sequence[str] | None,
        recursive: bool,
        manifest: str | None,
        path_column: str | None,
        id_column: str | None,
        private_urls: bool,
        shard: str | None,
    ) -> InputSelection:
        """Return what the options name, and say on stderr if a launcher chose the shard.

        Raises:
            UsageError: There are both inputs and a manifest, a column without a manifest, or the
                shard does not exist; see also `Manifest`.
        """
        if manifest is None and (path_column or id_column or private_urls):
            raise UsageError(
                "--path-column, --id-column and --private-urls need --manifest", "name the table"
            )
        table = None
        if manifest is not None:
            if inputs:
                raise UsageError(
                    f"there are both inputs and --manifest {manifest}", "give one of them"
                )
            from hiera_core.data.division.manifest import Manifest

            table = Manifest(manifest, path_column, id_column, private_urls=private_urls)
        return cls(inputs or [], recursive, table, _choose_shard(shard))

    def check(self) -> None:
        """Check lists, folders and globs; see `sources.check_inputs`.

        Raises:
            UsageError: One of them cannot be read.
        """
        sources.check_inputs(self.inputs, recursive=self.recursive)

    def sources(
        self, passed_over: Counter[str] | None = None, *, numbered: bool = False
    ) -> Iterator[Source]:
        """Yield the inputs of this process.

        Args:
            passed_over: Counts the other files in folders.
            numbered: Also give inputs their position if this process takes all of them.
        """
        if self.manifest is not None:
            return self.manifest.read(self.rows)
        found = sources.expand(self.inputs, recursive=self.recursive, passed_over=passed_over)
        return self.shard.take(found) if numbered or not self.shard.is_whole else found

    def expand(self, name: str) -> Iterator[Source]:
        """Yield the inputs that a name stands for, as if it were an argument."""
        return sources.expand([name], recursive=self.recursive)

    def exit_code(self, code: int) -> int:
        """Return the exit code of this process. torchrun ends all processes when one of them has
        another code than 0, so inputs that failed are only reported."""
        return OK if code == SOME_FAILED and self.shard.is_of_torchrun else code

    @property
    def rows(self) -> range:
        """The rows of the manifest that belong to this process."""
        assert self.manifest is not None
        return self.shard.rows(len(self.manifest))

    @property
    def are_none(self) -> bool:
        """Whether the command names no inputs."""
        return not self.inputs and self.manifest is None

    @property
    def origin(self) -> str:
        """What the inputs come from, for messages."""
        return "list, pattern or standard input" if self.manifest is None else "manifest"

    @property
    def id_fields(self) -> tuple[str, ...]:
        """The field that records have because the manifest has a column of ids: `id`, or none."""
        return () if self.manifest is None or self.manifest.columns[1] is None else (ID,)

    @property
    def is_numbered(self) -> bool:
        """Whether inputs know their position among those of all processes."""
        return self.manifest is not None or not self.shard.is_whole

    def count(self) -> InputCount:
        """Return what counts the inputs of this process, for the progress."""
        if self.manifest is not None:
            return InputCount((), total=len(self.rows))
        return InputCount(self.inputs, self.recursive, share=self.shard.size)

    @contextlib.contextmanager
    def output_of(
        self, text: str | None, overwrite: bool
    ) -> Iterator[tuple[Path | None, Upload | None]]:
        """Yield the output file of this process, and what sends it to a remote place; None for a
        local file. See `output` and `remote_outputs.open_file`.

        Args:
            text: The file or URL that the user named; None for standard output.
            overwrite: Whether a remote file may exist.
        """
        if text is None or not is_remote(text):
            yield self.output(None if text is None else Path(text)), None
            return
        check = self.check_names if self.prefix else None
        with remote_outputs.open_file(text, overwrite, self.prefix, check) as found:
            yield found

    @property
    def prefix(self) -> str:
        """Begins the names of the files of this process: `shard-00003-of-00016-`, or ""."""
        return "" if self.shard.is_whole else f"{self.shard.name}-"

    def check_names(self, names: Iterable[str], folder: str) -> None:
        """Check the names of files in a remote folder; see `check_division_of`."""
        check_division_of(names, folder, self.shard)

    def output(self, path: Path | None) -> Path | None:
        """Return the output file of this process: `out/x.jsonl` -> `out/shard-0...-x.jsonl`.

        Raises:
            UsageError: The folder holds such files of a run with another number of shards.
        """
        if path is None or self.shard.is_whole:
            return path
        check_division(path.parent, self.shard, path.name)
        return path.with_name(f"{self.prefix}{path.name}")


def check_division(folder: Path, shard: Shard, ending: str = "") -> None:
    """Check that the shards in a folder are those of a run with the same number of shards. Others
    would hold the same inputs again.

    Args:
        folder: The folder; it may be missing.
        shard: The shard of this process.
        ending: End of the names of the files that count.

    Raises:
        UsageError: There are others.
    """
    if folder.is_dir():
        names = [path.name for path in folder.iterdir() if path.name.endswith(ending)]
        check_division_of(names, str(folder), shard)


def check_division_of(names: Iterable[str], folder: str, shard: Shard) -> None:
    """Check the names of files in a folder; see `check_division`."""
    for name in names:
        found = SHARD_FILE.fullmatch(name)
        if found and int(found[1]) != shard.count:
            raise UsageError(
                f"'{folder}/{name}' is of a run over {int(found[1])} shards, and this one has "
                f"{shard.count}",
                "write to another folder, or remove them",
            )
        if not shard.is_whole and WHOLE_FILE.fullmatch(name):
            raise UsageError(
                f"'{folder}/{name}' is of a run over all inputs, and this one has "
                f"{shard.count} shards",
                "write to another folder, or remove it",
            )


def _choose_shard(text: str | None) -> Shard:
    if text is not None:
        return parse_shard(text)
    shard = launched_shard(os.environ)
    if not shard.is_whole:
        print_message(
            f"shard {shard.index}/{shard.count}, by {shard.origin}; --shard none takes all inputs"
        )
    elif (tasks := find_unused_tasks(os.environ)) > 1:
        print_message(
            f"this job has {tasks} tasks, and one process takes all inputs; "
            "srun in front of hiera divides them"
        )
    return shard


def device_of(device: str, shard: Shard) -> str:
    """Return the device of this process. Where a launcher has started several processes on a
    machine, each takes a GPU of its own."""
    if shard.local_rank is None or device not in ("auto", "cuda"):
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{shard.local_rank % count}" if count > 1 else device
