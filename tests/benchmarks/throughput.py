"""Throughput and memory of `hiera predict`.

    python -m tests.benchmarks.throughput            # 300 photos of 2000x1500, Hiera-B
    python -m tests.benchmarks.throughput --memory   # peak memory: 3,000 pictures against 300
    python -m tests.benchmarks.throughput --seeking  # an hour of video against a minute

The first compares the time of a picture, without start-up, with the best possible one: that of the
model plus that of decoding divided by the number of cores. Both are measured alone in each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="hiera_base_224")
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seeking", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            compare_memory(Path(folder))
        elif arguments.seeking:
            compare_lengths(Path(folder))
        else:
            compare_throughput(Path(folder), arguments)


def compare_throughput(folder: Path, arguments: argparse.Namespace) -> None:
    """Compare the time of a picture with the time of decoding and of the model alone."""
    import hiera_core
    from hiera_core.data import sources
    from hiera_core.data.image_reader import open_image
    from hiera_core.process.cores import allowed_cores

    paths = write_photos(folder, arguments.photos, (2000, 1500))
    model = hiera_core.create_model(arguments.model).eval()
    predictor = hiera_core.Predictor(model, device=arguments.device, dtype=arguments.dtype)
    classifier = predictor.classifier("image")
    views = [
        classifier.transform.crop(open_image(p)[0]) for p in paths[: 2 * classifier.batch_size]
    ]
    classifier(views)  # warm up
    ratios = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        for path in paths[:40]:
            classifier.transform.crop(open_image(path)[0])
        decode = (time.perf_counter() - start) / 40
        start = time.perf_counter()
        for _ in range(max(1, 80 // len(views))):
            classifier(views)
        run = (time.perf_counter() - start) / (max(1, 80 // len(views)) * len(views))
        start = time.perf_counter()
        records = list(predictor(sources.expand(map(str, paths))))
        total = (time.perf_counter() - start) / len(paths)
        assert all(r.status == "ok" for r in records)
        best = run + decode / allowed_cores()
        ratios.append(best / total)
        print(
            f"model {run * 1e3:.1f} ms, decode {decode * 1e3:.1f} ms, together {total * 1e3:.1f} ms"
            f" a picture: {best / total:.0%} of 1 / (model + decode / cores)"
        )
    print(f"median {statistics.median(ratios):.0%}")


def compare_memory(folder: Path) -> None:
    """Compare the peak memory for few and for many pictures."""
    peaks = []
    for count in (300, 3000):
        subfolder = folder / str(count)
        subfolder.mkdir()
        write_photos(subfolder, count, (640, 480))
        peaks.append(peak_memory(subfolder, "-m", "hiera_tiny_224"))
        print(f"{count} pictures: peak {peaks[-1] / 1024:.0f} MiB")
    print(f"growth {peaks[1] / peaks[0] - 1:+.1%}")


def compare_lengths(folder: Path) -> None:
    """Compare an hour of video with a minute: 320x240, a key frame every 2 s."""
    times, peaks = [], []
    for minutes in (1, 60):
        path = folder / f"{minutes}.mp4"
        write_video(path, minutes * 60)
        times.append(statistics.median(reading_time(path) for _ in range(5)))
        peaks.append(peak_memory(path, "--clips", "5", "--crops", "1"))
        print(f"{minutes} min: {times[-1]:.2f} s for 5 clips, peak {peaks[-1] / 1024:.0f} MiB")
    print(f"an hour costs {times[1] / times[0]:.2f}x a minute, memory {peaks[1] / peaks[0]:.2f}x")


def reading_time(path: Path) -> float:
    """Return the time in seconds to read the clips of a video."""
    from hiera_core.data.clip_reader import read_segments
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.data.transforms import VideoTransform

    transform = VideoTransform.from_preprocessing(None, (16, 224, 224))
    start = time.perf_counter()
    _, segments = read_segments(path, Sampling(), transform)
    (_,) = segments
    return time.perf_counter() - start


def peak_memory(source: Path, *options: str) -> int:
    """Return the peak memory of a whole `hiera predict`, in KiB."""
    code = (
        "import resource, sys; from hiera_cli.app import run\n"
        f"code = run(['predict', {str(source)!r}, '--random-init', '-q', *sys.argv[1:]])\n"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    status, peak = done.stderr.splitlines()[-1].split()
    assert status == "0", done.stderr
    return int(peak)


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write JPEG files with the detail of a photograph. Only ten differ; the others are links."""
    import skimage.data
    from PIL import Image

    photo = Image.fromarray(skimage.data.astronaut()).resize(size)
    noise = np.random.default_rng(0).integers(0, 12, (size[1], size[0], 1), np.uint8)
    pixels = np.minimum(np.asarray(photo), 243) + noise
    paths = []
    for i in range(count):
        paths.append(folder / f"{i:05}.jpg")
        if i < 10:
            Image.fromarray(np.roll(pixels, 50 * i, 1)).save(paths[-1], quality=90)
        else:
            os.link(paths[i % 10], paths[-1])
    return paths


def write_video(path: Path, seconds: int) -> None:
    """Write a video of a moving photograph."""
    import av
    import skimage.data
    from PIL import Image

    cat = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((320, 240)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.codec_context.gop_size = 60
        for i in range(seconds * 30):
            frame = av.VideoFrame.from_ndarray(np.roll(cat, 2 * i, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
