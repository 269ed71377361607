"""From files to answers: this package against timm's way, and clips of video.

    python -m tests.benchmarks.files            # 600 JPEG files of 500x375, hiera_nano_32
    python -m tests.benchmarks.files --clips    # 40 clips of 10 s at 640x360

The first compares `hiera predict` with ImageFolder, a DataLoader with two workers, timm's
transforms and a timm model of the same size. Both sides run alternately, each in a new process that
is timed after a first batch; first alone, then beside a process that keeps a core busy. The second
prints how many bytes of a video the device gets, videos per second without the model, and the peak
memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .throughput import write_photos

BUSY = "while True: pass"
SIZE = (500, 375)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.clips:
            write_clips(folder, 40)
            print(measure("clips", folder))
        else:
            (folder / "pictures").mkdir()
            write_photos(folder / "pictures", arguments.files, SIZE)
            compare(folder, arguments.rounds)


def compare(folder: Path, rounds: int) -> None:
    """Run both sides alternately, alone and beside a busy process."""
    for text, context in (("alone", contextlib.nullcontext()), ("beside a busy process", busy())):
        with context:
            measured: dict[str, list[float]] = {"ours": [], "timm": []}
            for number in range(rounds):
                for side in sorted(measured, reverse=bool(number % 2)):
                    measured[side].append(measure(side, folder)["per_second"])
        ratios = [a / b for a, b in zip(measured["ours"], measured["timm"], strict=True)]
        ours, timm = (statistics.median(measured[side]) for side in ("ours", "timm"))
        print(
            f"{text}: ours {ours:.0f} images/s, timm's way {timm:.0f}; "
            f"{statistics.median(ratios):.2f}x, rounds {min(ratios):.2f} to {max(ratios):.2f}",
            flush=True,
        )


def measure(side: str, folder: Path) -> dict[str, float]:
    """Run one side in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--side", side, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep a core busy within the block."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def ours(folder: Path) -> dict[str, float]:
    """Classify the pictures as `hiera predict` does."""
    from hiera_core import cores

    cores.limit_threads()
    from hiera_core.data import sources
    from hiera_core.inference.predict import Predictor

    predictor = Predictor("hiera_nano_32")
    paths = sorted(map(str, (folder / "pictures").iterdir()))
    list(predictor(sources.expand(paths[:16])))
    start = time.perf_counter()
    records = list(predictor(sources.expand(paths)))
    seconds = time.perf_counter() - start
    assert all(len(record.topk) == 5 for record in records)
    return {"per_second": len(records) / seconds, "peak_mib": peak_mib()}


def timm(folder: Path) -> dict[str, float]:
    """Classify the pictures as users of timm do."""
    import torch
    from timm.data import create_transform
    from timm.models.hiera import Hiera
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    model = Hiera((32, 32), embed_dim=24, num_heads=1, stages=(1, 2, 2), q_pool=2, num_classes=10)
    model.eval()
    half = (0.5, 0.5, 0.5)
    transform = create_transform((3, 32, 32), False, mean=half, std=half, crop_pct=1.0)
    loader = DataLoader(ImageFolder(folder, transform), batch_size=64, num_workers=2)
    count = 0
    with torch.inference_mode():
        for x, _ in itertools.islice(loader, 1):
            model(x)
        start = time.perf_counter()
        for x, _ in loader:
            count += len(model(x).softmax(-1).topk(5).values.tolist())
    return {"per_second": count / (time.perf_counter() - start), "peak_mib": peak_mib()}


def clips(folder: Path) -> dict[str, float]:
    """Bring clips to a model that takes 5 x 3 views of 16 frames of 224x224, and no time."""
    from hiera_core import cores

    cores.limit_threads()
    import torch

    import hiera_core
    from hiera_core.data import sources
    from hiera_core.data.clip_reader import read_segments
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference.predict import Predictor

    model = hiera_core.create_model("hiera_nano_8x32", input_size=(16, 224, 224), num_classes=9)
    predictor = Predictor(model.eval(), dtype="fp32")
    classifier: Any = predictor.classifier("video")
    classifier.compute = lambda x: torch.zeros(len(x), 9)
    paths = sorted(map(str, folder.iterdir()))
    transform = classifier.transform
    _, segments = read_segments(Path(paths[0]), Sampling(), transform)
    views = next(segments).views
    shares_frames = getattr(views, "scaled", None) is not None
    handed = views.frames.nbytes if shares_frames else sum(view.nbytes for view in views)  # type: ignore[attr-defined]
    del views, segments
    start = time.perf_counter()
    records = list(predictor(sources.expand(paths)))
    seconds = time.perf_counter() - start
    assert all(record.status == "ok" for record in records)
    return {
        "per_second": len(records) / seconds,
        "mb_per_clip": handed / 1e6,
        "peak_mib": peak_mib(),
    }


SIDES = {"ours": ours, "timm": timm, "clips": clips}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_clips(folder: Path, count: int) -> None:
    """Write videos of a moving photograph. Only four differ; the others are links."""
    import av
    import numpy as np
    import skimage.data
    from PIL import Image

    cat = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((640, 360)))
    for number in range(count):
        path = folder / f"{number:03}.mp4"
        if number >= 4:
            os.link(folder / f"{number % 4:03}.mp4", path)
            continue
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for i in range(300):
                pixels = np.roll(cat, (number + 1) * i, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
