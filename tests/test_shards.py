"""Tests of shards: every input is in one of them, and launchers are not mistaken."""

from __future__ import annotations

import pytest

from hiera_core.data.division.shards import Shard, launched_shard, parse_shard, unused_tasks
from hiera_core.data.sources import Source
from hiera_core.errors import UsageError


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("total", [0, 1, 13, 14])
def test_shards_hold_every_input_once(count: int, total: int) -> None:
    inputs = [Source(str(number)) for number in range(total)]
    shards = [Shard(index, count) for index in range(count)]
    taken = [list(shard.take(inputs)) for shard in shards]
    together = sorted((s for part in taken for s in part), key=lambda s: s.position or 0)
    assert [(s.name, s.position) for s in together] == [(str(n), n) for n in range(total)]
    assert [len(part) for part in taken] == [shard.size(total) for shard in shards]
    rows = [row for shard in shards for row in shard.rows(total)]
    assert rows == list(range(total))
    lengths = [len(shard.rows(total)) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


def test_texts_name_shards() -> None:
    assert parse_shard("3/16") == Shard(3, 16) and Shard(3, 16).name == "shard-00003-of-00016"
    assert parse_shard("none").is_whole


@pytest.mark.parametrize(
    "text, part",
    [
        ("16/16", "counted from 0: 0/16 to 15/16"),
        ("1", "write i/n"),
        ("-1/2", "write i/n"),
        ("0/0", "0 shards"),
        ("0/99999999", "give from 1 to"),
    ],
)
def test_other_texts_are_refused(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_shard(text)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
STEP = {**SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    "environment, index, count, tasks",
    [
        ({}, 0, 1, 1),
        (TORCHRUN, 5, 8, 1),
        ({"RANK": "5", "WORLD_SIZE": "8"}, 0, 1, 1),  # left from something else
        (STEP, 3, 16, 1),
        (SCRIPT, 0, 1, 16),  # a batch script is one process, whatever the job has
        ({**SCRIPT, "SLURM_NTASKS": "1"}, 0, 1, 1),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 0, 1, 1),  # srun --pty bash
        ({**STEP, **TORCHRUN}, 5, 8, 1),  # srun torchrun
        ({**SCRIPT, **TORCHRUN}, 5, 8, 1),
    ],
)
def test_launchers_choose_the_shard(
    environment: dict[str, str], index: int, count: int, tasks: int
) -> None:
    shard = launched_shard(environment)
    assert (shard.index, shard.count) == (index, count)
    assert unused_tasks(environment) == tasks


def test_variables_that_contradict_are_an_error() -> None:
    with pytest.raises(UsageError, match="RANK is 8 and WORLD_SIZE is 8"):
        launched_shard({**TORCHRUN, "RANK": "8"})
