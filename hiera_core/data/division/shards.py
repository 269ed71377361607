"""Shards: the part of all inputs that one of several processes takes.

The processes do not talk to one another. Each sees the same inputs in the same order, and takes
every n-th of them, or, of a manifest, a contiguous part of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ...errors import UsageError
from ..sources import Source

MAX_SHARDS = 1_000_000
PATTERN = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
# Files in a folder of results: of a shard, and of a run that took all inputs.
WHOLE_FILE = re.compile(
    r"(image|video|part)-\d{5,}(-[0-9a-f]{8})?(-retry\d+)?\.(safetensors|npz|parquet)"
)
SHARD_FILE = re.compile(r"shard-\d{5,}-of-(\d{5,})-.+")
# Variables of launchers: rank, number of processes, rank on this machine, and one that only this
# launcher sets. RANK and WORLD_SIZE alone may be left from something else.
TORCHRUN_NAME = "torchrun"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# srun sets the first two for each of its tasks. Within a batch script, SLURM_PROCID is 0 and
# SLURM_NTASKS is the number of tasks of the job, but this is the only process: no step has begun.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the inputs.

    Args:
        index: Its number, from 0.
        count: Number of parts.
        origin: What chose it, for messages.
        local_rank: Number of this process on its machine, from 0, if a launcher says so.
    """

    index: int = 0
    count: int = 1
    origin: str = "--shard"
    local_rank: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this part is all of the inputs."""
        return self.count == 1

    @property
    def name(self) -> str:
        """`shard-00003-of-00016`, which begins the names of its files."""
        return f"shard-{self.index:05}-of-{self.count:05}"

    @property
    def is_of_torchrun(self) -> bool:
        """Whether torchrun has started this process, and others beside it."""
        return self.origin.startswith(TORCHRUN_NAME)

    def take(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yield every `count`-th input, with its position among all of them."""
        for position, source in enumerate(sources):
            if position % self.count == self.index:
                yield replace(source, position=position)

    def size(self, total: int) -> int:
        """Return how many of `total` inputs `take` yields."""
        return max(0, -(-(total - self.index) // self.count))

    def rows(self, total: int) -> range:
        """Return the part of the rows of a manifest: contiguous, and as long as any other, or one
        row longer."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


def parse_shard(text: str) -> Shard:
    """Return the shard that a text names: `3/16`, or `none` for all inputs.

    Raises:
        UsageError: It is another text, or there is no such shard.
    """
    if text == "none":
        return Shard()
    found = PATTERN.fullmatch(text)
    if found is None:
        raise UsageError(f"--shard {text!r} is no shard", "write i/n, such as 0/16, or none")
    index, count = int(found[1]), int(found[2])
    if not 0 < count <= MAX_SHARDS:
        raise UsageError(f"--shard {text}: {count} shards", f"give from 1 to {MAX_SHARDS}")
    if index >= count:
        raise UsageError(
            f"--shard {text}: there is no shard {index}",
            f"they are counted from 0: 0/{count} to {count - 1}/{count}",
        )
    return Shard(index, count)


def launched_shard(environment: Mapping[str, str]) -> Shard:
    """Return the shard of this process by the variables of torchrun or of SLURM's srun; all inputs
    if neither has started it.

    torchrun comes first, because srun may have started it.

    Raises:
        UsageError: The variables contradict one another.
    """
    shard = _by(environment, TORCHRUN, TORCHRUN_NAME)
    if shard is None and environment.get("SLURM_STEP_ID", "").isdecimal():
        shard = _by(environment, SLURM, "srun")
    return shard or Shard()


def unused_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of a SLURM job whose batch script runs this process itself, not
    through srun, so that one process has all inputs; 1 if that is as it should be."""
    tasks = environment.get("SLURM_NTASKS", "1")
    is_script = "SLURM_JOB_ID" in environment and SLURM[1] not in environment
    is_alone = _by(environment, TORCHRUN, TORCHRUN_NAME) is None
    return int(tasks) if is_script and is_alone and tasks.isdecimal() else 1


def _by(environment: Mapping[str, str], names: tuple[str, str, str], launcher: str) -> Shard | None:
    """Return the shard that a launcher's variables name; None if one is missing."""
    texts = [environment.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts):
        return None
    rank, size, local = map(int, texts)
    if rank >= size:
        raise UsageError(
            f"{names[0]} is {rank} and {names[1]} is {size}", "start it again, or give --shard"
        )
    return Shard(rank, size, f"{launcher} ({names[0]}, {names[1]})", local)
