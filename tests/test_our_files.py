"""Tests of `hiera bench --from`: from files to answers, and decoding alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.benchmarking import peers, report, runner, workloads
from hiera_core.benchmarking.bench import file_inputs
from hiera_core.benchmarking.end_to_end import our_files, timm_files
from hiera_core.benchmarking.end_to_end.busy_clock import BusyClock
from hiera_core.benchmarking.end_to_end.our_files import FilesRun, TimedPredictor
from hiera_core.benchmarking.job import FileInputs, Job
from hiera_core.benchmarking.measurement import ANSWERS, DECODING
from hiera_core.data import sources
from hiera_core.errors import InputError, UsageError
from hiera_core.inference import pipeline

from .test_given_model import measure_in_process

Hiera = Callable[..., tuple[int, str, str]]
SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Return a folder of four images, of which one is in a subfolder, and a damaged one."""
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted(pictures.iterdir())):
        place = folder / "more" if number == 3 else folder
        place.mkdir(exist_ok=True)
        Image.open(path).convert("RGB").save(place / f"{path.stem}.jpg")
    (folder / "bad.jpg").write_bytes((folder / "chelsea.jpg").read_bytes()[:500])
    return folder


def job_of(folder: Path, model: str = "hiera_nano_32", **values: Any) -> Job:
    files = FileInputs([str(folder)], True, 2)
    return Job("hiera", model, batch=2, mode="files", files=files, **values)


def test_rows_of_a_folder(photos: Path) -> None:
    job = job_of(photos)
    both, alone = workloads.build(job)
    assert [(v.row.part, v.row.label) for v in (both, alone)] == [
        (ANSWERS, "files to answers"),
        (DECODING, "decoding alone"),
    ]
    for variant in (both, alone):
        assert variant.warm_up is not None
        variant.warm_up()
        variant.step()
        assert (variant.facts["inputs"], variant.facts["unreadable"]) == (4, 1)
    assert 0 <= both.facts["waiting"] < 1 and "waiting" not in alone.facts
    assert both.facts["batch"] == 2


def test_the_pipeline_is_that_of_predict(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a checkpoint give the records of `Predictor`, and decoding alone none of them."""
    hiera_core.create_model("hiera_nano_32", pretrained=True).save_pretrained(photos.parent / "own")
    name = str(photos.parent / "own")
    expected = list(
        hiera_core.Predictor(name, dtype="fp32")(sources.expand([str(photos)], recursive=True))
    )
    from hiera_core.benchmarking.given_model import describe_models

    job = job_of(photos, name, description=describe_models([name])[name])
    predictor = TimedPredictor(job)
    found = list(predictor(our_files.read_inputs(job.files)))
    assert [r.status for r in found] == [r.status for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert [p.id for p in one.topk] == [p.id for p in other.topk]
    computed: list[int] = []
    compute = hiera_core.Classifier.compute
    monkeypatch.setattr(
        hiera_core.Classifier,
        "compute",
        lambda self, x: computed.append(len(x)) or compute(self, x),
    )
    FilesRun(predictor, without_model=True)()
    assert computed == []
    FilesRun(predictor)()
    assert sum(computed) == 4


def test_the_share_of_waiting_is_that_of_the_time_without_the_model() -> None:
    clock = BusyClock(torch.device("cpu"))
    with clock.running():
        time.sleep(0.01)
    share = clock.idle_share(0.1)
    assert share is not None and share < 0.91
    clock.reset()
    assert clock.idle_share(0.1) == 1
    assert BusyClock(torch.device("mps")).idle_share(1.0) is None


def test_videos_are_measured(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "moving_right.mp4", tmp_path)
    both, alone = workloads.build(job_of(tmp_path, "hiera_nano_8x32"))
    for variant in (both, alone):
        variant.step()
        assert variant.facts["inputs"] == 1
    assert both.row.unit == "clips"


def test_files_are_read_as_by_predict_with_the_same_options(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, str]] = []
    decode = pipeline.decode_image

    def noted(content: Any, sampling: Any, *rest: Any) -> Any:
        seen.append((sampling.fast_jpeg, sampling.decoder))
        return decode(content, sampling, *rest)

    monkeypatch.setattr(pipeline, "decode_image", noted)
    job = job_of(photos)
    assert job.files is not None
    fast = dataclasses.replace(job, files=dataclasses.replace(job.files, fast_jpeg=True))
    for given, is_fast in ((job, False), (fast, True)):
        variants = workloads.build(Job.from_json(json.loads(json.dumps(dataclasses.asdict(given)))))
        for variant in variants:
            seen.clear()
            variant.step()
            assert set(seen) == {(is_fast, "pillow")} and variant.facts["inputs"] == 4
    ours, alone = (variant.row for variant in variants)
    assert (ours.label, alone.label) == (
        "files to answers, fast JPEG",
        "decoding alone, fast JPEG",
    )
    assert ours.key not in {variant.row.key for variant in workloads.build(job)}


def test_timm_reads_the_same_images(photos: Path) -> None:
    """Its data set counts what it cannot read, and its transform sees what ours sees."""
    job = dataclasses.replace(job_of(photos), implementation="timm")
    (variant,) = workloads.build(job)
    variant.step()
    assert (variant.facts["inputs"], variant.facts["unreadable"]) == (4, 1)
    assert 0 <= variant.facts["waiting"] <= 1 and variant.row.label == "timm, files to answers"
    transform = timm_files.timm_transform(job)
    image = Image.open(photos / "chelsea.jpg")
    predictor = TimedPredictor(job_of(photos)).classifier("image").transform
    ours = predictor.normalise(torch.from_numpy(predictor.crop(image))[None])[0]
    assert (transform(image) - ours).abs().mean() < 0.02
    with pytest.raises(peers.NotOffered, match="no Hiera for video"):
        workloads.build(dataclasses.replace(job, model="hiera_nano_8x32"))


def test_the_command_prints_the_rows(
    hiera: Hiera, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure", measure_in_process)
    run = ("bench", "-m", "hiera_nano_32", "--from", photos, "--dtype", "fp32", "-q")
    code, out, _ = hiera(*run, "--against", "timm")
    ours, decoding, timm = map(json.loads, out.splitlines())
    assert code == 0
    assert (ours["mode"], ours["part"], decoding["part"]) == ("files", ANSWERS, DECODING)
    assert [row["inputs"] for row in (ours, decoding, timm)] == [3, 3, 3]
    assert [row["unreadable"] for row in (ours, decoding, timm)] == [1, 1, 1]
    assert ours["throughput"] > 0 and timm["ratio"] > 0 and ours["p50_ms"] is None
    code, out, _ = hiera(*run, "-f", "table", "--recursive")
    header, *rows = out.splitlines()
    assert "waiting" in header and "unreadable" in header and "p50" not in header
    assert "files to answers" in rows[0] and "decoding alone" in rows[1]
    code, out, _ = hiera(*run, "--fast-jpeg")
    assert code == 0
    assert [json.loads(line)["reading"] for line in out.splitlines()] == ["fast JPEG"] * 2


def test_a_real_process_measures_files(photos: Path) -> None:
    """The facts of a run come from the worker."""
    rows = runner.measure(
        [job_of(photos)],
        dataclasses.replace(runner.RunLength(), seconds=0.01, runs=1, max_seconds=0.01, min_runs=1),
    )
    assert [row.error for row in rows] == [None, None]
    assert [row.inputs for row in rows] == [4, 4] and all(row.memory_mib for row in rows)
    assert rows[0].waiting is not None and rows[0].throughput


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--from", "none/"], 2, "no such file"),
        (["--from", "bad.jpg", "-m", "hiera_nano_32"], 1, "none of 1 inputs can be read"),
        (["--from", "more"], 2, "holds no pictures"),
        (["--from", "-"], 2, "only once"),
        (["--from", ""], 2, "the name is empty"),
        (["--from", "x.jpg", "--mode", "train"], 2, "leave out --mode"),
        (["--from", "x.jpg", "--attention", "eager"], 2, "leave out --attention"),
        (["--from", "x.jpg", "--against", "reference"], 2, "with timm alone"),
        (["--from", "x.jpg", "-m", "mae_hiera_nano_32"], 2, "has no classes"),
        (["--from", "x.jpg", "-m", "sam2_hiera_tiny"], 2, "SAM 2"),
        (["-j", "2"], 2, "add --from"),
        (["--recursive"], 2, "add --from"),
        (["--fast-jpeg"], 2, "add --from"),
        (["--decoder", "torchcodec"], 2, "add --from"),
        (["--from", "x.jpg", "--decoder", "gif"], 2, "--decoder"),
        (["--from", "x.jpg", "--decoder", "nvjpeg", "--fast-jpeg"], 2, "at a reduced one"),
        (["--from", "x.jpg", "-j", "0"], 2, "positive number"),
    ],
)
def test_bad_arguments_are_refused(
    hiera: Hiera,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.jpg", "bad.jpg"):
        Path(name).write_text("no image")
    Path("more").mkdir()
    if code == 1:
        monkeypatch.setattr(runner, "measure", measure_or_fail)
    else:
        monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("a worker was started"))
    found, _, err = hiera("bench", *arguments, "-q")
    assert found == code and message in err and "Traceback" not in err


def measure_or_fail(jobs: list[Job], *_: Any) -> Any:
    from hiera_core.errors import DeviceError

    try:
        FilesRun(TimedPredictor(jobs[0]))()
    except InputError as error:
        raise DeviceError(f"{jobs[0].model}: {error.message}") from error


def test_from_python(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure", measure_in_process)
    benchmark = hiera_core.bench("hiera_nano_32", files=photos, dtype="fp32")
    assert [row.part for row in benchmark.measurements] == [ANSWERS, DECODING]
    assert "waiting" in report.cells(benchmark.measurements)[0]
    with pytest.raises(UsageError, match="empty string"):
        hiera_core.bench("hiera_nano_32", files=[""])
    benchmark = hiera_core.bench("hiera_nano_32", files=photos, dtype="fp32", fast_jpeg=True)
    assert {row.reading for row in benchmark.measurements} == {"fast JPEG"}
    with pytest.raises(UsageError, match="give files, too"):
        hiera_core.bench("hiera_nano_32", decoder="torchcodec")
    for ignored in ({"mode": "train"}, {"attention": ("eager",)}):
        with pytest.raises(UsageError, match="as predict runs"):
            hiera_core.bench("hiera_nano_32", files=photos, **ignored)
    assert file_inputs([str(photos)]).workers >= 1


def test_the_first_file_chooses_the_model(
    hiera: Hiera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: asked.append(jobs[0].model) or [])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    hiera("bench", "--from", tmp_path, "-q")
    hiera("bench", "--from", SAMPLES / "moving_right.mp4", "-q")
    (tmp_path / "videos/deep").mkdir(parents=True)
    shutil.copy(SAMPLES / "moving_right.mp4", tmp_path / "videos/deep")
    hiera("bench", "--from", tmp_path / "videos", "--recursive", "-q")
    assert asked == ["hiera_base_224", "hiera_base_16x224", "hiera_base_16x224"]


def test_a_job_may_name_any_number_of_files(photos: Path, forked_workers: None) -> None:
    """A command line may not: Linux takes 128 KiB in an argument."""
    job = job_of(photos)
    assert job.files is not None
    many = [f"{photos}/{number:0200}.jpg" for number in range(2000)]
    job = dataclasses.replace(job, files=dataclasses.replace(job.files, inputs=many))
    with pytest.raises(runner.WorkerFailed, match="none of 2000 inputs"), runner.Worker(job) as one:
        one.run(0, 0.0)
