"""Tests of decoder threads: how many run, that they end, and that frames do not depend on them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hiera_core.data import sources
from hiera_core.data.clip_sampling import Sampling
from hiera_core.data.video_files import decoder_threads
from hiera_core.data.video_files.decoder_threads import DecoderThreads
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError
from hiera_core.inference.predict import Predictor
from hiera_core.training import dataloader

from .test_video_reader import write_video

TASKS = Path("/proc/self/task")
needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason="Linux lists the threads of a process")


def count_threads() -> int:
    return sum(1 for _ in TASKS.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=60)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Leave it to reference counts to end the threads of decoders."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_open_videos_share_the_threads() -> None:
    threads = DecoderThreads(8)
    assert [threads.take() for _ in range(10)] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    for _ in range(9):
        threads.give_back()
    assert threads.take() == 4
    assert DecoderThreads(200).take() == decoder_threads.MAX_THREADS
    assert DecoderThreads(1).take() == 1


def test_videos_are_counted_while_they_are_open(clip: Path, tmp_path: Path) -> None:
    threads = DecoderThreads(4)
    with Video(clip, threads=threads) as video:
        assert threads.take() == 2
        threads.give_back()
        list(video.read([50, 0, 30]))  # a seek to the start opens the file again
        assert threads.take() == 2
        threads.give_back()
    video.close()
    assert threads.take() == 4
    threads.give_back()
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clip.read_bytes()[:500])
    for source, pixels in ((damaged, 10**9), (clip, 100)):
        with pytest.raises(InputError):
            Video(source, pixels, threads)
    assert threads.take() == 4


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
def test_frames_do_not_depend_on_the_threads(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / "x.mkv", frames=50, codec=codec, gop=10)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = bytes(40)
    for source in (path, bytes(damaged)):  # damage is concealed in the same way, too
        found = []
        for total in (1, 2, 5):
            with Video(source, threads=DecoderThreads(total)) as video:
                frames = list(video.read([0, 7, 8, 33, 49, 20]))
            found.append([(frame.index, frame.intact, frame.pixels) for frame in frames])
        for other in found[1:]:
            for (index, intact, pixels), expected in zip(other, found[0], strict=True):
                assert (index, intact) == expected[:2]
                assert np.array_equal(pixels, expected[2])


@needs_tasks
def test_threads_end_with_the_video(clip: Path, no_collector: None) -> None:
    before = count_threads()
    for _ in range(5):
        with Video(clip, threads=DecoderThreads(4)) as video:
            list(video.read([0, 40]))
            assert count_threads() > before
        del video
    assert count_threads() == before


@needs_tasks
@pytest.mark.parametrize("workers", [1, 4])
def test_few_threads_run_while_several_videos_decode(
    clip: Path, no_collector: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """On a machine with 16 cores, where FFmpeg itself would start 17 threads for each video."""
    monkeypatch.setattr(decoder_threads, "cores_per_process", lambda: 16)
    monkeypatch.setattr("hiera_core.inference.pipeline.cores_per_process", lambda: 16)
    torch.set_num_threads(1)  # PyTorch starts its own threads in every worker otherwise
    predictor = Predictor("hiera_nano_8x32", sampling=Sampling(clips=2), workers=workers)
    inputs = [str(clip)] * 12
    before = highest = count_threads()
    for record in predictor(sources.expand(inputs)):
        assert record.status == "ok"
        highest = max(highest, count_threads())
    # The workers, a thread that lists the inputs, and those that decode: 4 for the first video,
    # and 2 for each other one. The video that is computed is open, too. FFmpeg's own choice would
    # be one for each core and video, and as many to convert colours.
    assert highest - before <= workers + 1 + 4 + 2 * workers


def test_one_video_gets_all_threads_of_a_predictor(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = DecoderThreads.take

    def note(self: DecoderThreads) -> int:
        taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(DecoderThreads, "take", note)
    monkeypatch.setattr("hiera_core.inference.pipeline.cores_per_process", lambda: 6)
    for workers, expected in ((None, 6), (3, 3), (100, 6)):
        list(Predictor("hiera_nano_8x32", workers=workers)(sources.expand([str(clip)])))
        assert taken.pop() == expected and not taken


def test_workers_of_a_dataloader_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataloader, "cores_per_process", lambda: 12)
    for workers, expected in ((1, 12), (5, 2), (16, 1)):
        info = type("Info", (), {"num_workers": workers})
        monkeypatch.setattr(dataloader, "get_worker_info", lambda info=info: info)
        monkeypatch.setattr(dataloader.signal, "signal", lambda *_: None)
        monkeypatch.setattr("sys.excepthook", None)
        monkeypatch.setattr(decoder_threads.OF_THIS_PROCESS, "total", None)
        dataloader._prepare_worker(0)
        assert decoder_threads.OF_THIS_PROCESS.total == expected


def test_many_threads_may_take(clip: Path) -> None:
    threads = DecoderThreads(4)
    each: Callable[[int], None] = lambda _: (threads.take(), threads.give_back())[1]  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(each, range(2000)))
    assert threads.take() == 4
