"""Tests of frames on their way to a device: how many bytes travel, and that the results are those
of a CPU, which gets its frames in RGB. A stand-in takes the place of CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core.data import sources
from hiera_core.data.clip_reader import ClipViews, read_segments, unresized
from hiera_core.data.clip_sampling import Sampling
from hiera_core.data.transforms import ImageTransform, VideoTransform
from hiera_core.data.video_files.frame_store import ON_HOST, FrameStore, KeptFrames
from hiera_core.data.video_files.planar_video import PlanarVideo
from hiera_core.data.video_files.video_reader import DecodedFrame
from hiera_core.data.video_files.yuv_layout import YuvLayout
from hiera_core.inference.features import FeatureExtractor
from hiera_core.inference.predict import Predictor
from hiera_core.inference.reconstruct import Reconstructor
from hiera_core.inference.transfer import Uploads

from .conftest import assert_close, draw_weights
from .test_planar_video import on_x86
from .test_transfer import CPU, CudaWithoutMemory, FakeCuda
from .test_video_reader import SMALL_VIDEO, write_video

PLANES = FrameStore(takes_planes=True)


@pytest.fixture(scope="module")
def ten_seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "x.mp4"
    return write_video(path, frames=100, fps=10, size=(640, 360), codec="mpeg4")


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "x.mp4", frames=40, size=(96, 80))


def small_model(**config: Any) -> Any:
    return draw_weights(hiera_core.Hiera(**{**SMALL_VIDEO, **config})).eval()


def on_stand_in(pipeline: Any, cuda: FakeCuda) -> Any:
    """Let a pipeline upload its clips, to a stand-in for CUDA."""
    pipeline.runner("video").uploads = Uploads(CPU, cuda)
    return pipeline


def run(pipeline: Any, path: Path) -> Any:
    (record,) = pipeline(sources.expand([str(path)]))
    assert record.status == "ok", record.error
    return record


def views_of(path: Path, transform: VideoTransform, store: FrameStore, **options: Any) -> ClipViews:
    (segment,) = read_segments(path, Sampling(**options), transform, store=store)[1]
    assert isinstance(segment.views, ClipViews)
    return segment.views


@on_x86
def test_a_fifth_of_the_bytes_becomes_the_same_views(ten_seconds: Path) -> None:
    """A clip of ten seconds of 640x360, as hiera_base_16x224 sees it: 5 x 3 views of 16 frames of
    224x224, which are 144 MB as numbers."""
    transform = VideoTransform.from_preprocessing(None, (16, 224, 224))
    cuda = FakeCuda()
    uploads = Uploads(CPU, cuda)
    store = FrameStore(uploads.empty, takes_planes=True)
    expected, views = (views_of(ten_seconds, transform, kept) for kept in (ON_HOST, store))
    assert len(views) == len(expected) == 15
    for first in range(0, 15, 5):
        found = uploads.clips(unresized(views)[first : first + 5])  # type: ignore[arg-type]
        for number, view in enumerate(found, first):
            assert np.array_equal(view.numpy(), expected[number])
    numbers = 15 * expected[0].nbytes
    assert numbers == 15 * 16 * 224 * 224 * 3 * 4
    assert 5 * cuda.pinned_bytes < numbers
    assert 0 <= cuda.pinned_bytes - len(views.frames) * 640 * 360 * 3 // 2 < 1000


@on_x86
@pytest.mark.parametrize("mistake", ["v_red", "u_blue", "u_green", "black"])
def test_other_colours_give_other_answers(
    short_clip: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """The comparison with a CPU notes a coefficient that is off by a hundredth."""
    model = small_model()
    expected = run(Predictor(model, dtype="fp32"), short_clip)
    to_rgb = YuvLayout.to_rgb

    def wrong(layout: YuvLayout, frames: torch.Tensor) -> torch.Tensor:
        right = layout.conversion
        value = getattr(right, mistake)
        changed = type(right)(**{**vars(right), mistake: value + abs(value) // 100 + 1})
        return to_rgb(type(layout)(**{**vars(layout), "conversion": changed}), frames)

    found = run(on_stand_in(Predictor(model, dtype="fp32"), FakeCuda()), short_clip)
    assert found.to_json() == expected.to_json()
    monkeypatch.setattr(YuvLayout, "to_rgb", wrong)
    found = run(on_stand_in(Predictor(model, dtype="fp32"), FakeCuda()), short_clip)
    assert found.to_json() != expected.to_json()


def test_frames_for_a_cpu_are_rgb(short_clip: Path) -> None:
    runner = Predictor(small_model(), dtype="fp32").classifier("video")
    assert runner.frame_store is ON_HOST
    views = views_of(short_clip, runner.transform, runner.frame_store)
    assert views.layout is None and views.frames.shape[1:] == (80, 96, 3)


@on_x86
def test_features_and_reconstructions_are_those_of_a_cpu(short_clip: Path) -> None:
    model = small_model()
    plain, other = (FeatureExtractor(model, dtype="fp32") for _ in range(2))
    expected, found = run(plain, short_clip), run(on_stand_in(other, FakeCuda()), short_clip)
    for name, value in expected.result.items():
        assert torch.equal(torch.as_tensor(found.result[name]), torch.as_tensor(value))
    autoencoder = draw_weights(
        hiera_core.MaskedAutoencoderHiera(
            **{**SMALL_VIDEO, "q_stride": (1, 2, 2)}, decoder_embed_dim=16, decoder_depth=1
        )
    ).eval()
    plain, other = (Reconstructor(autoencoder, dtype="fp32") for _ in range(2))
    expected, found = run(plain, short_clip), run(on_stand_in(other, FakeCuda()), short_clip)
    assert torch.equal(found.result.original, expected.result.original)
    assert torch.equal(found.result.reconstruction, expected.result.reconstruction)


@on_x86
def test_pictures_of_frames_are_those_of_a_cpu(short_clip: Path) -> None:
    pipelines = (Predictor(small_model(), dtype="fp32", keep_thumbnails=True) for _ in range(2))
    plain, other = pipelines
    expected, found = run(plain, short_clip), run(on_stand_in(other, FakeCuda()), short_clip)
    assert len(found.thumbnails) == len(expected.thumbnails) > 0
    for ours, theirs in zip(found.thumbnails, expected.thumbnails, strict=True):
        assert np.array_equal(np.asarray(ours.picture), np.asarray(theirs.picture))


@on_x86
def test_ordinary_memory_holds_planes_too(short_clip: Path) -> None:
    transform = VideoTransform.from_preprocessing(None, (4, 64, 64))
    uploads = Uploads(CPU, CudaWithoutMemory())
    store = FrameStore(uploads.empty, takes_planes=True)
    expected, views = (views_of(short_clip, transform, kept) for kept in (ON_HOST, store))
    assert views.layout is not None
    found = uploads.clips(unresized(views))  # type: ignore[arg-type]
    assert np.array_equal(found.numpy(), np.stack(expected))


@on_x86
def test_frames_are_kept_in_the_smallest_form(tmp_path: Path) -> None:
    """Planes up to the size at which the resized part of a frame is smaller; then that part."""
    transform = VideoTransform.from_preprocessing(None, (4, 64, 64))
    for size, form in [((160, 120), "planes"), ((240, 180), "planes"), ((320, 240), "resized")]:
        path = write_video(tmp_path / f"{size[0]}.mp4", frames=20, size=size)
        plain, views = (views_of(path, transform, store) for store in (ON_HOST, PLANES))
        assert (views.layout is not None) == (form == "planes")
        assert views.frames.nbytes <= plain.frames.nbytes
        if form == "resized":
            assert views.frames.dtype == np.float32
            assert np.array_equal(views.frames, plain.frames)
        for ours, theirs in zip(views, plain, strict=True):
            assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), 1e-5)


@on_x86
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [96, 64])
def test_frames_after_another_layout_are_rgb(tmp_path: Path, rows: int, size: int) -> None:
    """Those before it are turned into RGB, and resized if that is smaller."""
    path = write_video(tmp_path / "x.mp4", frames=8, size=(160, 120))
    plain, mixed = (KeptFrames(PLANES, 6, (size, size), 1) for _ in range(2))
    with PlanarVideo(path) as video:
        frames = list(video.read(range(6)))
    layout = frames[0].layout
    assert layout is not None
    for row, frame in enumerate(frames):
        pixels = layout.to_rgb(torch.from_numpy(frame.pixels)[None])[0].numpy()
        rgb = DecodedFrame(frame.index, pixels, frame.intact)
        plain.put(row, rgb)
        mixed.put(row, frame if row < rows else rgb)
    assert mixed.layout is None and plain.frames is not None and mixed.frames is not None
    assert mixed.frames.dtype == (np.uint8 if size == 96 else np.float32)
    assert np.array_equal(mixed.frames, plain.frames)


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p"])
def test_single_frames_are_rgb(tmp_path: Path, pixels: str) -> None:
    path = write_video(tmp_path / "x.mp4", frames=20, pixels=pixels)
    transform = ImageTransform((64, 64), 64, (0.5,) * 3, (0.5,) * 3)
    sampling = Sampling(every=0.2)
    plain, other = (
        [segment.views[0] for segment in read_segments(path, sampling, transform, store=store)[1]]
        for store in (ON_HOST, PLANES)
    )
    assert np.array_equal(plain, other)


@on_x86
def test_segments_and_the_views_of_a_part(short_clip: Path) -> None:
    transform = VideoTransform.from_preprocessing(None, (4, 64, 64))
    sampling = Sampling(segments=0.5)
    plain, planes = (
        [*read_segments(short_clip, sampling, transform, store=store)[1]]
        for store in (ON_HOST, PLANES)
    )
    assert len(planes) == len(plain) == 3
    for ours, theirs in zip(planes, plain, strict=True):
        assert np.array_equal(np.stack(ours.views), np.stack(theirs.views))
        assert np.array_equal(np.stack(ours.frames), np.stack(theirs.frames))  # type: ignore[arg-type]
        (first, *_) = unresized(ours.views)
        assert torch.equal(first.tensor(), torch.from_numpy(theirs.views[0]))  # type: ignore[union-attr]
