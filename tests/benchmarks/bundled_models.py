"""Train the bundled models by their recipes, and measure what pre-training gains.

    python -m tests.benchmarks.bundled_models             on the digits: time and accuracy
    python -m tests.benchmarks.bundled_models --video     the same on the moving shapes
    python -m tests.benchmarks.bundled_models --seeds 5   digits, with and without pre-training
    python -m tests.benchmarks.bundled_models --ship      also put them into the package

Accuracy is that of `hiera eval` on the fixed fifth that is held out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hiera_core.data import toy_datasets, video_writer
from hiera_core.data.datasets import open_eval_data
from hiera_core.weights import files
from hiera_core.zoo import ASSETS, get

MODELS = {"digits": "hiera_nano_32", "shapes": "hiera_nano_8x32"}


def hiera(*arguments: object, threads: int | None = None) -> str:
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "hiera_cli", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout


def accuracy(data: str, folder: Path) -> float:
    found = json.loads(hiera("eval", data, "--checkpoint", folder, "-f", "json", "-q"))
    return float(found["top1"])


def both_stages(data: str, folder: Path, ship: bool) -> None:
    name = MODELS[data]
    began = time.monotonic()
    hiera("train", f"mae_{name}", data, "-o", folder / "mae", "-q")
    hiera("train", name, data, "-o", folder / "ft", "--init-from", folder / "mae", "-q")
    minutes = (time.monotonic() - began) / 60
    print(f"{data}: top-1 {accuracy(data, folder / 'ft'):.2f}% in {minutes:.1f} minutes")
    if ship:
        for model, run in ((f"mae_{name}", "mae"), (name, "ft")):
            put_into_the_box(folder / run / "model.safetensors", model)
        (ship_clip if data == "shapes" else ship_digits)()


def put_into_the_box(weights: Path, model: str) -> None:
    """In half precision: all four stay below 4 MB."""
    target = next(iter(get(model).checkpoints.values())).bundled_path
    assert target is not None
    state = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    files.write_safetensors(target, state)
    print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB")


def ship_digits() -> None:
    """The first three, five and eight of what is held out, each named for what it shows."""
    held = open_eval_data("digits")
    assert held.labels is not None
    for name in ("three", "five", "eight"):
        first = held.labels.tolist().index(toy_datasets.DIGITS.index(name))
        keep_sample(f"{name}.png", held.sources[first].content())


def ship_clip() -> None:
    """A new clip, at twice the size."""
    frames = toy_datasets.draw_clip(0, np.random.default_rng(2026), side=96)
    keep_sample(
        f"{toy_datasets.DIRECTIONS[0].replace(' ', '_')}.mp4",
        video_writer.encode(frames, toy_datasets.RATE),
    )


def keep_sample(name: str, content: Path | bytes) -> None:
    assert isinstance(content, bytes)
    folder = ASSETS / "samples"
    (folder / name).write_bytes(content)


def by_seed(seeds: int, folder: Path, jobs: int) -> None:
    """The pre-trained weights are the same for all seeds; what follows is not."""
    name = MODELS["digits"]
    hiera("train", f"mae_{name}", "digits", "-o", folder / "mae", "-q")

    def one(job: tuple[int, bool]) -> float:
        seed, pretrained = job
        run = folder / f"{seed}-{pretrained}"
        more = ["--init-from", folder / "mae"] if pretrained else []
        hiera(
            *("train", name, "digits", "-o", run, "-q", "-j", "1", "--set", f"seed={seed}", *more),
            threads=1,
        )
        return accuracy("digits", run)

    work = [(seed, pretrained) for seed in range(seeds) for pretrained in (True, False)]
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(work, pool.map(one, work), strict=True))
    for pretrained in (True, False):
        values = [found[seed, pretrained] for seed in range(seeds)]
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        label = "with pre-training" if pretrained else "without"
        listed = " ".join(f"{v:.2f}" for v in values)
        print(f"{label}: mean {statistics.mean(values):.2f}%, std {spread:.2f} ({listed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with --seeds")
    parser.add_argument("--ship", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        if arguments.seeds:
            by_seed(arguments.seeds, folder, arguments.jobs)
        else:
            both_stages("shapes" if arguments.video else "digits", folder, arguments.ship)


if __name__ == "__main__":
    main()
