"""Tests of features along a video: one vector for each segment or single frame, with its times."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core.data.clip_reader import DecodedSegment, read_segments
from hiera_core.data.clip_sampling import Sampling
from hiera_core.errors import UsageError
from hiera_core.inference import feature_formats, segments
from hiera_core.inference.features import FeatureExtractor, FeatureSelection
from hiera_core.inference.predict import Predictor

from .conftest import assert_close
from .test_reconstruct import SAMPLES
from .test_video_reader import write_video

Command = Callable[..., tuple[int, str, str]]
VIDEO = ["-m", "hiera_nano_8x32", "--dtype", "fp32"]
FORMATS = ["safetensors", "npz", "parquet"]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of 7.5 seconds at 8 frames per second, whose frames differ."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", frames=60, fps=8)


def test_segments_are_those_of_predict(film: Path, hiera: Command) -> None:
    for seconds in ("2", "0.01", "100"):
        _, out, _ = hiera("predict", film, *VIDEO, "--segments", seconds)
        predicted = json.loads(out)["segments"]
        code, out, err = hiera("features", film, *VIDEO, "--segments", seconds, "-f", "jsonl")
        assert code == 0, err
        record = json.loads(out)
        assert record["start"] == [segment["start"] for segment in predicted]
        assert record["end"] == [segment["end"] for segment in predicted]
        found = record["features"]["embedding"]
        assert found["shape"] == [len(predicted), 96]
        assert np.array(found["values"]).shape == (len(predicted), 96)
    assert (record["start"], record["end"]) == ([0.0], [7.5])


def test_the_last_segment_may_be_shorter(film: Path) -> None:
    found = hiera_core.features(film, "hiera_nano_8x32", segments=2.0)
    assert found["start"].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert found["end"].tolist() == [2.0, 4.0, 6.0, 7.5]
    assert found["start"].dtype == torch.float64 and found["embedding"].dtype == torch.float32


def test_each_row_is_the_vector_of_its_segment(film: Path) -> None:
    sampling = Sampling(segments=2.0, clips=2, crops=2)
    found = hiera_core.features(
        film, "hiera_nano_8x32", sampling=sampling, stages=(1, 3), dtype="fp32"
    )
    assert {n: tuple(v.shape) for n, v in found.items()} == {
        "stage1": (4, 24), "stage3": (4, 96), "start": (4,), "end": (4,),
    }  # fmt: skip
    selection = FeatureSelection((1, 3))
    runner = FeatureExtractor("hiera_nano_8x32", selection=selection, dtype="fp32").runner("video")
    for row, segment in enumerate(read_segments(film, sampling, runner.transform)[1]):
        each = [result["stage1"] for result in runner.run(segment.views)]
        assert_close(found["stage1"][row], torch.stack(each).mean(0))


def test_single_frames_of_an_image_model(film: Path, hiera: Command) -> None:
    code, out, _ = hiera("features", film, "-m", "hiera_nano_32", "--every", "2", "-b", "3")
    record = json.loads(out)
    assert code == 0 and record["start"] == [0.0, 2.0, 4.0, 6.0]
    assert record["features"]["embedding"]["shape"] == [4, 96]


def test_other_inputs_beside_videos(film: Path, tmp_path: Path) -> None:
    """An image has no segments, as in `predict`. A clip in memory has."""
    models = {"image": "hiera_nano_32", "video": "hiera_nano_8x32"}
    extractor = FeatureExtractor(
        lambda kind: hiera_core.models.factory.create_encoder(models[kind]),
        sampling=Sampling(segments=2.0),
    )
    paths = [str(SAMPLES / "three.png"), str(film), str(tmp_path / "none.mp4")]
    image, video, missing = extractor(hiera_core.data.sources.expand(paths))
    assert image.result["embedding"].shape == (96,) and "start" not in image.extra
    assert video.result["embedding"].shape == (4, 96)
    assert missing.status == "error"
    clip = np.zeros((75, 40, 40, 3), np.uint8)
    found = hiera_core.features(clip, "hiera_nano_8x32", segments=1.0)
    assert found["end"].tolist() == [1.0, 2.0, 2.5]


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_files_have_a_row_for_each_segment(
    film: Path, tmp_path: Path, hiera: Command, ending: str
) -> None:
    short = SAMPLES / "moving_right.mp4"
    path = tmp_path / f"x.{ending}"
    run = ["features", film, short, *VIDEO, "--segments", "2", "-o", path]
    code, out, err = hiera(*run)
    assert code == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["file"] for record in records] == [
        {"name": str(path), "row": 0, "rows": 4},
        {"name": str(path), "row": 4, "rows": 1},
    ]
    arrays, inputs = feature_formats.read(path)
    assert inputs == [str(film)] * 4 + [str(short)]
    assert arrays["start"].tolist() == [0.0, 2.0, 4.0, 6.0, 0.0]
    assert arrays["end"].tolist() == [2.0, 4.0, 6.0, 7.5, 2.0]
    assert arrays["embedding"].shape == (5, 96)
    expected = hiera_core.features(film, "hiera_nano_8x32", segments=2.0, dtype="fp32")
    assert_close(arrays["embedding"][:4], expected["embedding"])
    metadata = feature_formats.read_metadata(path)
    assert metadata["start"] == arrays["start"].tolist() and metadata["indices"] == [0, 0, 0, 0, 1]


def test_other_programs_find_the_times(film: Path, tmp_path: Path, hiera: Command) -> None:
    import pyarrow.parquet
    from safetensors.numpy import load_file

    run = ["features", film, *VIDEO, "--segments", "2", "-o"]
    for ending in FORMATS:
        assert hiera(*run, tmp_path / f"x.{ending}")[0] == 0
    for arrays in (np.load(tmp_path / "x.npz"), load_file(tmp_path / "x.safetensors")):
        assert arrays["end"].tolist() == [2.0, 4.0, 6.0, 7.5]
        assert arrays["embedding"].shape == (4, 96)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["input", "index", "start", "end", "embedding"]
    assert table["start"].to_pylist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("save_as", FORMATS)
def test_resume_keeps_the_rows_of_finished_videos(
    film: Path, tmp_path: Path, hiera: Command, save_as: str
) -> None:
    other = write_video(tmp_path / "other.mp4", frames=20, fps=8)
    clips = [SAMPLES / "moving_right.mp4", other]
    out_folder = tmp_path / "out"
    run = ["features", *VIDEO, "-o", out_folder, "--save-as", save_as, "--shard-size", "2"]
    code, out, _ = hiera(*run, film, *clips, film, "--segments", "1")
    first = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    (out_folder / Path(first[-1]["file"]["name"]).name).unlink()
    code, out, err = hiera(*run, film, *clips, film, "--segments", "1", "--resume")
    assert code == 0, err
    again = [json.loads(line) for line in out.splitlines()]
    for before, after in zip(first, again, strict=True):
        assert (after["start"], after["end"]) == (before["start"], before["end"])
        assert after["features"]["embedding"]["shape"] == before["features"]["embedding"]["shape"]
        arrays, names = feature_formats.read(after["file"]["name"])
        rows = slice(after["file"]["row"], after["file"]["row"] + after["file"]["rows"])
        assert names[rows] == [after["input"]] * after["file"]["rows"]
        assert arrays["start"][rows].tolist() == after["start"]
    for options in (["--segments", "2"], []):
        code, _, err = hiera(*run, film, *options, "--resume")
        assert code == 2 and "was made with views" in err, err


def test_resume_with_other_weights_is_refused(film: Path, tmp_path: Path, hiera: Command) -> None:
    """With --every, the model for images computes the features of videos."""
    other = write_video(tmp_path / "other.mp4", frames=8, fps=8)
    for options in ([*VIDEO, "--segments", "2"], ["-m", "hiera_nano_32", "--every", "2"]):
        folder = tmp_path / options[-2]
        run = ["features", film, *options, "-o", folder]
        assert hiera(*run)[0] == 0
        assert hiera(*run, SAMPLES / "moving_right.mp4", "--resume")[0] == 0
        run += [other, "--random-init", "--resume"]
        code, _, err = hiera(*run)
        assert code == 2 and "was made with weights" in err, err


@pytest.mark.parametrize(
    "change", [{"start": None}, {"end": [1.0]}, {"start": ["x"] * 2}, {"end": 3}]
)
def test_damaged_times_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata: dict[str, Any] = {
        "inputs": ["a", "a"], "indices": [0, 0], "occurrences": [0, 0], "kind": "video",
        "model": "m", "shapes": {"embedding": [2]}, "settings": {}, "start": [0, 1], "end": [1, 2],
    }  # fmt: skip
    arrays = {"embedding": np.zeros((2, 2), np.float32)}
    path = tmp_path / "video-00000.safetensors"
    feature_formats.write(path, arrays, metadata)
    assert feature_formats.read_metadata(path)["end"] == [1, 2]
    changed = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    feature_formats.write(path, arrays, changed)
    with pytest.raises(UsageError, match="features"):
        feature_formats.read_metadata(path)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--segments", "0"], "segments is 0"),
        (["--segments", "-1"], "segments is -1"),
        (["--segments", "nan"], "segments is nan"),
        (["--segments", "inf"], "segments is inf"),
        (["--segments", "1e30"], "segments is 1e+30"),
        (["--segments", "x"], "give a number"),
        (["--segments", "1", "--every", "1"], "choose one"),
        (["--segments", "1", "--pool", "none"], "--pool mean"),
        (["--segments", "1", "--stages", "1"], "--pool mean"),
        (["--segments", "1", "--return-intermediates"], "--pool mean"),
        (["--segments", "1", "--attention", "1"], "no maps, attention or drawings"),
        (["--segments", "1", "--visualize", "drawn"], "no maps, attention or drawings"),
        (["--every", "1"], "use --segments SECONDS"),
    ],
)
def test_bad_options_are_refused(
    film: Path,
    tmp_path: Path,
    hiera: Command,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = hiera("features", film, *VIDEO, *options, "-o", "out")
    assert code == 2 and message in err and not out, err
    assert len(err.splitlines()) == 1 and not any(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "drawn").exists()


def test_segments_and_pictures_are_not_combined(film: Path, hiera: Command) -> None:
    code, _, err = hiera("features", film, "-m", "hiera_nano_32", "--segments", "1")
    assert code == 2 and "use --every SECONDS" in err
    code, _, err = hiera("features", film, "-m", "hiera_nano_32")
    assert code == 1 and "--every SECONDS shows it single frames" in err
    for maps in (("--visualize", film.parent / "drawn"), ("--pool", "none"), ("--stages", "1")):
        code, _, err = hiera("features", film, "-m", "hiera_nano_32", *maps)
        assert code == 1 and "takes pictures; use a model for videos" in err, err
    code, _, err = hiera("features", SAMPLES / "three.png", *VIDEO, "--segments", "1")
    assert code == 1 and "takes video clips" in err
    code, out, _ = hiera("features", "-m", "hiera_nano_8x32", "--segments", "1", "--pool", "mean")
    assert code == 0 and "2 segments, 0.0 to 2.0 s" in out


# Batches and memory -------------------------------------------------------------------------------


class Runner:
    """Stands in for a model: the result of a view is its only value."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.calls: list[int] = []

    def run(self, views: Any) -> list[float]:
        self.calls.append(len(views))
        return [float(views[i][0]) for i in range(len(views))]


@pytest.mark.parametrize(
    ("batch", "views", "calls"),
    [
        (1, [1, 1, 1], [1, 1, 1]),
        (2, [1, 1, 1], [2, 1]),
        (4, [3, 3, 1], [3, 4]),
        (4, [6, 1, 1], [6, 2]),
        (10**6, [1] * 130, [64, 64, 2]),  # memory does not grow with the batch size
        (8, [], []),
    ],
)
def test_short_segments_share_batches(batch: int, views: list[int], calls: list[int]) -> None:
    held = highest = 0

    def make() -> Iterator[DecodedSegment]:
        nonlocal held, highest
        for number, count in enumerate(views):
            held += 1
            highest = max(highest, held)
            each = [np.array([number * 10 + i]) for i in range(count)]
            yield DecodedSegment(number, number + 1, each, each, [number])

    runner: Any = Runner(batch)
    found = []
    for segment, results in segments.run_segments(runner, make()):
        held -= 1
        found.append((segment.start, results))
    assert runner.calls == calls and highest <= 64
    expected = [(n, [n * 10.0 + i for i in range(count)]) for n, count in enumerate(views)]
    assert found == expected


def test_memory_does_not_grow_with_the_length_of_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy reports the frames to tracemalloc. Those of all segments would be 12 times as many."""
    peaks = []
    for seconds in (5, 60):
        path = write_video(tmp_path / f"{seconds}.mp4", frames=8 * seconds, fps=8)
        predict = FeatureExtractor("hiera_nano_8x32", sampling=Sampling(segments=0.5), workers=1)
        list(predict(hiera_core.data.sources.expand([str(path)])))  # what is allocated once
        tracemalloc.start()
        (record,) = predict(hiera_core.data.sources.expand([str(path)]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert record.result["embedding"].shape == (math.ceil(seconds / 0.5), 96)
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_predict_computes_segments_in_batches(film: Path) -> None:
    """The probabilities of a segment do not depend on the segments beside it."""
    results = []
    for batch in (1, 3):
        predictor = Predictor(
            "hiera_nano_8x32", sampling=Sampling(segments=1.0), batch_size=batch, dtype="fp32"
        )
        (record,) = predictor(hiera_core.data.sources.expand([str(film)]))
        results.append([s.topk[0].prob for s in record.segments or []])
    assert len(results[0]) == 8 and results[0] == pytest.approx(results[1], abs=1e-5)
