"""Campaigns of scale: memory that does not grow, long listings, and the speed of Ray's engine.

pytest -m slow tests/campaigns/test_scale_limits.py -n 0 -s
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ..test_row_runs import SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MIB = 1 << 20
LISTED = int(os.environ.get("HIERA_LISTED", "100_000_000"))
LINE = "s3://bucket/pictures/0123/012345678.jpg"
PLAN = """
import re, sys, time
from pathlib import Path
from hiera_core.data.division.manifest import Manifest
from hiera_core.data.division.shards import parse_shard
start = time.monotonic()
manifest = Manifest(Path(sys.argv[1]))
rows = parse_shard("999/1000").rows(len(manifest))
seconds = time.monotonic() - start
first = next(manifest.read(rows))
status = Path("/proc/self/status").read_text()  # ru_maxrss also counts the parent process
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) >> 10
print(len(manifest), first.position, f"{seconds:.1f}", peak)
"""


def manifest(folder: Path, count: int) -> Path:
    """Return a list of pictures."""
    names = ("eight", "three", "five")
    path = folder / f"{count}.txt"
    path.write_text("".join(f"{SAMPLES}/{names[n % 3]}.png\n" for n in range(count)))
    return path


def run(
    path: Path, rows: Path, *options: object, model: str = "hiera_nano_32"
) -> tuple[str, dict[str, int]]:
    """Return the messages of a run, and the peak of memory of each kind of process in bytes,
    without what they share."""
    import psutil

    given = ("features", "--manifest", path, "-m", model, "--dtype", "fp32", "--rows", rows)
    line = [sys.executable, "-m", "hiera_cli", *map(str, given), *map(str, options)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}

    def note(name: str, one: psutil.Process) -> None:
        peaks[name] = max(peaks.get(name, 0), one.memory_full_info().uss)

    def watch() -> None:
        while process.poll() is None:
            try:
                driver = psutil.Process(process.pid)
                note("driver", driver)
                for child in driver.children(recursive=True):
                    if "MapWorker" in " ".join(child.cmdline()[:1]):
                        note("worker", child)
            except psutil.Error:  # a process has ended meanwhile
                pass
            time.sleep(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    _, err = process.communicate()
    thread.join()
    assert process.returncode == 0, err[-3000:]
    return err, peaks


@pytest.mark.parametrize("engine", [(), ("--engine", "ray", "-j", 2)], ids=["local", "ray"])
def test_memory_does_not_grow(engine: tuple[object, ...], tmp_path: Path) -> None:
    peaks = {}
    for count in (2000, 20_000):
        size = ("--shard-size", 1000)  # a file that is not full would be smaller in the first run
        _, peaks[count] = run(manifest(tmp_path, count), tmp_path / f"{count}", *engine, *size)
    print(
        {count: {k: f"{v / MIB:.0f} MiB" for k, v in one.items()} for count, one in peaks.items()}
    )
    for name, peak in peaks[20_000].items():
        assert peak < peaks[2000][name] + 100 * MIB, name


@pytest.mark.parametrize("model", ["hiera_nano_32", "hiera_small_224"])
def test_speed_of_ray(model: str, tmp_path: Path) -> None:
    """Print the inputs per second of both engines once they are warm: from two numbers of inputs,
    so that what does not grow with them is left out."""
    counts = (2000, 8000) if model == "hiera_nano_32" else (200, 1000)
    options = () if model == "hiera_nano_32" else ("--random-init",)
    for name, engine in (("local", ()), ("ray", ("--engine", "ray", "-j", 2))):
        seconds = []
        for count in counts:
            start = time.monotonic()
            rows = tmp_path / f"{name}-{count}"
            err, _ = run(manifest(tmp_path, count), rows, *engine, *options, model=model)
            found = re.search(r"inputs in ([\d.]+) s", err)
            seconds.append(float(found[1]) if found else time.monotonic() - start)
        rate = (counts[1] - counts[0]) / (seconds[1] - seconds[0])
        print(f"{model} {name}: {rate:.1f}/s; {counts} inputs take {seconds} s")


@pytest.mark.parametrize("ending", ["txt", "csv", "quoted.csv"])
def test_a_long_listing_is_planned(ending: str, tmp_path: Path) -> None:
    line, header = {"txt": (LINE, ""), "csv": (f"{LINE},7", "path,id\n")}.get(
        ending, (f'"{LINE}",7', "path,id\n")
    )
    path, block = tmp_path / f"long.{ending}", f"{line}\n" * 10_000
    with path.open("w") as file:
        file.write(header)
        for _ in range(LISTED // 10_000):
            file.write(block)
    done = subprocess.run([sys.executable, "-c", PLAN, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, position, seconds, peak = done.stdout.split()
    assert (int(total), int(position)) == (LISTED, LISTED * 999 // 1000)
    print(f"{ending}: {total} rows are planned in {seconds} s, with {peak} MiB")
    assert int(peak) < 1024
