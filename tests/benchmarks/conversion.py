"""Conversion of full-size models.

    python -m tests.benchmarks.conversion --round-trips [--forward]
    python -m tests.benchmarks.conversion --cost
    python -m tests.benchmarks.conversion --sizes

The first checks round trips of every model of the zoo. The second measures time and memory for the
largest model. The third compares rules of resampling position embeddings by their accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import hiera_core
from hiera_core import zoo
from hiera_core.conversion import converter
from hiera_core.weights import files
from tests.conftest import draw_weights

LARGEST = "hiera_huge_224"
TIME_CONVERSION = """
import json, os, shutil, sys, time
import torch, safetensors.torch
from hiera_core.benchmarking.timer import PeakMemory
from hiera_core.conversion.converter import convert
what, folder, dest = sys.argv[1:]
source = os.path.join(folder, "model.safetensors")

def copy(dest):
    shutil.copyfile(source, dest)
    with open(dest, "rb+") as file:
        os.fsync(file.fileno())

copy(dest + ".first")  # all runs reuse these pages: new ones cost a virtual machine more time
os.remove(dest + ".first")
memory = PeakMemory(torch.device("cpu"))
memory.start()
start = time.perf_counter()
copy(dest) if what == "copy" else convert(folder, dest, what)
print(json.dumps([time.perf_counter() - start, memory.peak() * 2**20]))
"""


def write_drawn_weights(name: str, path: Path) -> None:
    """Write random weights of a model, in the format that the reference's authors publish."""
    with torch.device("meta"):
        model = hiera_core.create_model(name)
    files.write_pickle(path, draw_weights(model.to_empty(device="cpu")).state_dict())


def round_trips(names: list[str], verify: str) -> None:
    """Convert hub -> FORMAT -> hub, and compare the result with the first hub folder."""
    for name in names:
        entry = zoo.get(name)
        targets = ["pth"]
        targets += ["timm"] * (entry.kind == "image" and not entry.autoencoder)
        # This autoencoder does not pool before its last stage, which transformers does not support.
        targets += ["transformers"] * (entry.kind == "image" and name != "mae_hiera_nano_32")
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_drawn_weights(name, root / "drawn.pth")
            converter.convert(str(root / "drawn.pth"), root / "hub", "hub", verify=verify)
            (root / "drawn.pth").unlink()
            first = load_file(root / "hub" / "model.safetensors")
            for target in targets:
                made = converter.convert(str(root / "hub"), root / target, target, verify=verify)
                if verify == "forward":
                    proof = made.proof
                    print(f"  {proof.reader}: {proof.what} within {proof.max_difference:.1e}")
                converter.convert(str(root / target), root / "back", "hub", overwrite=True)
                again = load_file(root / "back" / "model.safetensors")
                assert again.keys() == first.keys()
                assert all(torch.equal(again[key], first[key]) for key in first)
                for file in ("config.json", "hiera.json"):
                    one, two = ((root / f / file).read_text() for f in ("hub", "back"))
                    assert one == two, file
                del again
            print(
                f"{name}: {len(first)} tensors, hub -> {', '.join(targets)} -> hub exact",
                flush=True,
            )


def cost(rounds: int) -> None:
    """Print time and memory of converting Hiera-H, against a plain copy. They run alternately."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_drawn_weights(LARGEST, root / "drawn.pth")
        converter.convert(str(root / "drawn.pth"), root / "hub", "hub")
        (root / "drawn.pth").unlink()
        source = root / "hub" / "model.safetensors"
        size = source.stat().st_size
        targets = ("copy", "hub", "timm", "transformers", "pth")
        measured: dict[str, list[list[float]]] = {target: [] for target in targets}
        for _ in range(rounds):
            for what, results in measured.items():
                dest = root / "dest"
                done = subprocess.run(
                    [sys.executable, "-c", TIME_CONVERSION, what, source.parent, dest],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                results.append(json.loads(done.stdout))
                subprocess.run(["rm", "-r", dest], check=True)
        copy = statistics.median(seconds for seconds, _ in measured["copy"])
        print(f"{LARGEST}: {size / 1e9:.2f} GB; a plain copy (with fsync) takes {copy:.1f} s")
        for what, results in measured.items():
            seconds = statistics.median(r[0] for r in results)
            peak = max(r[1] for r in results)
            print(
                f"{what}: {seconds:.1f} s = {seconds / copy:.2f}x, peak {peak / size:.2f}x the file"
            )


def sizes() -> None:
    """Print the accuracy on enlarged digits by resampling rule, without training at that size."""
    from hiera_core.data import datasets
    from hiera_core.inference.evaluate import evaluate_dataset
    from hiera_core.inference.predict import Predictor

    print("size  absolute-window  bicubic")
    for side in (32, 48, 64):
        found = []
        for rule in ("absolute-window", "bicubic"):
            model = hiera_core.create_model(
                "hiera_nano_32", pretrained=True, input_size=(side, side), resample=rule
            )
            predictor = Predictor(model, dtype="fp32")
            samples = datasets.remap_labels(
                datasets.open_eval_data("digits"), model.card["classes"], 10
            )
            found.append(evaluate_dataset(samples, predictor).top1)
        print(f"{side:4}  {found[0]:14.2f}%  {found[1]:6.2f}%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round-trips", action="store_true")
    parser.add_argument(
        "--forward",
        action="store_true",
        help="with --round-trips: also compare outputs in the other libraries",
    )
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--models", nargs="*", help="with --round-trips: models (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.round_trips:
        verify = "forward" if arguments.forward else "auto"
        round_trips(arguments.models or zoo.names(), verify)
    if arguments.cost:
        cost(arguments.rounds)
    if arguments.sizes:
        sizes()


if __name__ == "__main__":
    main()
