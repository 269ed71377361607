"""From files to answers: this package against timm's way, and clips of video.

    python -m tests.benchmarks.files            # 600 JPEG files of 500x375, hiera_nano_32
    python -m tests.benchmarks.files --photos   # 300 JPEG files of 2048x1536
    python -m tests.benchmarks.files --clips    # 40 clips of 10 s at 640x360

The first two compare `hiera predict`, without and with --fast-jpeg, with ImageFolder, a DataLoader
with two workers, timm's transforms, and timm's model of the same architecture with the same
preprocessing. The photos are also decoded alone, by our pipeline without its model. The sides are
those of `hiera bench --from`. They run alternately, each in a new process that is timed after a
first batch; first alone, then beside a process that keeps a core busy. The third prints how many
bytes of a video the device gets, on CUDA too and as views in float32; videos per second without the
model, on the CPU; and the peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import TYPE_CHECKING, Any

from .throughput import write_photos

if TYPE_CHECKING:
    from hiera_core.benchmarking.job import Job

BUSY = "while True: pass"
SIZES = {False: (500, 375), True: (2048, 1536)}  # by --photos


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int)
    parser.add_argument("--photos", action="store_true")
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
            count = arguments.files or (300 if arguments.photos else 600)
            write_photos(folder / "pictures", count, SIZES[arguments.photos])
            compare(folder, arguments.rounds, arguments.photos)


def compare(folder: Path, rounds: int, photos: bool) -> None:
    """Run all sides alternately, alone and beside a busy process."""
    sides = ["timm", "ours", "fast", *(["decode"] if photos else [])]
    for text, context in (("alone", contextlib.nullcontext()), ("beside a busy process", busy())):
        with context:
            measured: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds):
                for side in sides[:: -1 if number % 2 else 1]:
                    measured[side].append(measure(side, folder)["per_second"])
        for side in sides:
            ratios = [a / b for a, b in zip(measured[side], measured["timm"], strict=True)]
            print(
                f"{text}: {side:6} {statistics.median(measured[side]):6.0f} images/s, "
                f"{statistics.median(ratios):.2f}x timm's way, "
                f"rounds {min(ratios):.2f} to {max(ratios):.2f}",
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


def ours(folder: Path, fast_jpeg: bool = False, without_model: bool = False) -> dict[str, float]:
    """Classify the pictures as `hiera predict` does, or only decode them."""
    from hiera_core.process import cores

    cores.limit_threads()
    from hiera_core.benchmarking.end_to_end.our_files import FilesRun, TimedPredictor

    return timed(FilesRun(TimedPredictor(job_of(folder, fast_jpeg)), without_model))


def fast(folder: Path) -> dict[str, float]:
    """Classify the pictures as `hiera predict --fast-jpeg` does."""
    return ours(folder, fast_jpeg=True)


def decode(folder: Path) -> dict[str, float]:
    """Decode and resize the pictures, and do nothing with them."""
    return ours(folder, without_model=True)


def timm(folder: Path) -> dict[str, float]:
    """Classify the pictures as users of timm do."""
    from hiera_core.benchmarking import peers
    from hiera_core.benchmarking.end_to_end.timm_files import TimmRun

    job = job_of(folder)
    return timed(TimmRun(job, peers.PEERS["timm"].build(job.entry, job.mode)))


def job_of(folder: Path, fast_jpeg: bool = False) -> Job:
    """Return the job of classifying the pictures with two workers."""
    from hiera_core.benchmarking.job import FileInputs, Job

    files = FileInputs([str(folder / "pictures")], False, 2, fast_jpeg=fast_jpeg)
    return Job("hiera", "hiera_nano_32", 64, mode="files", files=files)


def timed(run: Any) -> dict[str, float]:
    """Time a run after a first batch."""
    run.warm_up()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    assert not run.facts["unreadable"]
    return {"per_second": run.facts["inputs"] / seconds, "peak_mib": peak_mib()}


def clips(folder: Path) -> dict[str, float]:
    """Bring clips to a model that takes 5 x 3 views of 16 frames of 224x224, and no time."""
    from hiera_core.process import cores

    cores.limit_threads()
    import torch

    import hiera_core
    from hiera_core.data import sources
    from hiera_core.inference.predict import Predictor

    model = hiera_core.create_model("hiera_nano_8x32", input_size=(16, 224, 224), num_classes=9)
    predictor = Predictor(model.eval(), dtype="fp32")
    classifier: Any = predictor.classifier("video")
    classifier.compute = lambda x: torch.zeros(len(x), 9)
    paths = sorted(map(str, folder.iterdir()))
    start = time.perf_counter()
    records = list(predictor(sources.expand(paths)))
    seconds, peak = time.perf_counter() - start, peak_mib()
    assert all(record.status == "ok" for record in records)
    return {
        "per_second": len(records) / seconds,
        **megabytes_of("hiera_base_16x224", Path(paths[0])),
        **megabytes_of("hiera_nano_8x32", Path(paths[0])),
        "peak_mib": peak,
    }


def megabytes_of(model: str, path: Path) -> dict[str, float]:
    """Return how many megabytes of a video a model gets on a CPU and on CUDA, and its views."""
    from hiera_core import zoo
    from hiera_core.data.clip_reader import read_segments
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.data.transforms import VideoTransform
    from hiera_core.data.video_files.frame_store import FrameStore

    entry = zoo.get(model)
    transform = VideoTransform.from_preprocessing(entry.preprocessing, entry.config["input_size"])
    found: dict[str, float] = {}
    for place, takes_planes in (("cpu", False), ("cuda", True)):
        store = FrameStore(takes_planes=takes_planes)
        views: Any = next(read_segments(path, Sampling(), transform, store=store)[1]).views
        found[f"{model} MB on {place}"] = views.frames.nbytes / 1e6
    found[f"{model} MB of views"] = len(views) * views[0].nbytes / 1e6
    return found


SIDES = {
    "ours": ours,
    "fast": fast,
    "timm": timm,
    "decode": decode,
    "clips": clips,
}


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
