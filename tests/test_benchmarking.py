"""Tests of `hiera bench`: measurements, output and files. No test asserts a time."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core import zoo
from hiera_core.benchmarking import flops, machine, peers, report, runner, timer, workloads
from hiera_core.benchmarking.compare import Change, compare
from hiera_core.benchmarking.job import Job, RunLength
from hiera_core.benchmarking.measurement import Measurement, add_ratios
from hiera_core.errors import DeviceError, UsageError
from hiera_core.viz import charts

from .conftest import fork_workers
from .fork_server import ForkServer

Hiera = Callable[..., tuple[int, str, str]]
SHORT = RunLength(seconds=0.02, runs=2, max_seconds=0.02, min_runs=2, round_seconds=0.01)
NANO = Job("hiera", "hiera_nano_32", batch=2)


def make_result(
    median: float = 0.1, spread: float = 0.01, count: int = 40, **values: Any
) -> Measurement:
    """Return a measurement whose samples are evenly spread around a median."""
    offsets = [((7 * i) % count) / count - 0.5 for i in range(count)]
    fields = {"attention": "fused", "compiled": False, "mode": "infer", "device": "cpu"} | values
    result = Measurement("hiera_nano_32", "hiera", dtype="fp32", batch=8, **fields)
    result.samples_s = [median * (1 + spread * x) for x in offsets]
    result.matmul_gflops = result.matmul_gflops or 100.0
    return result


# The command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, int, str]]:
    """Run a benchmark with peers and every kind of output file.

    Yields:
        The folder of the files, the exit code, and the printed table.
    """
    from hiera_cli.app import run

    folder = tmp_path_factory.mktemp("bench")
    exports = [f"--export={folder / name}" for name in ("out.json", "out.csv", "out.md")]
    with pytest.MonkeyPatch.context() as patch:
        fork_workers(fork_server, tmp_path_factory.mktemp("workers"), patch)
        code = run(
            [
                *("bench", "hiera_nano_32", "--seconds", "0.05", "-b", "2", "--dtype", "fp32"),
                *("--against", "reference,vit", "--plot", str(folder / "out.png")),
                *("-o", str(folder / "out.txt"), *exports),
            ]
        )
    yield folder, code, (folder / "out.txt").read_text()


def test_a_run_writes_every_kind_of_file(measured: tuple[Path, int, str]) -> None:
    folder, code, table = measured
    assert code == 0
    assert "fused" in table and "eager" in table and "reference" in table
    document = json.loads((folder / "out.json").read_text())
    assert "smaller batches" in " ".join(document["header"]["changes"])
    results = {r["attention"] or r["implementation"]: r for r in document["rows"]}
    assert set(results) == {"fused", "eager", "reference"}  # there is no ViT of this size
    for found in results.values():
        assert found["runs"] == len(found["samples_s"]) >= 3
        assert found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
        assert found["throughput"] == pytest.approx(2 / found["median_ms"] * 1e3)
        assert found["params"] == zoo.get("hiera_nano_32").params
        assert found["gmacs"] == pytest.approx(0.011, rel=0.02)
        assert found["matmul_gflops"] > 0 and found["memory_mib"] > 0
    assert results["fused"]["speedup"] and results["reference"]["ratio"]
    assert results["reference"]["version"] == "0.1.4"
    with (folder / "out.csv").open() as file:
        assert [line["attention"] for line in csv.DictReader(file)] == ["fused", "eager", ""]
    lines = (folder / "out.md").read_text().splitlines()
    assert sum(line.startswith("| hiera_nano_32") for line in lines) == 3
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_compare_distinguishes_a_slowdown_from_a_repeat(
    measured: tuple[Path, int, str], hiera: Hiera, tmp_path: Path
) -> None:
    """Compare the measurements with themselves, and with copies that are 20% faster."""
    results = report.read(measured[0] / "out.json")
    steady = [replace(r, samples_s=make_result(r.samples_s[0]).samples_s) for r in results]
    assert {c.verdict for c in compare(steady, steady, 0.05)} == {"same"}
    faster = [replace(r, samples_s=[s / 1.2 for s in r.samples_s]) for r in steady]
    changes = compare(faster, steady, 0.05)
    assert {c.verdict for c in changes} == {"slower"}
    assert all(c.change == pytest.approx(0.2) for c in changes)


def test_compare_sets_the_exit_code(
    hiera: Hiera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [make_result(0.12)])
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    report.export(tmp_path / "old.json", header, [make_result(0.1)])
    arguments = ("bench", "hiera_nano_32", "--compare", tmp_path / "old.json")
    code, _, err = hiera(*arguments)
    assert code == 1
    (row,) = [line for line in err.splitlines() if line.startswith("hiera_nano_32")]
    words = "hiera_nano_32 fused infer cpu fp32 8 80 66.7 0.83x".split()
    assert row.split()[: len(words)] == words and row.split()[-1] == "slower"
    assert "1 of 1 rows slower by more than 5%" in err
    code, _, err = hiera(*arguments, "--fail-over", "30%")
    assert code == 0 and "0 of 1 rows slower" in err


@pytest.mark.parametrize("width", [60, 80, 120])
def test_only_what_was_compared_is_counted(
    hiera: Hiera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Of six earlier rows, one is measured again."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(
        runner, "measure", lambda jobs, *_: [make_result(), make_result(compiled=True)]
    )
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    old = [make_result(), *(replace(make_result(), batch=size) for size in (1, 2, 3, 4, 5))]
    report.export(tmp_path / "old.json", header, old)
    run = ("bench", "hiera_nano_32", "--compare", tmp_path / "old.json")
    code, _, err = hiera(*run, "-q", "-f", "json")
    assert code == 0 and "0 of 1 rows slower by more than 5%; not compared:" in err
    assert "1 only measured now, 5 only measured earlier" in err
    table = [line for line in err.splitlines() if not line.startswith("hiera:")]
    assert max(map(len, table)) <= width and "ratio" in table[0] and "1.00x" in table[1]


def test_a_dash_is_standard_output(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [make_result()])
    assert hiera("bench", "hiera_nano_32", "-o", "-", "-f", "csv")[1].startswith("model,")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    good = replace(make_result(), model="mae_hiera_base_plus_16x224", speedup=1.0, gmacs=133.0)
    bad = replace(make_result(), samples_s=[], error="an error of quite a few words, " * 4)
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [good, bad])
    code, out, _ = hiera("bench", "hiera_nano_32", "-q", "-f", "table")
    assert code == 1 and max(map(len, out.splitlines())) <= width
    assert "inputs/s" in out and " ".join(out.split()).count("quite a few words") == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
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
        (["hiera_nano_32", "--plot", "out.jpg"], 2, "end it in .png"),
        (["hiera_nano_32", "--fail-over", "5%"], 2, "add --compare"),
        (["hiera_nano_32", "--seconds", "0"], 2, "seconds is 0"),
        (["hiera_nano_32", "--seconds", "nan"], 2, "seconds is nan"),
        (["hiera_nano_32", "--seconds", "inf"], 2, "seconds is inf"),
        (["hiera_nano_32", "--compare", "/dev/full"], 2, "holds no measurements"),
        (["hiera_nano_32", "-o", "out.csv", "--export", "./out.csv"], 2, "given for two outputs"),
        (["--all", "hiera_nano_32"], 2, "give one of them"),
        (["hiera_nano_32", "--size", "33"], 2, "input"),
        (["hiera_nano_32", "--size", "8x32x32"], 2, "does not fit a model of 2 dimensions"),
        (["sam2_hiera_tiny", "--size", "big"], 2, "is no size"),
    ],
)
def test_bad_arguments_are_refused_before_any_measurement(
    arguments: list[str], code: int, message: str, hiera: Hiera, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("a worker was started"))
    exit_code, out, err = hiera("bench", *arguments)
    assert (exit_code, out) == (code, "")
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "infere"}, "unknown mode 'infere'; did you mean infer"),
        ({"attention": ["fuse"]}, "unknown attention 'fuse'; did you mean fused"),
        ({"attention": []}, "no attention"),
        ({"batch_sizes": [0]}, "give numbers above 0"),
        ({"models": "hiera_nano_33"}, "hiera_nano_33"),
    ],
)
def test_bad_options_are_refused_before_any_measurement(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("a worker was started"))
    with pytest.raises(UsageError, match=message):
        hiera_core.bench(**options)


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"timm is not installed; pip install timm"):
        peers.check("timm")


def test_a_plot_without_matplotlib_is_refused_before_any_measurement(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("a worker was started"))
    code, out, err = hiera("bench", "hiera_nano_32", "--plot", tmp_path / "out.png")
    assert (code, out) == (2, "")
    assert "needs matplotlib" in err and "pip install 'hiera-toolkit[plots]'" in err
    assert list(tmp_path.iterdir()) == []


def test_bars_begin_at_0_and_percentiles_stand_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures, make = [], charts._make_figure
    monkeypatch.setattr(charts, "_make_figure", lambda n: figures.append(make(n)) or figures[-1])
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    rows = [make_result(spread=1.0), make_result(0.2, compiled=True)]
    report.plot(tmp_path / "out.png", header, rows)
    left, right = figures[0].axes
    for axes in (left, right):
        assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
    assert [bar.get_width() for bar in left.patches] == pytest.approx([80, 40], rel=0.02)
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in right.patches)
    assert len(spans) == 6  # a bar for each percentile of each row, none over another
    assert all(low[1] <= high[0] + 1e-9 for low, high in itertools.pairwise(spans))
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["p50", "p90", "p99"]


def test_rows_of_a_chart_say_what_their_number_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures, make = [], charts._make_figure
    monkeypatch.setattr(charts, "_make_figure", lambda n: figures.append(make(n)) or figures[-1])
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    report.plot(tmp_path / "out.png", header, [make_result(compiled=True)])
    (label,) = figures[0].axes[0].get_yticklabels()
    assert label.get_text().endswith(" fused, compiled, batch 8")


def test_all_measures_the_ten_classifiers(hiera: Hiera, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: seen.append(jobs) or [make_result()])
    assert hiera("bench", "--all", "-q")[0] == 0
    assert len(seen) == 10 and all(j.attentions == ("fused", "eager") for (j,) in seen)
    assert {j.model for (j,) in seen} == {m.name for m in zoo.models().values() if m.speed}


# Models that fail -------------------------------------------------------------------------------


def measure_or_fail(error: BaseException, at: str) -> Callable[..., list[Measurement]]:
    """Return a stand-in for `runner.measure` that fails for one model."""

    def measure(jobs: Any, *_: Any) -> list[Measurement]:
        if jobs[0].model == at:
            raise error
        return [replace(make_result(), model=jobs[0].model)]

    return measure


def test_a_model_that_fails_does_not_lose_the_others(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = measure_or_fail(DeviceError("hiera_small_224: it crashed"), "hiera_small_224")
    monkeypatch.setattr(runner, "measure", failing)
    path = tmp_path / "out.json"
    code, out, err = hiera("bench", "--all", "-q", "--export", path)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "Traceback" not in err
    assert [row["model"] for row in rows] == [m.name for m in zoo.models().values() if m.speed]
    assert [row["error"] for row in rows if row["error"]] == ["it crashed"]
    assert len(report.read(path)) == 10
    _, table, _ = hiera("bench", "--all", "-q", "-f", "table")
    assert table.count("it crashed") == 1 and len(table.splitlines()) == 11


def test_an_interruption_keeps_what_was_measured(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hiera_cli.exit_codes import Interrupted

    path = tmp_path / "out.json"
    rest = " ".join([m.name for m in zoo.models().values() if m.speed][1:])
    for format in ("table", "jsonl", "csv", "json"):
        monkeypatch.setattr(runner, "measure", measure_or_fail(Interrupted(2), "hiera_small_224"))
        code, out, err = hiera(
            "bench", "--all", "-q", "--export", path, "--overwrite", "-f", format
        )
        assert code == 130 and err == (
            f"hiera: interrupted; 1 row is in {path}; to go on: hiera bench {rest}, with the same "
            "options and another file\n"
        )
        assert "hiera_tiny_224" in out
        assert [m.model for m in report.read(path)] == ["hiera_tiny_224"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_second_model_keeps_the_rows_of_the_first(
    fork_server: ForkServer, tmp_path: Path, signum: signal.Signals
) -> None:
    """The signal goes to the whole group of processes, as a terminal sends it."""
    names = ["out.csv", "out.json", "out.md"]
    process = fork_server.start(
        tmp_path,
        *("bench", "hiera_nano_32", "hiera_nano_8x32", "-b", "1", "--seconds", "0.05"),
        *("-o", tmp_path / names[0], "--attention", "fused"),
        *(f"--export={tmp_path / name}" for name in names[1:]),
    )
    while not re.search(r"hiera_nano_8x32.*preparing.*\n", shown := process.text("err")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    lines = process.communicate(timeout=120)[1].removeprefix(shown).splitlines()
    assert process.returncode == 128 + signum
    assert len(lines) == 1 and " 1 row is in " in lines[0] and "hiera_nano_8x32" in lines[0]
    for name in names:
        assert (tmp_path / name).read_text().count("hiera_nano_32") == 1, name
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_a_worker_that_crashes_while_it_is_measured_loses_its_own_rows(
    monkeypatch: pytest.MonkeyPatch, forked_workers: None
) -> None:
    """The process of a peer crashes in its second round."""
    real, rounds = runner.Worker.run, []

    def run(self: runner.Worker, variant: int, seconds: float) -> Any:
        if self.job.implementation == "reference":
            rounds.append(variant)
            if len(rounds) == 2:
                self._process.send_signal(signal.SIGSEGV)
        return real(self, variant, seconds)

    monkeypatch.setattr(runner.Worker, "run", run)
    jobs = [NANO, replace(NANO, implementation="reference")]
    *ours, peer = runner.measure(jobs, SHORT)
    assert [m.attention for m in ours] == ["fused", "eager"]
    assert all(m.error is None and m.rounds for m in ours)
    assert peer.error is not None and "ended with code -11" in peer.error
    assert not peer.samples_s and peer.ratio is None


def test_all_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = measure_or_fail(DeviceError("hiera_nano_32: no"), "hiera_nano_32")
    monkeypatch.setattr(runner, "measure", failing)
    with pytest.raises(DeviceError, match="hiera_nano_32: no"):
        hiera_core.bench("hiera_nano_32")
    assert hiera_core.bench(["hiera_nano_32", "hiera_tiny_224"]).measurements[0].error == "no"


# Workloads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "timm", "transformers", "hiera-optim"])
@pytest.mark.parametrize(
    ("model", "mode"), [("hiera_nano_32", "infer"), ("mae_hiera_nano_32", "grad")]
)
def test_peers_build_the_same_model(name: str, model: str, mode: Any) -> None:
    job = Job(name, model, batch=2, mode=mode)
    if name == "timm" and mode == "grad":
        with pytest.raises(peers.NotOffered, match="no Hiera autoencoder"):
            workloads.build(job)
        return
    (variant,) = workloads.build(job)
    assert variant.row.params == pytest.approx(zoo.get(model).params, abs=10)
    assert timer.timed(variant.step, machine.select_device("cpu")) > 0


@pytest.mark.parametrize("name", ["timm", "transformers", "reference", "hiera-optim"])
@pytest.mark.parametrize("model", ["sam2_hiera_tiny", "hiera_small_abswin_256"])
def test_peers_build_the_other_hieras(name: str, model: str) -> None:
    """timm has all of them, transformers SAM 2's encoder, and the reference none."""
    job = Job(name, model, batch=1, size=(64, 96))
    if name != "timm" and (name, model) != ("transformers", "sam2_hiera_tiny"):
        with pytest.raises(peers.NotOffered, match="has no"):
            workloads.build(job)
        return
    (variant,) = workloads.build(job)
    assert variant.row.params == pytest.approx(zoo.get(model).params, abs=2000)  # timm's norm
    assert (variant.row.size, variant.row.published) == ("64x96", None)
    ours = workloads.build(Job("hiera", model, batch=1, size=(64, 96)))
    theirs = variant.step()
    for maps in (one.step() for one in ours):
        if model.startswith("sam2"):
            assert [m.shape for m in maps] == [m.shape for m in theirs]
        else:
            assert maps.shape == theirs.shape


def test_operations_of_sam2_are_counted_at_any_size() -> None:
    """The published size is 1024x1024. A global block makes the count grow faster than the area."""
    job = Job("hiera", "sam2_hiera_tiny", 1)
    whole = flops.count_gmacs(job)
    assert whole == pytest.approx(zoo.get("sam2_hiera_tiny").gmacs, rel=0.01)
    half = flops.count_gmacs(replace(job, size=(512, 1024)))
    assert 0.4 * whole < half < 0.5 * whole
    padded = flops.count_gmacs(replace(job, size=(928, 928)))  # windows of 14 do not divide 58
    assert padded > whole * (928 / 1024) ** 4


def test_a_training_step_of_sam2_runs() -> None:
    (variant, _) = workloads.build(
        Job("hiera", "sam2_hiera_tiny", batch=1, mode="train", size=(64, 64))
    )
    variant.step()


def test_a_vit_has_its_own_operation_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flops.count_gmacs(Job("vit", "hiera_base_224", 1)) == pytest.approx(17, abs=0.9)
    assert flops.count_gmacs(Job("hiera", "hiera_base_224", 1)) == pytest.approx(9, abs=0.5)


@pytest.mark.parametrize("mode", ["grad", "train"])
@pytest.mark.parametrize("model", ["hiera_nano_32", "mae_hiera_nano_8x32"])
def test_training_steps_run(model: str, mode: Any) -> None:
    variants = workloads.build(Job("hiera", model, batch=2, mode=mode))
    assert [v.row.attention for v in variants] == ["fused", "eager"]
    for variant in variants:
        variant.step()


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    class SmallMemoryWorker:
        def __init__(self, job: Job) -> None:
            tried.append(job.batch)
            if job.batch > largest_batch:
                raise runner.OutOfMemory
            self.rows = [make_result()]

        def run(self, variant: int, seconds: float) -> tuple[list[float], None]:
            return [0.1, 0.1], None

        def __enter__(self) -> SmallMemoryWorker:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(runner, "Worker", SmallMemoryWorker)
    largest_batch = 2
    (result,) = runner.measure([replace(NANO, batch=8)], SHORT)
    assert tried == [8, 4, 2] and result.notes == ["out of memory with a batch of 8"]
    assert "trying 4" in caplog.text
    largest_batch = 0
    (result,) = runner.measure([replace(NANO, batch=2)], SHORT)
    assert result.error == "out of memory with a batch of 1" and not result.samples_s


def test_the_error_of_a_dead_worker_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="no_such"):
        runner.measure([replace(NANO, dtype="no_such")], SHORT)


def test_out_of_memory_with_a_single_input_is_exit_5(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = replace(make_result(), samples_s=[], error="out of memory with a batch of 1")
    monkeypatch.setattr(runner, "measure", lambda jobs, *_: [failed])
    code, out, err = hiera("bench", "hiera_nano_32", "-f", "table")
    assert code == 5 and "out of memory" in err and "out of memory" in out


# Statistics -------------------------------------------------------------------------------------


def test_ratios_are_taken_per_round() -> None:
    """The ratios stay the same when the machine slows down tenfold half-way."""
    fused, eager, peer = make_result(), make_result(attention="eager"), make_result(attention=None)
    peer.implementation = "reference"
    for number in range(10):
        factor = 10.0 if number >= 5 else 1.0
        fused.rounds.append(0.1 * factor)
        eager.rounds.append(0.15 * factor)
        peer.rounds.append(0.2 * factor)
    add_ratios([fused, eager, peer])
    assert fused.speedup == pytest.approx(1.5) and eager.speedup == 1
    assert peer.ratio_low == peer.ratio == peer.ratio_high == pytest.approx(2)


def test_utilisation_counts_the_backward_pass_twice() -> None:
    result = make_result(0.1, spread=0)
    result.gmacs, result.matmul_gflops = 0.5, 100.0
    assert result.throughput == pytest.approx(80)
    assert result.utilisation == pytest.approx(0.8)
    result.mode = "train"
    assert result.utilisation == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("now", "spread", "matmul", "verdict"),
    [
        (0.100, 0.02, 100, "same"),
        (0.120, 0.02, 100, "slower"),
        (0.120, 3.00, 100, "noise"),  # within the scatter of the samples
        (0.120, 0.02, 80, "noise"),  # the machine is slower: so is its matrix product
        (0.080, 0.02, 100, "faster"),
        (0.104, 0.02, 100, "same"),  # below the tolerance
    ],
)
def test_compare_gives_a_verdict(now: float, spread: float, matmul: float, verdict: str) -> None:
    (change,) = compare(
        [make_result(0.1, spread)], [make_result(now, spread, matmul_gflops=matmul)], 0.05
    )
    assert change.verdict == verdict, change


def test_unpaired_measurements_are_new_or_gone() -> None:
    changes = compare([make_result(attention="eager")], [make_result()], 0.05)
    assert [c.verdict for c in changes] == ["new", "gone"]
    assert isinstance(changes[0], Change) and changes[0].line().endswith(": new")


def test_the_header_lists_the_settings_that_a_cpu_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype, message in (
        (True, "bf16", "bf16 in place of fp16"),
        (False, "fp32", "no bf16"),
    ):
        monkeypatch.setattr("hiera_core.device.has_native_bf16", lambda native=native: native)
        header, length = machine.settings("cpu", "auto", "infer", None)
        assert header.dtype == dtype and message in header.lines()[1]
        assert length.min_runs == 3
    assert machine.batch_for("image", "cpu", "infer") == 8
