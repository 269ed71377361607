"""Tests of --shard and --manifest: the shards together are the run of one process."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.inference import feature_formats

SAMPLES = Path(hiera_core.__file__).parent / "zoo/assets/samples"
Command = Callable[..., tuple[int, str, str]]
MODEL = ("-m", "hiera_nano_32", "--dtype", "fp32", "-q")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven inputs, one of them damaged."""
    (tmp_path / "in").mkdir()
    for number in range(7):
        name = ("eight", "three", "five")[number % 3]
        (tmp_path / f"in/{number}.png").write_bytes((SAMPLES / f"{name}.png").read_bytes())
    (tmp_path / "in/4.png").write_bytes(b"damaged")
    return tmp_path / "in"


def rows(*texts: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for text in texts for line in text.splitlines()]
    return sorted(found, key=lambda row: row["index"])


def rounded(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of other sizes may round in another way."""
    for row in found:
        for one in row["topk"]:
            one["prob"] = round(one["prob"], 5)
    return found


def test_shards_together_are_one_run(hiera: Command, folder: Path, tmp_path: Path) -> None:
    code, out, _ = hiera("predict", folder, *MODEL)
    assert code == 1
    output = tmp_path / "out.jsonl"
    codes = [hiera("predict", folder, *MODEL, "-o", output, "--shard", f"{i}/3")[0] for i in (0, 2)]
    part = tmp_path / "shard-00001-of-00003-out.jsonl"
    codes.append(hiera("predict", folder, *MODEL, "-o", output, "--shard", "1/3")[0])
    assert sorted(codes) == [0, 0, 1]
    # An interrupted shard goes on, and does nothing twice.
    first, _ = part.read_text().splitlines(keepends=True)
    part.unlink()
    part.with_name(part.name + ".partial").write_text(first[:-1] + "\n" + first[:10])
    code, _, err = hiera("predict", folder, *MODEL, "-o", output, "--shard", "1/3", "--resume")
    assert part.read_text().startswith(first), err
    files = sorted(tmp_path.glob("shard-*"))
    assert [f.name for f in files] == [f"shard-0000{i}-of-00003-out.jsonl" for i in range(3)]
    assert rounded(rows(*(f.read_text() for f in files))) == rounded(rows(out))
    code, _, err = hiera("predict", folder, *MODEL, "-o", output, "--shard", "0/4")
    assert code == 2 and "is of a run over 3 shards, and this one has 4" in err


def test_a_shard_may_be_empty(hiera: Command, tmp_path: Path) -> None:
    one = SAMPLES / "eight.png"
    output = tmp_path / "out.jsonl"
    code, _, err = hiera("predict", one, *MODEL, "-o", output, "--shard", "1/2")
    assert code == 0, err
    assert (tmp_path / "shard-00001-of-00002-out.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "environment, line",
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            "hiera: shard 1/2, by torchrun (RANK, WORLD_SIZE); --shard none takes all inputs",
        ),
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
            },
            "hiera: shard 1/2, by srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS); --shard none takes all"
            " inputs",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "hiera: this job has 2 tasks, and one process takes all inputs; srun in front of hiera "
            "divides them",
        ),
    ],
    ids=["torchrun", "srun", "script"],
)
def test_a_launcher_chooses_the_shard_and_says_so(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], line: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names = [SAMPLES / "eight.png", SAMPLES / "three.png"]
    code, out, err = hiera("predict", *names, *MODEL, "-k", 1, "-f", "jsonl")
    assert code == 0 and line in err.splitlines()
    indices = [row["index"] for row in rows(out)]
    assert indices == ([1] if "shard" in line.split(";")[0] else [0, 1])
    # torchrun would end the other processes if this one had another exit code than 0.
    code, _, _ = hiera("predict", *names, "missing.png", "missing.png", *MODEL, "-f", "jsonl")
    assert code == (0 if "RANK" in environment else 1)
    code, out, err = hiera("predict", *names, *MODEL, "-f", "jsonl", "--shard", "none")
    assert [row["index"] for row in rows(out)] == [0, 1] and not err


def test_a_manifest_gives_ids(hiera: Command, folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "file"])
        writer.writerows([[f"k{n}", folder / f"{n}.png"] for n in range(7)])
    given = ("--manifest", tmp_path / "m.csv", "--id-column", "key")
    code, whole, _ = hiera("predict", *given, *MODEL)
    assert code == 1
    assert [row["id"] for row in rows(whole)] == [f"k{n}" for n in range(7)]
    parts = [hiera("predict", *given, *MODEL, "--shard", f"{i}/2")[1] for i in range(2)]
    assert rounded(rows(*parts)) == rounded(rows(whole))
    assert [row["index"] for row in rows(parts[1])] == [3, 4, 5, 6]  # contiguous


def test_shards_of_features_are_in_one_folder(hiera: Command, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{folder}/{n}.png\n" for n in range(7)))
    given = ("--manifest", manifest, *MODEL, "-o", tmp_path / "out", "--save-as", "parquet")
    assert [hiera("features", *given, "--shard", f"{i}/2")[0] for i in range(2)] == [0, 1]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"shard-0000{i}-of-00002-image-00000.parquet" for i in range(2)]
    table = pq.read_table(tmp_path / "out")  # readable as one data set
    assert table["index"].to_pylist() == [0, 1, 2, 3, 5, 6]
    assert feature_formats.read_metadata(tmp_path / "out" / names[1])["indices"] == [3, 5, 6]
    code, _, err = hiera("features", *given, "--shard", "0/2")
    assert code == 2 and "has files of this shard" in err
    assert hiera("features", *given, "--shard", "0/2", "--resume")[0] == 0
    code, _, err = hiera("features", *given, "--shard", "0/3", "--overwrite")
    assert code == 2 and "is of a run over 2 shards" in err
    code, _, err = hiera("features", *given, "--shard", "none", "--overwrite")
    assert code == 2 and "is of a run over 2 shards" in err
    for path in (tmp_path / "out").iterdir():
        path.rename(path.with_name("image-00000.parquet"))
    code, _, err = hiera("features", *given, "--shard", "0/2")
    assert code == 2 and "is of a run over all inputs" in err


def test_mistakes_are_named(hiera: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text(f"{folder}/0.png\n")
    for arguments, message in (
        (("predict",), "there are no INPUTS"),
        (("predict", folder, "--manifest", tmp_path / "m.txt"), "both inputs and --manifest"),
        (("predict", folder, "--id-column", "key"), "need --manifest"),
        (("predict", folder, "--shard", "3/3"), "counted from 0"),
        (("predict", folder, "--shard", "0/3", "--save-images", tmp_path / "p"), "--save-images"),
        (("features", folder, "--shard", "0/3", "--visualize", tmp_path / "p"), "--visualize"),
    ):
        code, _, err = hiera(*arguments, *MODEL)
        assert code == 2 and message in err, err


@pytest.mark.parametrize("command", ["predict", "features"])
def test_csv_and_tables_have_the_ids_of_a_manifest(
    hiera: Command, tmp_path: Path, command: str
) -> None:
    manifest = tmp_path / "m.tsv"
    names = (SAMPLES / "eight.png", "missing.png")
    manifest.write_text("id\tpath\n" + "".join(f"k {n}\t{name}\n" for n, name in enumerate(names)))
    given = (command, "--manifest", manifest, *MODEL)
    _, out, _ = hiera(*given, "-f", "csv")
    found = list(csv.DictReader(io.StringIO(out)))
    assert [row["id"] for row in found] == ["k 0", "k 1"]
    assert [row["status"] for row in found] == ["ok", "error"]
    _, out, _ = hiera(*given, "-f", "table")
    assert f"{names[0]}  id k 0\n" in out and "missing.png  id k 1  error\n" in out
    _, out, _ = hiera(command, names[0], *MODEL, "-f", "csv")
    assert "id" not in out.splitlines()[0].split(",")


def test_a_manifest_with_only_a_header_is_empty(hiera: Command, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,path\n")
    for command in ("predict", "features"):
        code, _, err = hiera(command, "--manifest", tmp_path / "m.csv", *MODEL, "-f", "jsonl")
        assert code == 2 and err == "hiera: no inputs; the manifest is empty\n"
