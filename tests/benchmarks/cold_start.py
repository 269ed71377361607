"""Time from start-up to the classes of one picture, against a short script with the reference.

    python -m tests.benchmarks.cold_start [--model hiera_large_224] [--runs 5]

Both read the same picture and the same checkpoint (random weights, in the format that the
reference's authors publish). They run alternately, each in a new process. Prints medians and their
ratio.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WRITE = """
import sys, torch, hiera, skimage.data
from PIL import Image
model, folder = sys.argv[1:]
torch.manual_seed(0)
torch.save({"model_state": getattr(hiera, model)().state_dict()}, folder + "/weights.pth")
Image.fromarray(skimage.data.chelsea()).save(folder + "/cat.png")
"""
REFERENCE = """
import sys, torch, hiera
from PIL import Image
from torchvision import transforms
model, folder = sys.argv[1:]
net = getattr(hiera, model)()
net.load_state_dict(torch.load(folder + "/weights.pth", weights_only=True)["model_state"])
net.eval()
prepare = transforms.Compose([
    transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
with torch.no_grad():
    probs = net(prepare(Image.open(folder + "/cat.png").convert("RGB"))[None])
print(probs[0].topk(5))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hiera_large_224")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = [sys.executable, "-W", "ignore"]
        subprocess.run([*python, "-c", WRITE, options.model, folder], check=True)
        picture, weights = Path(folder) / "cat.png", Path(folder) / "weights.pth"
        cli = ["-m", "hiera_cli", "predict", picture, "-m", options.model, "--checkpoint", weights]
        commands = {
            "reference": [*python, "-c", REFERENCE, options.model, folder],
            "hiera fp32": [*python, *cli, "--dtype", "fp32"],
            "hiera auto": [*python, *cli],
        }
        for command in commands.values():  # warm up: page cache and bytecode
            subprocess.run(command, check=True, capture_output=True)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times[name].append(time.perf_counter() - start)
    print(f"{options.model}, one picture, {platform.processor() or platform.machine()}")
    base = statistics.median(times["reference"])
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.1f}..{max(values):.1f}"
        print(f"{name:12} {median:5.1f} s ({spread}), {median / base:.2f}x the reference's time")


if __name__ == "__main__":
    main()
