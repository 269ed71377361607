"""Train the bundled models with their recipes, and measure the gain of pre-training.

    python -m tests.benchmarks.bundled_models             on the digits: time and accuracy
    python -m tests.benchmarks.bundled_models --video     the same on the moving shapes
    python -m tests.benchmarks.bundled_models --seeds 5   digits, with and without pre-training
    python -m tests.benchmarks.bundled_models --ship      also put them into the package

The accuracy is that of `hiera eval` on the held-out fifth of the data.
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

from hiera_core.data import toy_datasets
from hiera_core.data.datasets import open_eval_data
from hiera_core.data.video_files import video_writer
from hiera_core.weights import files
from hiera_core.zoo import ASSETS, get

MODELS = {"digits": "hiera_nano_32", "shapes": "hiera_nano_8x32"}


def hiera(*arguments: object, threads: int | None = None) -> str:
    """Run a command line, and return its standard output."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "hiera_cli", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout


def accuracy(data: str, folder: Path) -> float:
    found = json.loads(hiera("eval", data, "--checkpoint", folder, "-f", "json", "-q"))
    return float(found["top1"])


def train_both_stages(data: str, folder: Path, ship: bool) -> None:
    """Pre-train and fine-tune a bundled model. Print the time and the accuracy."""
    name = MODELS[data]
    start = time.monotonic()
    hiera("train", f"mae_{name}", data, "-o", folder / "mae", "-q")
    hiera("train", name, data, "-o", folder / "ft", "--init-from", folder / "mae", "-q")
    minutes = (time.monotonic() - start) / 60
    print(f"{data}: top-1 {accuracy(data, folder / 'ft'):.2f}% in {minutes:.1f} minutes")
    if ship:
        for model, run in ((f"mae_{name}", "mae"), (name, "ft")):
            save_asset(folder / run / "model.safetensors", model)
        (save_sample_clip if data == "shapes" else save_sample_digits)()


def save_asset(weights: Path, model: str) -> None:
    """Save weights in the package, in half precision. All four files stay below 4 MB."""
    target = next(iter(get(model).checkpoints.values())).bundled_path
    assert target is not None
    state = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    files.write_safetensors(target, state)
    print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB")


def save_sample_digits() -> None:
    """Save the first held-out three, five and eight, each under the name of its class."""
    held = open_eval_data("digits")
    assert held.labels is not None
    for name in ("three", "five", "eight"):
        first = held.labels.tolist().index(toy_datasets.DIGITS.index(name))
        save_sample(f"{name}.png", held.sources[first].content())


def save_sample_clip() -> None:
    """Save a new clip, at twice the size."""
    frames = toy_datasets.draw_clip(0, np.random.default_rng(2026), side=96)
    name = toy_datasets.DIRECTIONS[0].replace(" ", "_")
    save_sample(f"{name}.mp4", video_writer.encode(frames, toy_datasets.RATE))


def save_sample(name: str, content: Path | bytes) -> None:
    assert isinstance(content, bytes)
    folder = ASSETS / "samples"
    (folder / name).write_bytes(content)


def compare_seeds(seeds: int, folder: Path, jobs: int) -> None:
    """Fine-tune with several seeds, from the same pre-trained weights and from scratch."""
    name = MODELS["digits"]
    hiera("train", f"mae_{name}", "digits", "-o", folder / "mae", "-q")

    def fine_tune(job: tuple[int, bool]) -> float:
        seed, pretrained = job
        run = folder / f"{seed}-{pretrained}"
        init_from = ["--init-from", folder / "mae"] if pretrained else []
        options = ["-o", run, "-q", "-j", "1", "--set", f"seed={seed}", *init_from]
        hiera("train", name, "digits", *options, threads=1)
        return accuracy("digits", run)

    all_jobs = [(seed, pretrained) for seed in range(seeds) for pretrained in (True, False)]
    with ThreadPoolExecutor(jobs) as pool:
        accuracies = dict(zip(all_jobs, pool.map(fine_tune, all_jobs), strict=True))
    for pretrained in (True, False):
        values = [accuracies[seed, pretrained] for seed in range(seeds)]
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
            compare_seeds(arguments.seeds, folder, arguments.jobs)
        else:
            train_both_stages("shapes" if arguments.video else "digits", folder, arguments.ship)


if __name__ == "__main__":
    main()
