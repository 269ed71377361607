"""Read a folder of odd pictures and videos, and check every result.

    python -m tests.campaigns.corpus FOLDER... [--variants N]

The folders may hold any files: those that are no pictures or videos are left out. With
`--variants`, N damaged copies of each video are checked as well. `hiera predict` runs over all
files once, and has to print each input once and in order, without a traceback, in less than
MAX_MEMORY. Then every file is compared with what Pillow and PyAV alone read from it (see
`oracles.py`), in a process with limits of time and memory. The command prints how many files had
which result, and exits with 1 if one of them is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hiera_core.data.media_types import ENDINGS, SIGNATURE_BYTES, VIDEO_ENDINGS, sniff_kind

MAX_VARIANT_BYTES = 4_000_000  # larger videos get no damaged copies
MAX_MEMORY = 1.5 * 2**30  # bytes
SECONDS_PER_FILE = 300  # generous, for busy machines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--variants", type=int, default=0, help="damaged copies of each video")
    options = parser.parse_args()
    kinds = {path: kind for folder in options.folders for path, kind in find_media(folder)}
    with tempfile.TemporaryDirectory() as folder:
        videos = [path for path, kind in kinds.items() if kind == "video"]
        variants = damaged_copies(videos, Path(folder), options.variants)
        return run(kinds | dict.fromkeys(variants, "video"))


def run(kinds: dict[Path, str]) -> int:
    """Check all files, print the counts, and return the exit code."""
    counts = collections.Counter(kinds.values())
    print(f"{counts['image']} pictures, {counts['video']} videos")
    problems = check_command(list(kinds))
    verdicts = dict(compare(list(kinds)))
    for kind in ("image", "video"):
        print_counts(kind, [verdicts[path] for path in kinds if kinds[path] == kind])
    wrong = [
        f"{path}: {verdict['wrong']}" for path, verdict in verdicts.items() if verdict["wrong"]
    ]
    problems += wrong
    print(f"{len(problems)} problems")
    for problem in problems:
        print(" ", problem.encode(errors="replace").decode())
    return 1 if problems else 0


def find_media(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield pictures and videos by their first bytes, and files that are named as if they were."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        with path.open("rb") as file:
            kind = sniff_kind(file.read(SIGNATURE_BYTES))
        ending = path.suffix.lower()
        if kind is not None or ending in ENDINGS:
            yield path, kind or ("video" if ending in VIDEO_ENDINGS else "image")


def damaged_copies(paths: list[Path], folder: Path, count: int) -> Iterator[Path]:
    """Write copies of each video that are cut off, or have flipped bits."""
    random = np.random.default_rng(0)
    for number, path in enumerate(paths):
        content = np.fromfile(path, np.uint8)
        for variant in range(count if 1000 < len(content) < MAX_VARIANT_BYTES else 0):
            copy = content.copy()
            if variant % 2:
                where = random.integers(0, len(copy), 1 + len(copy) // 50_000)
                copy[where] ^= np.uint8(1) << random.integers(0, 8, len(where)).astype(np.uint8)
            else:
                copy = copy[: random.integers(len(copy) // 4, len(copy))]
            target = folder / f"{number}-{variant}{path.suffix}"
            copy.tofile(target)
            yield target


def check_command(paths: list[Path]) -> list[str]:
    """Run `hiera predict` over all files. -> what is wrong with its output"""
    with tempfile.TemporaryDirectory() as folder:
        listing, results = Path(folder, "files.txt"), Path(folder, "results.jsonl")
        listing.write_bytes(b"\n".join(os.fsencode(path) for path in paths))
        command = ["predict", f"@{listing}", "-m", "hiera_nano_32", "--every", "1", "-f", "jsonl"]
        with results.open("wb") as stdout, Path(folder, "errors.txt").open("w+b") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "hiera_cli", *command], stdout=stdout, stderr=stderr
            )
            _, status, usage = os.wait4(process.pid, 0)
            stderr.seek(0)
            messages = stderr.read().decode(errors="surrogateescape")
        records = [json.loads(line) for line in results.read_bytes().splitlines()]
    problems = []
    if [os.fsencode(record["input"]) for record in records] != [os.fsencode(p) for p in paths]:
        problems.append(f"{len(records)} records, not one for each of {len(paths)} inputs in order")
    foreign = [line for line in messages.splitlines() if not line.startswith("hiera: ")]
    if foreign:
        problems.append(f"{len(foreign)} lines on stderr are not ours, the first: {foreign[0]}")
    peak = usage.ru_maxrss * 1024
    if peak > MAX_MEMORY:
        problems.append(f"peak memory {peak / 2**30:.2f} GiB")
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        problems.append(f"exit code {code}")
    print(f"hiera predict: exit code {code}, peak memory {peak / 2**20:.0f} MiB")
    return problems


def compare(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the verdict of the oracles on each file. A file that ends or hangs the process is
    wrong, and the next one gets a new process."""
    process = None
    for path in paths:
        if process is None:
            command = [sys.executable, "-m", "tests.campaigns.oracles"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS_PER_FILE, process.kill)
        timer.start()
        process.stdin.write(os.fsencode(path.resolve()) + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            yield path, json.loads(line)
        else:
            code, process = process.wait(), None
            yield path, {"status": "error", "reason": "", "wrong": f"ended with code {code}"}
    if process is not None:
        process.communicate()


def print_counts(kind: str, verdicts: list[dict[str, Any]]) -> None:
    """Print how many files of a kind had which result. Numbers within reasons become N."""
    reasons = collections.Counter(
        re.sub(r"\d+", "N", v["reason"]) if v["status"] == "error" else "ok" for v in verdicts
    )
    for reason, count in reasons.most_common():
        print(f"{kind:6}{count:7}  {reason[:80].encode(errors='replace').decode()}")


if __name__ == "__main__":
    sys.exit(main())
