"""`hiera bench`: what it measures, says and writes. No test asserts a time."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiera_core import zoo
from hiera_core.benchmarking import machine, peers, report, runner, timer, workloads
from hiera_core.benchmarking.compare import Change, compare
from hiera_core.benchmarking.job import Job, Measurement, RunLength, add_ratios
from hiera_core.errors import DeviceError, UsageError

Hiera = Callable[..., tuple[int, str, str]]
SHORT = RunLength(seconds=0.02, runs=2, max_seconds=0.02, min_runs=2, round_seconds=0.01)
NANO = Job("hiera", "hiera_nano_32", batch=2)


def row(median: float = 0.1, spread: float = 0.01, count: int = 40, **values: Any) -> Measurement:
    """A row with samples evenly spread around a median."""
    offsets = [((7 * i) % count) / count - 0.5 for i in range(count)]
    given = {"attention": "fused", "compiled": False, "mode": "infer", "device": "cpu"} | values
    found = Measurement("hiera_nano_32", "hiera", dtype="fp32", batch=8, **given)
    found.samples_s = [median * (1 + spread * x) for x in offsets]
    found.matmul_gflops = found.matmul_gflops or 100.0
    return found


# The command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str]]:
    """A run with a peer and every kind of file -> (their folder, exit code, table)."""
    from hiera_cli.app import run

    folder = tmp_path_factory.mktemp("bench")
    exports = [f"--export={folder / name}" for name in ("out.json", "out.csv", "out.md")]
    code = run(
        [
            *("bench", "hiera_nano_32", "--seconds", "0.05", "-b", "2", "--dtype", "fp32"),
            *("--against", "reference,vit", "--plot", str(folder / "out.png")),
            *("-o", str(folder / "out.txt"), *exports),
        ]
    )
    yield folder, code, (folder / "out.txt").read_text()


def test_a_run_and_its_files(measured: tuple[Path, int, str]) -> None:
    folder, code, table = measured
    assert code == 0
    assert "fused" in table and "eager" in table and "reference" in table
    document = json.loads((folder / "out.json").read_text())
    assert "smaller batches" in " ".join(document["header"]["changes"])
    rows = {row["attention"] or row["implementation"]: row for row in document["rows"]}
    assert set(rows) == {"fused", "eager", "reference"}  # there is no ViT of this size
    for found in rows.values():
        assert found["runs"] == len(found["samples_s"]) >= 3
        assert found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
        assert found["throughput"] == pytest.approx(2 / found["median_ms"] * 1e3)
        assert found["params"] == zoo.get("hiera_nano_32").params
        assert found["gmacs"] == pytest.approx(0.011, rel=0.02)
        assert found["matmul_gflops"] > 0 and found["memory_mib"] > 0
    assert rows["fused"]["speedup"] and rows["reference"]["ratio"]
    assert rows["reference"]["version"] == "0.1.4"
    with (folder / "out.csv").open() as file:
        assert [line["attention"] for line in csv.DictReader(file)] == ["fused", "eager", ""]
    lines = (folder / "out.md").read_text().splitlines()
    assert sum(line.startswith("| hiera_nano_32") for line in lines) == 3
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_compare_tells_a_planted_slowdown_from_a_repeat(
    measured: tuple[Path, int, str], hiera: Hiera, tmp_path: Path
) -> None:
    """The rows just measured against themselves, and against a past that was 20% faster."""
    rows = report.read(measured[0] / "out.json")
    steady = [replace(r, samples_s=row(r.samples_s[0]).samples_s) for r in rows]
    assert {c.verdict for c in compare(steady, steady, 0.05)} == {"same"}
    faster = [replace(r, samples_s=[s / 1.2 for s in r.samples_s]) for r in steady]
    changes = compare(faster, steady, 0.05)
    assert {c.verdict for c in changes} == {"slower"}
    assert all(c.change == pytest.approx(0.2) for c in changes)


def test_compare_sets_the_exit_code(
    hiera: Hiera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [row(0.12)])
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    report.export(tmp_path / "old.json", header, [row(0.1)])
    old = ("bench", "hiera_nano_32", "--compare", tmp_path / "old.json")
    code, _, err = hiera(*old)
    assert code == 1 and "slower, time +20.0%" in err
    code, _, err = hiera(*old, "--fail-over", "30%")
    assert code == 0 and "0 of 1 rows slower" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["hiera_base_242"], 2, "did you mean"),
        (["hiera_nano_32", "--device", "cuda"], 5, "not available here"),
        (["hiera_nano_32", "--against", "tim"], 2, "did you mean timm"),
        (["hiera_nano_32", "--against", "reference:fp8"], 2, "unknown dtype"),
        (["hiera_nano_32", "--batch-sizes", "1,x"], 2, "neither auto nor a positive number"),
        (["hiera_nano_32", "--fail-over", "much"], 2, "no percentage"),
        (["hiera_nano_32", "--export", "out.xls"], 2, "end it in .json"),
        (["hiera_nano_32", "--compare", "none.json"], 2, "holds no measurements"),
        (["hiera_nano_32", "--plot", "none/out.png"], 2, "make it first"),
        (["--all", "hiera_nano_32"], 2, "give one of them"),
    ],
)
def test_bad_input_is_found_before_work(
    arguments: list[str], code: int, words: str, hiera: Hiera, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("work has begun"))
    got, out, err = hiera("bench", *arguments)
    assert (got, out) == (code, "")
    assert words in err


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"timm is not installed; pip install timm"):
        peers.check("timm")


def test_a_plot_without_matplotlib_is_refused_before_work(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("work has begun"))
    code, out, err = hiera("bench", "hiera_nano_32", "--plot", tmp_path / "out.png")
    assert (code, out) == (2, "")
    assert "needs matplotlib" in err and "pip install 'hiera-toolkit[plots]'" in err
    assert list(tmp_path.iterdir()) == []


def test_all_means_the_ten_classifiers(hiera: Hiera, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: seen.append(jobs) or [row()])
    assert hiera("bench", "--all", "-q")[0] == 0
    assert len(seen) == 10 and all(j.attentions == ("fused", "eager") for (j,) in seen)
    assert {j.model for (j,) in seen} == {m.name for m in zoo.models().values() if m.speed}


# What is measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "timm", "transformers", "hiera-optim"])
@pytest.mark.parametrize(
    ("model", "mode"), [("hiera_nano_32", "infer"), ("mae_hiera_nano_32", "grad")]
)
def test_peers_are_the_same_model(name: str, model: str, mode: Any) -> None:
    job = Job(name, model, batch=2, mode=mode)
    if name == "timm" and mode == "grad":
        with pytest.raises(peers.NotOffered, match="no Hiera autoencoder"):
            workloads.build(job)
        return
    (variant,) = workloads.build(job)
    assert variant.row.params == pytest.approx(zoo.get(model).params, abs=10)
    assert timer.timed(variant.step, machine.select_device("cpu")) > 0


def test_a_vit_has_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workloads.count_gmacs(Job("vit", "hiera_base_224", 1)) == pytest.approx(17, abs=0.9)
    assert workloads.count_gmacs(Job("hiera", "hiera_base_224", 1)) == pytest.approx(9, abs=0.5)


@pytest.mark.parametrize("mode", ["grad", "train"])
@pytest.mark.parametrize("model", ["hiera_nano_32", "mae_hiera_nano_8x32"])
def test_training_steps(model: str, mode: Any) -> None:
    variants = workloads.build(Job("hiera", model, batch=2, mode=mode))
    assert [v.row.attention for v in variants] == ["fused", "eager"]
    for variant in variants:
        variant.step()


def test_memory_that_runs_out_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    class Small:
        def __init__(self, job: Job) -> None:
            tried.append(job.batch)
            if job.batch > fits:
                raise runner.OutOfMemory
            self.rows = [row()]

        def run(self, variant: int, seconds: float) -> list[float]:
            return [0.1, 0.1]

        def __enter__(self) -> Small:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(runner, "Worker", Small)
    fits = 2
    (found,) = runner.measure([replace(NANO, batch=8)], SHORT)
    assert tried == [8, 4, 2] and found.notes == ["out of memory with a batch of 8"]
    assert "trying 4" in caplog.text
    fits = 0
    (found,) = runner.measure([replace(NANO, batch=2)], SHORT)
    assert found.error == "out of memory with a batch of 1" and not found.samples_s


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="no_such"):
        runner.measure([replace(NANO, dtype="no_such")], SHORT)


def test_no_memory_at_all_is_exit_5(hiera: Hiera, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(row(), samples_s=[], error="out of memory with a batch of 1")
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [failed])
    code, out, err = hiera("bench", "hiera_nano_32", "-f", "table")
    assert code == 5 and "out of memory" in err and "out of memory" in out


# Figures ----------------------------------------------------------------------------------------


def test_ratios_are_taken_turn_by_turn() -> None:
    """A machine that slows down tenfold half-way changes no ratio."""
    fused, eager, peer = row(), row(attention="eager"), row(attention=None)
    peer.implementation = "reference"
    for turn in range(10):
        slow = 10.0 if turn >= 5 else 1.0
        fused.rounds.append(0.1 * slow)
        eager.rounds.append(0.15 * slow)
        peer.rounds.append(0.2 * slow)
    add_ratios([fused, eager, peer])
    assert fused.speedup == pytest.approx(1.5) and eager.speedup == 1
    assert peer.ratio_low == peer.ratio == peer.ratio_high == pytest.approx(2)


def test_utilisation_counts_the_backward_pass_twice() -> None:
    found = row(0.1, spread=0)
    found.gmacs, found.matmul_gflops = 0.5, 100.0
    assert found.throughput == pytest.approx(80)
    assert found.utilisation == pytest.approx(0.8)
    found.mode = "train"
    assert found.utilisation == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("now", "spread", "matmul", "verdict"),
    [
        (0.100, 0.02, 100, "same"),
        (0.120, 0.02, 100, "slower"),
        (0.120, 3.00, 100, "noise"),  # within what such samples scatter
        (0.120, 0.02, 80, "noise"),  # the whole machine is slower
        (0.080, 0.02, 100, "faster"),
        (0.104, 0.02, 100, "same"),  # below the tolerance
    ],
)
def test_verdicts(now: float, spread: float, matmul: float, verdict: str) -> None:
    (change,) = compare([row(0.1, spread)], [row(now, spread, matmul_gflops=matmul)], 0.05)
    assert change.verdict == verdict, change


def test_rows_without_a_partner() -> None:
    changes = compare([row(attention="eager")], [row()], 0.05)
    assert [c.verdict for c in changes] == ["new", "gone"]
    assert isinstance(changes[0], Change) and changes[0].line().endswith(": new")


def test_the_header_says_what_a_cpu_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype, words in (
        (True, "bf16", "bf16 in place of fp16"),
        (False, "fp32", "no bf16"),
    ):
        monkeypatch.setattr("hiera_core.device.has_native_bf16", lambda native=native: native)
        header, length = machine.settings("cpu", "auto", "infer", None)
        assert header.dtype == dtype and words in header.lines()[1]
        assert length.min_runs == 3
    assert machine.batch_for("image", "cpu", "infer") == 8
