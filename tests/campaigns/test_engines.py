"""Campaigns past one process: every engine gives the same rows, also when it is killed.

pytest -m slow tests/campaigns/test_engines.py -n 0 -s
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ..test_row_runs import SAMPLES, read_rows, same

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KILLS = int(os.environ.get("HIERA_KILLS", "20"))
PICTURES, DAMAGED = 2000, 50  # each 50th picture is damaged: 40
CLIPS, DAMAGED_CLIPS = 200, 40  # 5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = ("eight", "three", "five")
    for number in range(PICTURES):
        content = (SAMPLES / f"{names[number % 3]}.png").read_bytes()
        damaged = content[: len(content) // 2] if number % DAMAGED == 11 else content
        (folder / f"{number:05}.png").write_bytes(damaged)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    content = (SAMPLES / "moving_right.mp4").read_bytes()
    for number in range(CLIPS):
        damaged = content[: len(content) // 2] if number % DAMAGED_CLIPS == 11 else content
        (folder / f"{number:05}.mp4").write_bytes(damaged)
    return folder


def command(inputs: Path, rows: Path, *options: object, model: str = "hiera_nano_32") -> list[str]:
    given = ("predict", inputs, "-m", model, "--dtype", "fp32", "-q", "--rows", rows, *options)
    return ["hiera_cli", *map(str, given)]


def in_small_files(inputs: Path, rows: Path, *options: object) -> list[str]:
    """Return a command that writes a file of rows every 100 inputs, so that kills come between."""
    given = ("features", inputs, "-m", "hiera_nano_32", "--dtype", "fp32", "-q", "--rows", rows)
    return ["hiera_cli", *map(str, (*given, "--shard-size", 100, *options))]


def run(arguments: list[str], launcher: list[str] | None = None, codes: tuple[int, ...] = (0, 1)):
    start = [*(launcher or [sys.executable, "-m"]), *arguments]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode in codes, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "kind, model", [("pictures", "hiera_nano_32"), ("clips", "hiera_nano_8x32")]
)
def test_engines_give_the_same_rows(
    kind: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    inputs: Path = request.getfixturevalue(kind)
    seconds: dict[str, float] = {}

    def timed(name: str, *calls: tuple[list[str], list[str] | None]) -> list[dict[str, Any]]:
        start = time.monotonic()
        for arguments, launcher in calls:
            run(arguments, launcher)
        seconds[name] = time.monotonic() - start
        return read_rows(tmp_path / name)

    def line(name: str, *options: object) -> list[str]:
        return command(inputs, tmp_path / name, *options, model=model)

    local = timed("local", (line("local"), None))
    expected = {"pictures": (2000, 40), "clips": (200, 5)}[kind]
    assert (len(local), sum(row["status"] == "error" for row in local)) == expected
    shards = timed("shards", *((line("shards", "--shard", f"{i}/3"), None) for i in range(3)))
    assert same(shards, local)
    # torchrun takes the exit code 1 of a process (some inputs failed) for its own.
    assert same(timed("torchrun", (line("torchrun"), TORCHRUN)), local)
    assert same(timed("ray", (line("ray", "--engine", "ray", "-j", 2), None)), local)
    print(kind, {name: f"{value:.1f} s" for name, value in seconds.items()})


def finish(arguments: list[str], kills: int, rows: Path) -> int:
    """Run a command, kill it at random several times, and let it finish. Return the kills. Three
    of four come when some files are written by this process, the others at any time."""
    done = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--resume"], stderr=subprocess.PIPE
        )
        if done < kills:
            before = len(list(rows.glob("*part-*")))
            is_early = random.random() < 0.25
            deadline = time.monotonic() + (random.uniform(2, 40) if is_early else 600)
            while process.poll() is None and time.monotonic() < deadline:
                if not is_early and len(list(rows.glob("*part-*"))) > before:
                    is_early = True
                    deadline = time.monotonic() + random.uniform(0, 1)
                time.sleep(0.02)
            if process.poll() is None:
                process.kill()
                process.communicate()
                done += 1
                continue
        _, err = process.communicate()
        assert process.returncode in (0, 1), err[-3000:]
        return done


@pytest.mark.parametrize("options", [(), ("--engine", "ray", "-j", "2")], ids=["shard", "driver"])
def test_killed_processes_lose_nothing(
    options: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    run(in_small_files(pictures, whole))
    shard = () if options else ("--shard", "1/2")
    kills = 0
    while kills < KILLS:
        rows = tmp_path / "rows"
        shutil.rmtree(rows, ignore_errors=True)
        kills += finish(in_small_files(pictures, rows, *options, *shard), KILLS - kills, rows)
        found = read_rows(rows)
        wanted = [row for row in read_rows(whole) if options or row["index"] % 2]
        assert same(found, wanted)
    print(f"killed {kills} times: nothing is missing, nothing is doubled")


def test_killed_workers_of_ray_lose_nothing(pictures: Path, tmp_path: Path) -> None:
    import psutil

    whole, rows = tmp_path / "whole", tmp_path / "rows"
    run(in_small_files(pictures, whole))
    kills = 0
    while kills < KILLS:
        shutil.rmtree(rows, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-m", *in_small_files(pictures, rows, "--engine", "ray", "-j", "2")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        stop = threading.Event()

        def kill_some(process: Any = process, stop: Any = stop) -> None:
            nonlocal kills
            while not stop.wait(random.uniform(0.5, 3)) and kills < KILLS:
                children = psutil.Process(process.pid).children(recursive=True)
                workers = [c for c in children if "ray::" in " ".join(c.cmdline()[:1])]
                busy = [w for w in workers if "Map" in w.cmdline()[0]]
                if busy:
                    os.kill(random.choice(busy).pid, signal.SIGKILL)
                    kills += 1

        thread = threading.Thread(target=kill_some)
        thread.start()
        out, err = process.communicate()
        stop.set()
        thread.join()
        assert process.returncode == 1, err[-3000:]
        assert out == b"", out[-3000:]
        assert same(read_rows(rows), read_rows(whole))
    print(f"killed {kills} workers: nothing is missing, nothing is doubled")
