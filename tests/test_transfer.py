"""Tests of transfers to a device: which stream waits for what, when memory is used again, and that
nothing is copied twice. A stand-in for CUDA computes at once and keeps account of the order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core.data import sources
from hiera_core.data.clip_reader import read_segments, unresized
from hiera_core.data.clip_sampling import Sampling
from hiera_core.data.transforms import VideoTransform
from hiera_core.data.video_files.frame_store import FrameStore
from hiera_core.inference import batching, transfer
from hiera_core.inference.predict import Predictor
from hiera_core.inference.transfer import Cuda, Event, PixelSlots, Uploads

from .conftest import SMALL, assert_close, draw_weights
from .test_video_reader import write_video

CPU = torch.device("cpu")
Clock = dict[str, int]


@dataclass
class FakeStream:
    """A queue of work. `clock` says how much of each queue is done before what comes next here."""

    name: str
    clock: Clock = field(default_factory=dict)

    def work(self) -> Clock:
        """Add work to the queue. Return what is done when it is done."""
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def wait_event(self, event: FakeEvent) -> None:
        for name, count in event.clock.items():
            self.clock[name] = max(count, self.clock.get(name, 0))

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(FakeEvent(dict(other.clock)))


@dataclass
class FakeEvent:
    clock: Clock = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)

    def record(self, stream: Any = None) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.waits.append("host")


class FakeCuda(Cuda):
    """Notes the order of streams and events. Memory is ordinary memory."""

    def __init__(self) -> None:
        self.compute = FakeStream("compute")
        self.active = [self.compute]
        self.copies: list[Clock] = []  # of each block of work on the copy stream
        self.pinned_bytes = 0

    def new_stream(self, device: torch.device) -> FakeStream:
        return FakeStream("copy")

    def new_event(self) -> Event:
        return FakeEvent()

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self.active.append(stream)
        self.copies.append(stream.work())
        yield
        self.active.pop()

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.active[-1]

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        self.pinned_bytes += made.nbytes
        return made

    def keep_for(self, tensor: torch.Tensor, stream: Any) -> None:
        pass


def pictures_of(count: int, size: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def test_a_slot_is_filled_again_only_after_its_copy() -> None:
    slots = PixelSlots(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    first, second = pictures_of(2)
    seen: list[np.ndarray] = []
    held = slots.put(first)

    class Copied(FakeEvent):
        def synchronize(self) -> None:
            seen.append(held.copy())

    assert np.array_equal(held, first)
    number = slots.number_of(held)
    assert number == 0 and slots.number_of(first) is None
    assert slots.put(second) is second, "there was no free slot"
    slots.give_back(number, Copied())
    assert not seen
    assert np.array_equal(slots.put(second), second)
    assert np.array_equal(seen, [first]), "the slot was overwritten before its event had passed"


def test_a_slot_that_was_not_copied_is_free_at_once() -> None:
    slots = PixelSlots(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    for picture in pictures_of(3):
        slots.give_back(slots.number_of(slots.put(picture)) or 0)
    other = np.zeros((4, 4, 3), np.uint8)
    assert slots.put(other) is other, "another size does not fit"


def test_buffers_are_read_after_and_refilled_behind_their_copies() -> None:
    """The model waits for a copy, and the copy after next waits for the model."""
    cuda = FakeCuda()
    uploads = Uploads(CPU, cuda)
    reads: list[Clock] = []
    for number in range(6):
        views = pictures_of(4)
        with uploads.images(views) as batch:
            assert np.array_equal(batch, np.stack(views))
            reads.append(cuda.compute.work())
        copied = cuda.copies[number]["copy"]
        assert reads[number]["copy"] >= copied, "the model reads before the copy is done"
        if number >= transfer.BUFFERS:
            earlier = reads[number - transfer.BUFFERS]["compute"]
            assert cuda.copies[number]["compute"] >= earlier, (
                "a buffer is refilled while it is read"
            )
    last = cuda.copies[-1].get("compute", 0)
    assert last < reads[-2]["compute"], "copies wait for the batch before: nothing overlaps"


def test_images_in_slots_are_not_copied_on_the_host() -> None:
    cuda = FakeCuda()
    uploads = Uploads(CPU, cuda)
    pictures = pictures_of(4)
    slots = uploads.slots(4, pictures[0])
    staged = [slots.put(picture) for picture in pictures]
    before = cuda.pinned_bytes
    with uploads.images(staged) as batch:
        assert np.array_equal(batch, np.stack(pictures))
    assert cuda.pinned_bytes == before
    with uploads.images(pictures):
        pass
    assert cuda.pinned_bytes == before + sum(picture.nbytes for picture in pictures)
    for image in staged:
        uploads.release(image)
    assert uploads.slots(4, pictures[0]) is slots
    uploads.forget()
    uploads.release(staged[0])
    uploads.begin()
    assert uploads.slots(4, pictures[0]) is not slots


def test_frames_are_copied_once_for_all_views(tmp_path: Path) -> None:
    """5 x 3 views in batches of 4 are those that are resized on the host. 21 MB travel for a clip
    of Kinetics, in place of 144 MB."""
    path = write_video(tmp_path / "x.mp4", frames=90, size=(96, 64))
    transform = VideoTransform.from_preprocessing(None, (16, 64, 64))
    cuda = FakeCuda()
    uploads = Uploads(CPU, cuda)
    _, segments = read_segments(path, Sampling(), transform, store=FrameStore(uploads.empty))
    (segment,) = segments
    assert len(segment.views) == 15
    travelling = unresized(segment.views)
    for start in range(0, 15, 4):
        found = uploads.clips(travelling[start : start + 4])  # type: ignore[arg-type]
        assert_close(found, torch.from_numpy(np.stack(segment.views[start : start + 4])), 1e-6)
    assert len(cuda.copies) == 1, "frames that are on the device were copied again"
    frames = segment.views.frames  # type: ignore[attr-defined]
    assert frames.dtype == np.uint8
    assert cuda.pinned_bytes <= frames.nbytes + 16 * 5 * 8
    assert 4 * frames.nbytes < sum(view.nbytes for view in segment.views)
    assert cuda.compute.clock["copy"] == 1, "the model does not wait for the frames"


@pytest.mark.parametrize("size", [(1280, 720), (2000, 40)])
def test_large_and_long_frames_are_resized_by_the_worker(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """Neither memory nor transfers grow with the size of the frames."""
    clip = np.random.default_rng(0).integers(0, 256, (4, *size[::-1], 3), dtype=np.uint8)
    transform = VideoTransform.from_preprocessing(None, (4, 64, 64))
    _, segments = read_segments(clip, Sampling(clips=1), transform)
    frames = next(segments).views.frames  # type: ignore[attr-defined]
    assert frames.dtype == np.float32 and frames.shape[1] == 64 and frames.shape[2] <= 192


def test_results_are_one_batch_behind(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has batch n + 1 before batch n is read, and the records are those of a CPU."""
    paths = [str(pictures)] * 3
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    expected = list(Predictor(model, batch_size=2)(sources.expand(paths)))
    predictor = Predictor(model, batch_size=2)
    classifier = predictor.classifier("image")
    classifier.uploads = Uploads(CPU, FakeCuda())
    order: list[str] = []
    launch, split = classifier._launch, classifier._split

    def noted_launch(pixels: Any) -> Any:
        order.append("launch")
        return launch(pixels)

    def noted_split(found: Any) -> Any:
        order.append("read")
        return split(found)

    monkeypatch.setattr(classifier, "_launch", noted_launch)
    monkeypatch.setattr(classifier, "_split", noted_split)
    found = list(predictor(sources.expand(paths)))
    assert [r.to_json() for r in found] == [r.to_json() for r in expected]
    assert order.count("launch") == order.count("read") == 6
    ahead = [order[:i].count("launch") - order[:i].count("read") for i in range(len(order) + 1)]
    assert max(ahead) == 2, order


def test_memory_that_runs_out_on_a_device_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "compile_for_inference", lambda function, *_: function)
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    classifier = Predictor(model, batch_size=8, compile=True).classifier("image")
    classifier.uploads = Uploads(CPU, FakeCuda())
    compute, tried = classifier.compute, []

    def limited(x: torch.Tensor) -> Any:
        tried.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(x)

    classifier.compute = limited  # type: ignore[method-assign]
    assert len(classifier.run(pictures_of(11, 64))) == 11
    assert tried == [8, 4, 4, 4]


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_gpu_gives_the_answers_of_the_cpu(pictures: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    paths = [str(pictures)] * 8
    plain = Predictor(model, device="cpu", dtype="fp32", batch_size=4)
    on_gpu = Predictor(model, device="cuda", dtype="fp32", batch_size=4)
    expected, found = (list(p(sources.expand(paths))) for p in (plain, on_gpu))
    assert [r.input for r in found] == [r.input for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [k.id for k in ours.topk] == [k.id for k in theirs.topk]
        assert ours.topk[0].prob == pytest.approx(theirs.topk[0].prob, abs=1e-3)


@pytest.mark.cuda
def test_a_gpu_resizes_clips_as_the_cpu_does(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", frames=90, size=(96, 64))
    transform = VideoTransform.from_preprocessing(None, (16, 64, 64))
    uploads = Uploads(torch.device("cuda", 0))
    _, segments = read_segments(path, Sampling(), transform, store=FrameStore(uploads.empty))
    views = next(segments).views
    found = uploads.clips(unresized(views)).cpu()  # type: ignore[arg-type]
    assert_close(found, torch.from_numpy(np.stack(list(views))), 1e-4)


@pytest.mark.cuda
def test_the_host_does_not_wait_while_batches_start() -> None:
    classifier = Predictor(
        draw_weights(hiera_core.Hiera(**SMALL)).eval(), device="cuda", batch_size=4
    ).classifier("image")
    views = [classifier.stage(picture, 8) for picture in pictures_of(8, 64)]
    classifier.start(views).results()
    torch.cuda.set_sync_debug_mode("error")
    try:
        started = classifier.start(views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(started.results()) == 8


class CudaWithoutMemory(FakeCuda):
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")


def test_without_page_locked_memory_ordinary_memory_is_used() -> None:
    uploads = Uploads(CPU, CudaWithoutMemory())
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert uploads.slots(4, picture) is None
    assert uploads.empty((2, 8, 8, 3), np.uint8).shape == (2, 8, 8, 3)
    with uploads.images([picture]) as batch:
        assert (batch[0].numpy() == picture).all()


def test_a_worker_that_outlives_its_stream_makes_no_slots() -> None:
    uploads, picture = Uploads(CPU, FakeCuda()), np.zeros((8, 8, 3), np.uint8)
    uploads.forget()
    assert uploads.slots(4, picture) is None
    uploads.begin()
    assert uploads.slots(4, picture) is not None
