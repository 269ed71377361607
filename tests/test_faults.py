"""Tests of long runs with damaged files: each input has one record, with its own result."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hiera_core
from hiera_core.data import sources
from hiera_core.data.image_reader import open_image
from hiera_core.errors import InputError
from hiera_core.viz import annotate, output_names

from .conftest import SMALL, draw_weights
from .test_video_reader import SMALL_VIDEO, write_video

Command = Callable[..., tuple[int, str, str]]


def small_models(kind: Any) -> hiera_core.Hiera:
    """Build a small model for images or for videos."""
    config = SMALL if kind == "image" else SMALL_VIDEO
    return draw_weights(hiera_core.Hiera(**config))  # type: ignore[return-value]


def test_damaged_files_do_not_change_the_results_of_others(tmp_path: Path, pictures: Path) -> None:
    """Good images and clips have the results of a clean run, and the damaged ones have errors."""
    draw = random.Random(0)
    whole = [Image.open(path).convert("RGB") for path in sorted(pictures.iterdir())]
    names = []
    for i in range(190):
        image = whole[i % 4].resize((80 + i, 60 + i // 2))
        names.append(tmp_path / f"good_{i}.{'jpg' if i % 2 else 'png'}")
        image.save(names[-1])
    for i in range(10):
        names.append(write_video(tmp_path / f"good_{i}.mp4", frames=70 + 5 * i, size=(64, 48)))
    good = list(names)
    for i in range(40):
        content = good[5 * i + 4 if i > 1 else 190 + i].read_bytes()
        bad = tmp_path / f"bad_{i}.{'mp4' if i < 2 else 'jpg'}"
        kinds = (content[: len(content) // 3], b"", b"no picture", content[100:])
        bad.write_bytes(kinds[0] if i < 2 else kinds[i % 4])
        names.append(bad)
    draw.shuffle(names)

    predictor = hiera_core.Predictor(small_models, dtype="fp32")
    mixed = [r.to_json() for r in predictor(sources.expand(map(str, names)))]
    assert [r["input"] for r in mixed] == [str(name) for name in names]
    assert [r["index"] for r in mixed] == list(range(240))
    failed = [r for r in mixed if r["status"] == "error"]
    assert len(failed) == 40 and all("bad_" in r["input"] for r in failed)

    clean = {r.input: r for r in predictor(sources.expand(map(str, good)))}
    for record in mixed:
        if record["status"] != "error":
            alone = clean[record["input"]]
            assert [g["id"] for g in record["topk"]] == [g.id for g in alone.topk]
            assert [g["prob"] for g in record["topk"]] == pytest.approx(
                [g.prob for g in alone.topk], abs=1e-6
            )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_every_truncation_of_a_picture_is_detected(pictures: Path, format: str) -> None:
    file = io.BytesIO()
    Image.open(pictures / "coffee.png").convert("RGB").resize((160, 120)).save(file, format)
    whole = file.getvalue()
    expected = np.asarray(open_image(whole)[0])
    errors = 0
    for step in range(64):
        try:
            image, _ = open_image(whole[: len(whole) * step // 64])
        except InputError:
            errors += 1
        else:
            assert np.array_equal(np.asarray(image), expected), f"cut at {step}/64"
    assert errors >= 60


def test_results_do_not_wait_for_a_slow_producer(pictures: Path) -> None:
    """A result is ready before the next input arrives, although the batch is not full."""
    path = str(pictures / "coffee.png")
    predictor = hiera_core.Predictor(small_models, batch_size=8)
    results: list[str] = []

    def names() -> Any:
        yield sources.Source("first", Path(path))
        for _ in range(200):
            if results:
                break
            time.sleep(0.05)
        assert results == ["first"]
        yield sources.Source("second", Path(path))

    for record in predictor(names()):
        results.append(record.input)
    assert results == ["first", "second"]


def test_save_images_writes_annotated_pictures(
    hiera: Command, small_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(pictures / "coffee.png", f"{folder}/x.png")
    Image.open("a/x.png").save("a/y.webp")
    Path("a/z.png").write_text("damaged")
    arguments = ("predict", "a", "b", "-m", small_folder, "--save-images", "shown")
    code, out, _ = hiera(*arguments)
    written = sorted(str(p.relative_to("shown")) for p in Path("shown").rglob("*.*"))
    assert code == 1 and written == ["a/x.png", "b/x.png", "y.png"]
    with Image.open("shown/a/x.png") as annotated, Image.open("a/x.png") as original:
        assert annotated.width == min(original.width, 640) and annotated.height > 400 + 5 * 20
        picture = np.asarray(annotated)[:400].astype(int)
        best = json.loads(out.splitlines()[0])["topk"][0]["prob"]
        bar = np.asarray(annotated)[-6 - 5 * 20 + 10]  # the middle row of the first bar
        blue = (bar == annotate.BAR).all(-1).sum()
        assert picture.shape == (400, 600, 3)
        assert 0 < blue <= best * 600
    code, _, err = hiera(*arguments)
    assert code == 2 and "not empty" in err
    code, _, _ = hiera(*arguments, "--overwrite")
    assert code == 1
    Path("file").touch()
    code, _, err = hiera("predict", "a", "-m", small_folder, "--save-images", "file")
    assert code == 2 and "is a file" in err


def test_contact_sheets_show_at_most_60_frames(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "x.mp4", frames=180)
    sampling = hiera_core.Sampling(every=0.05)
    (record,) = hiera_core.Predictor(small_models, sampling=sampling, keep_thumbnails=True)(
        sources.expand([str(clip)])
    )
    assert record.segments is not None and len(record.segments) == 120
    assert len(record.thumbnails) == 60, "at most 60, evenly spread"
    assert [s.seconds for s in record.thumbnails][:3] == pytest.approx([0, 0.1, 0.2], abs=0.04)
    sheet = annotate.draw_record(record)
    assert sheet.width * sheet.height > 60 * 32 * 32


def test_output_paths_stay_below_the_folder() -> None:
    def stems(*names: str) -> list[str]:
        found = [next(sources.expand([name])) for name in names]
        named = output_names.OutputNames(Path("out"), lambda: found).assign(found)
        return [source.output_stem for source in named]

    for name, expected in [
        ("a/x.jpg", "x"),
        ("/a/x.webp", "x"),
        ("../../x.JPG", "x"),
        ("http://host:8000/a/x.png?size=3", "x"),
        ("x.webp.png", "x.webp"),
        ("x", "x"),
        ("x.v2", "x.v2"),
        ("C:\\photos\\..\\x.png", "x"),
    ]:
        assert stems(name) == [expected]
    long = stems(*(f"{'é' * 125}{i}.jpg" for i in range(2)))
    assert long[0] != long[1] and all(len(os.fsencode(f"{stem}.png")) < 255 for stem in long)


def test_read_only_folders_are_refused(hiera: Command, small_folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    try:
        (locked / "probe").touch()
        pytest.skip("this user may write anywhere")
    except PermissionError:
        pass
    for option in ("-o", "--save-images"):
        code, _, err = hiera("predict", "x.jpg", "-m", small_folder, option, locked / "out.jsonl")
        assert code == 2 and "read-only" in err


def test_long_lists_are_streamed(hiera: Command, small_folder: Path, tmp_path: Path) -> None:
    """A long list is streamed: the first record does not wait for the end of the list."""
    (tmp_path / "list.txt").write_text("".join(f"gone_{i}.jpg\n" for i in range(100_000)))
    code, out, err = hiera(
        "predict", f"@{tmp_path}/list.txt", "-m", small_folder, "--on-error", "stop"
    )
    assert code == 1 and out.count("\n") == 1 and "gone_0.jpg" in err
    predictor = hiera_core.Predictor(str(small_folder))
    last = -1
    for record in predictor(sources.expand([f"@{tmp_path}/list.txt"])):
        assert (record.index, record.input) == (last + 1, f"gone_{last + 1}.jpg")
        last = record.index
    assert last == 99_999
