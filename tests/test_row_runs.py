"""Tests of --rows and --dry-run: a row for each input, whoever wrote it, and nothing twice."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hiera_core

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from hiera_core.data.sources import Source
from hiera_core.inference import Classifier, Embedder
from hiera_core.inference.columns.decoded_bytes import from_bytes
from hiera_core.scale import ray_engine

SAMPLES = Path(hiera_core.__file__).parent / "zoo/assets/samples"
Command = Callable[..., tuple[int, str, str]]
MODEL = ("-m", "hiera_nano_32", "--dtype", "fp32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven inputs, one of them damaged."""
    (tmp_path / "in").mkdir()
    for number in range(7):
        name = ("eight", "three", "five")[number % 3]
        (tmp_path / f"in/{number}.png").write_bytes((SAMPLES / f"{name}.png").read_bytes())
    (tmp_path / "in/4.png").write_bytes(b"damaged")
    return tmp_path / "in"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows, as any reader of Parquet finds them."""
    return pq.read_table(folder).sort_by("index").to_pylist()


def same(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether rows are equal, but for the rounding of other batches."""
    if [row.keys() for row in rows] != [row.keys() for row in others]:
        return False
    for row, other in zip(rows, others, strict=True):
        for name in row:
            close = row[name] == other[name]
            if name == "embedding" and row[name] is not None and other[name] is not None:
                close = bool(np.allclose(row[name], other[name], atol=1e-6))
            if name == "topk" and row[name]:
                close = all(
                    (a["id"], a["label"], round(a["prob"], 5))
                    == (b["id"], b["label"], round(b["prob"], 5))
                    for a, b in zip(row[name], other[name], strict=True)
                )
            if not close:
                return False
    return True


def test_a_row_holds_what_a_record_holds(hiera: Command, folder: Path, tmp_path: Path) -> None:
    _, out, _ = hiera("predict", folder, *MODEL, "-q")
    code, printed, err = hiera("predict", folder, *MODEL, "--rows", tmp_path / "rows")
    assert code == 1 and printed == "" and "hiera: 6 ok, 1 failed" in err
    records = [json.loads(line) for line in out.splitlines()]
    for row, record in zip(read_rows(tmp_path / "rows"), records, strict=True):
        for name in ("input", "index", "status", "kind", "model", "notes"):
            assert row[name] == record[name]
        assert [one["id"] for one in row["topk"]] == [one["id"] for one in record["topk"]]
        error = record["error"] or {"type": None, "message": None, "hint": None}
        assert {key: row[f"error_{key}"] for key in error} == error


def test_videos_have_their_facts(hiera: Command, tmp_path: Path) -> None:
    clip = SAMPLES / "moving_right.mp4"
    given = ("-m", "hiera_nano_8x32", "--dtype", "fp32", "--segments", "0.5")
    _, out, _ = hiera("predict", clip, *given, "-q", "-f", "jsonl")
    assert hiera("predict", clip, *given, "--rows", tmp_path / "rows")[0] == 0
    (row,), record = read_rows(tmp_path / "rows"), json.loads(out)
    assert row["video"] == record["video"] and row["segments"] == record["segments"]


def test_rows_of_one_input_are_counted(hiera: Command, tmp_path: Path) -> None:
    """Standard output is empty, so that nothing else says whether the input was read."""
    given = ("predict", SAMPLES / "three.png", *MODEL, "--rows", tmp_path / "rows")
    for more in ((), ("--resume",)):
        code, out, err = hiera(*given, *more)
        assert (code, out) == (0, "") and "hiera: 1 ok, 0 failed\n" in err
    assert hiera(*given, "--resume", "-q")[2] == ""


@pytest.mark.parametrize("command", ["features", "predict"])
def test_hints_name_only_what_the_rows_take(hiera: Command, tmp_path: Path, command: str) -> None:
    """A row of features holds one vector, so there are no single frames of a video."""
    clip = SAMPLES / "moving_right.mp4"
    assert hiera(command, clip, *MODEL, "-q", "--rows", tmp_path / "rows")[0] == 1
    (row,) = read_rows(tmp_path / "rows")
    assert row["error_message"] == "a video, and hiera_nano_32 takes pictures"
    assert ("--every" in row["error_hint"]) == (command == "predict")
    assert "hiera_base_16x224" in row["error_hint"]
    on_columns = (Embedder if command == "features" else Classifier)("hiera_nano_32", workers=1)
    decoder = pickle.loads(pickle.dumps(ray_engine._decoder_of(on_columns)))  # as on a cluster
    (decoded,) = decoder.decode(iter([Source(str(clip), path=clip)]))
    assert from_bytes(decoded).record.error.hint == row["error_hint"]  # type: ignore[union-attr]


def test_shards_of_rows_are_one_data_set_and_resume(
    hiera: Command, folder: Path, tmp_path: Path
) -> None:
    given = ("features", folder, *MODEL, "--rows")
    assert hiera(*given, tmp_path / "whole")[0] == 1
    for index in range(3):
        hiera(*given, tmp_path / "parts", "--shard", f"{index}/3")
    whole = read_rows(tmp_path / "whole")
    assert same(read_rows(tmp_path / "parts"), whole)
    assert [row["embedding"] is None for row in whole] == [n == 4 for n in range(7)]
    files = sorted((tmp_path / "parts").glob("*.parquet"))
    assert [file.name[:20] for file in files] == [f"shard-0000{n}-of-00003"[:20] for n in range(3)]
    # What is missing is done again, and nothing else.
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    for index in range(3):
        code, _, err = hiera(*given, tmp_path / "parts", "--shard", f"{index}/3", "--resume")
        assert code in (0, 1), err
    assert same(read_rows(tmp_path / "parts"), whole)
    assert files[0].stat().st_mtime_ns == before
    assert hiera(*given, tmp_path / "parts", "--shard", "0/2")[0] == 2
    # All inputs beside shards of them, or the other way round, would be there twice.
    for rows, shard, name in (
        ("parts", "none", "over 3 shards"),
        ("whole", "0/3", "over all inputs"),
    ):
        code, _, err = hiera(*given, tmp_path / rows, "--shard", shard, "--overwrite")
        assert code == 2 and name in err, err


def test_rows_that_were_written_twice_are_removed(
    hiera: Command, folder: Path, tmp_path: Path
) -> None:
    given = ("features", folder, *MODEL, "--rows", tmp_path / "rows")
    hiera(*given)
    whole = read_rows(tmp_path / "rows")
    (file,) = (tmp_path / "rows").glob("*.parquet")
    late = pq.read_table(file).slice(2, 3)
    pq.write_table(late, tmp_path / "rows/part-000000000002-late.parquet")
    assert len(read_rows(tmp_path / "rows")) == 10
    code, _, err = hiera(*given, "--resume")
    assert code == 1 and "6 ok, 1 failed" in err
    assert read_rows(tmp_path / "rows") == whole


def test_shard_size_is_the_rows_of_a_file(hiera: Command, folder: Path, tmp_path: Path) -> None:
    given = ("features", folder, *MODEL, "-q", "--rows", tmp_path / "rows", "--shard-size", 3)
    assert hiera(*given)[0] == 1
    counts = [len(pq.read_table(path)) for path in sorted((tmp_path / "rows").glob("part-*"))]
    assert counts == [3, 3, 1]


def test_a_place_without_its_package_costs_its_row(
    hiera: Command, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.txt").write_text(f"{folder}/0.png\nadl://bucket/a.png\n{folder}/1.png\n")
    given = ("--manifest", tmp_path / "m.txt", "--private-urls", "--rows", tmp_path / "rows")
    assert hiera("features", *given, *MODEL, "-q")[0] == 1
    rows = read_rows(tmp_path / "rows")
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert "adl:// needs" in rows[1]["error_message"]


def test_ids_come_through(hiera: Command, folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"path": [f"{folder}/{n}.png" for n in range(7)], "id": range(100, 107)})
    pq.write_table(table, tmp_path / "m.parquet")
    given = ("--manifest", tmp_path / "m.parquet", "--rows", tmp_path / "rows")
    assert hiera("features", *given, *MODEL)[0] == 1
    assert [row["id"] for row in read_rows(tmp_path / "rows")] == list(range(100, 107))


def test_other_inputs_options_and_weights_do_not_resume(
    hiera: Command, folder: Path, tmp_path: Path
) -> None:
    given = ("--rows", tmp_path / "rows", "--resume", "-q")
    assert hiera("predict", folder, *MODEL, *given)[0] == 1
    for arguments, message in (
        (("predict", folder, *MODEL, *given, "-k", 3), "topk"),
        (("predict", folder, "-m", "hiera_nano_32", "--random-init", *given), "weights"),
    ):
        (folder / "8.png").write_bytes((SAMPLES / "eight.png").read_bytes())
        code, _, err = hiera(*arguments, "--dtype", "fp32")
        assert code == 2 and message in err, err
    (folder / "0.png").unlink()
    code, _, err = hiera("predict", folder, *MODEL, *given)
    assert code == 2 and "input 0 is" in err
    (part,) = (tmp_path / "rows").glob("part-*")
    part.write_bytes(part.read_bytes()[:100])
    code, _, err = hiera("predict", folder, *MODEL, *given)
    assert code == 2 and "is damaged" in err


def test_options_that_contradict_are_named(hiera: Command, folder: Path, tmp_path: Path) -> None:
    rows = ("--rows", tmp_path / "rows")
    for arguments, message in (
        (("predict", folder, *rows, "-o", tmp_path / "x.jsonl"), "--rows and --output"),
        (("predict", folder, *rows, "-f", "csv"), "--rows and --format"),
        (("predict", *rows), "there are no INPUTS"),
        (("predict", folder, "--engine", "ray"), "--engine ray needs --rows"),
        (("predict", folder, *rows, "--address", "auto"), "--address needs --engine ray"),
        (("predict", folder, *rows, "--engine", "ray", "--shard", "0/2"), "divides the inputs"),
        (("features", folder, *rows, "--return-intermediates"), "a row holds vectors"),
        (("features", folder, *rows, "--segments", "1"), "a row holds vectors"),
        (("features", folder, *rows, "--save-as", "npz"), "--rows and --save-as"),
        (("features", folder, *rows, "-f", "csv"), "--rows and --format"),
        (("features", folder, *rows, "--retry-failed"), "needs --rows and --resume"),
        (("predict", folder, "--resume", "--retry-failed"), "needs --rows and --resume"),
        (
            ("features", folder, *rows, "--engine", "ray", "--device", "cuda:1"),
            "chooses the device",
        ),
        (("features", folder, *rows, "--engine", "ray", "--device", "cuda:all"), "chooses the dev"),
    ):
        code, _, err = hiera(*arguments, *MODEL)
        assert code == 2 and message in err, err


@pytest.mark.parametrize("command", ["predict", "features"])
def test_a_dry_run_writes_nothing(
    hiera: Command, folder: Path, tmp_path: Path, command: str
) -> None:
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{folder}/{n % 7}.png\n" for n in range(70_000)))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = hiera(command, "--manifest", manifest, *MODEL, "--dry-run", 14)
    assert code == 0 and out == ""
    first, second, third = err.splitlines()
    assert first.startswith("hiera: 7 inputs in ") and "on cpu: " in first
    assert second.startswith("hiera: all 70000 inputs: ") and re.search(
        r" [kMG]B to read, .* [kMG]B of rows", second
    )
    assert third.startswith("hiera: within a day: ") and "process" in third
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_of_another_command_and_of_an_earlier_run_are_named(
    hiera: Command, tmp_path: Path
) -> None:
    one = SAMPLES / "eight.png"
    given = (one, *MODEL, "--rows", tmp_path / "rows")
    assert hiera("features", *given)[0] == 0
    code, _, err = hiera("predict", *given, "--resume")
    assert code == 2 and "was made by hiera features, not by hiera predict; " in err, err
    code, _, err = hiera("features", *given)
    assert code == 2 and "holds rows of an earlier run; --resume continues it" in err, err


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (
            {"inputs": 1, "seconds": 0.0153, "read": 400, "written": 6300, "total": 3},
            ["1 input in 0.015 s on cpu: 65.4/s", "all 3 inputs: 0.0459 s in", "1.2 kB to read"],
        ),
        (
            {"inputs": 10, "seconds": 36.0, "read": 10**7, "written": 10**4, "total": 100},
            ["10 inputs in 36.0 s", "6 minutes in", "100 MB to read, 100 kB of rows to write"],
        ),
        (
            {"inputs": 1, "seconds": 3.6, "read": 0, "written": 0, "total": 1000},
            ["1 input in 3.6 s", "all 1000 inputs: 1 hour in", "0 kB to read"],
        ),
        (
            {"inputs": 10, "seconds": 36.0, "read": 10**7, "written": 10**4, "total": 10**6},
            ["all 1000000 inputs: 1,000 hours in", "1,000 GB to read, 1 GB of rows", "42 such"],
        ),
    ],
)
def test_an_estimate_has_units_that_suit_it(figures: dict[str, Any], text: list[str]) -> None:
    from hiera_core.scale.estimate import Estimate

    lines = "\n".join(Estimate(failed=0, device="cpu", **figures).lines())
    for part in text:
        assert part in lines, lines
