"""A data set of 14 million samples: indexed once, opened at once, and small in every worker.

    pytest -m slow tests/campaigns/test_large_index.py

It writes a list of 600 MB and takes some minutes. `HIERA_SAMPLES` is another number of samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SAMPLES = int(os.environ.get("HIERA_SAMPLES", "14000000"))
CLASSES = 21_841  # of ImageNet-21k
WORKERS = 2
OPEN_S = 5.0
WORKER_BYTES = 200e6  # beyond a worker that has no data set
pytestmark = pytest.mark.slow

# Run in processes of their own, whose memory nothing else has shaped.
OPEN = """
import sys, time
from hiera_core.data import datasets
begin = time.perf_counter()
samples = datasets.open_dataset(sys.argv[1])
print(len(samples), samples.num_classes, time.perf_counter() - begin)
"""
LOAD = """
import json, sys, time
import numpy as np, psutil, torch
from torch.utils.data import DataLoader
from hiera_core.data import datasets
from hiera_core.training import dataloader

class Names(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples
    def __getitem__(self, number):
        if self.samples is None:
            return 0
        source, label = self.samples.sources[number], int(self.samples.labels[number])
        assert label == int(source.path.name[:-4].rpartition("_")[2]) % CLASSES
        return label

def memory(data, count):
    order = np.random.default_rng(0).permutation(count)[: READ]
    loader = DataLoader(Names(data), batch_size=1000, sampler=order.tolist(), num_workers=WORKERS)
    found = []
    for number, _ in enumerate(loader):
        if number in (READ // 1000 // 2, READ // 1000 - 10):
            for process in psutil.Process().children():
                info = process.memory_full_info()
                found.append((info.uss, info.pss))
    return [max(values) for values in zip(*found)]

CLASSES, READ, WORKERS = map(int, sys.argv[2:5])
splits = datasets.open_splits(sys.argv[1], float(sys.argv[5]) or None)
begin = memory(None, len(splits.train))
print(json.dumps({"without": begin, "with": memory(splits.train, len(splits.train))}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("large")
    root = Path(__file__).parents[2]
    return {**os.environ, "HIERA_INDEX_FOLDER": str(folder / "indices"), "PYTHONPATH": str(root)}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "imagenet21k.csv"
    with path.open("w") as file:
        file.write("path,label\n")
        for number in range(SAMPLES):
            label = number % CLASSES
            file.write(f"train/n{label:08}/n{label:08}_{number}.jpg,{label}\n")
    return path


def run(script: str, environment: dict[str, str], *arguments: object) -> str:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    found = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_it_is_built_once_and_opened_at_once(listed: Path, environment: dict[str, str]) -> None:
    begin = time.perf_counter()
    assert run(OPEN, environment, listed).split()[:2] == [str(SAMPLES), str(CLASSES)]
    print(f"built in {time.perf_counter() - begin:.0f} s")
    count, _, seconds = run(OPEN, environment, listed).split()
    print(f"opened in {float(seconds):.2f} s")
    assert int(count) == SAMPLES and float(seconds) < OPEN_S


@pytest.mark.parametrize("share", [0, 0.1])
def test_workers_are_small(listed: Path, environment: dict[str, str], share: float) -> None:
    """By PSS, which divides shared pages among the processes that share them, and by USS, which
    counts only pages of a process alone. Also with a share held out, which needs a list of rows."""
    pytest.importorskip("psutil")
    read = min(SAMPLES // 2, 1_000_000)
    found = json.loads(run(LOAD, environment, listed, CLASSES, read, WORKERS, share))
    for name, before, after in zip(("uss", "pss"), found["without"], found["with"], strict=True):
        print(f"{name}: {before / 1e6:.0f} MB without data, {after / 1e6:.0f} MB with it")
        assert after - before < WORKER_BYTES, name
