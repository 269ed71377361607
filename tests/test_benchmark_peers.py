"""Tests of how peers are measured: on a GPU one after another, and other runtimes on a CPU."""

from __future__ import annotations

import copy
import itertools
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hiera_core import zoo
from hiera_core.benchmarking import (
    flops,
    machine,
    peers,
    runner,
    runtime_peers,
    timer,
    worker,
    workloads,
)
from hiera_core.benchmarking.job import Job, RunLength
from hiera_core.benchmarking.measurement import Measurement, add_ratios
from hiera_core.benchmarking.not_offered import NotOffered

SHORT = RunLength(seconds=0.02, runs=2, max_seconds=0.02, min_runs=2, round_seconds=0.01)
NANO = Job("hiera", "hiera_nano_32", batch=2)
CPU = torch.device("cpu")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace worker processes by ones that note when they begin and end."""
    noted: list[str] = []

    class NotedWorker:
        def __init__(self, job: Job) -> None:
            self.job = job
            kind = (job.model, job.implementation, None, False, "infer")
            self.rows = [Measurement(*kind, job.device, job.dtype, job.batch)]

        def run(self, variant: int, seconds: float) -> tuple[list[float], float | None]:
            noted.append(self.job.implementation)
            return [0.1, 0.1], None if self.job.device == "cpu" else 0.05

        def __enter__(self) -> NotedWorker:
            noted.append(f"+{self.job.implementation}")
            return self

        def __exit__(self, *_: object) -> None:
            noted.append(f"-{self.job.implementation}")

    monkeypatch.setattr(runner, "Worker", NotedWorker)
    return noted


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "xpu"])
def test_peers_never_share_the_memory_of_a_gpu(device: str, events: list[str]) -> None:
    jobs = [replace(NANO, device=device), replace(NANO, device=device, implementation="timm")]
    ours, peer = runner.measure(jobs, SHORT)
    alive = list(itertools.accumulate((e[0] == "+") - (e[0] == "-") for e in events))
    assert max(alive) == (2 if device == "cpu" else 1) and alive[-1] == 0
    assert ours.throughput == pytest.approx(20 if device == "cpu" else 40)
    assert ours.latency_ms(50) == pytest.approx(100)
    assert len(ours.rounds) == len(peer.rounds) >= 1


def test_throughput_is_of_runs_that_follow_one_another() -> None:
    def row(name: str, together: float) -> Measurement:
        made = Measurement("m", name, "fused" if name == "hiera" else None, False, "infer", "cuda",
                           "fp16", 8)  # fmt: skip
        made.samples_s, made.together_s, made.rounds = [0.1] * 3, [together] * 3, [together] * 3
        return made

    ours, peer = row("hiera", 0.04), row("timm", 0.08)
    add_ratios([ours, peer])
    assert ours.throughput == pytest.approx(200) and peer.ratio == pytest.approx(2)
    assert Measurement.from_json(ours.to_json()) == ours


def test_runs_that_follow_one_another_are_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    monkeypatch.setattr(timer, "synchronise", lambda device: order.append("wait"))
    monkeypatch.setattr(timer, "timed", lambda step, device: 0.1)
    seconds = timer.timed_together(lambda: order.append("run"), torch.device("cuda"), 0.55)
    assert order == ["wait", *["run"] * 6, "wait"] and seconds > 0
    order.clear()
    timer.timed_together(lambda: order.append("run"), torch.device("cuda"), 1e-9)
    assert order.count("run") == 2
    variant: Any = SimpleNamespace(step=lambda: None)
    assert set(worker._run_round(variant, torch.device("cuda"), 0.01)) == {"samples", "together"}
    assert set(worker._run_round(variant, CPU, 0.01)) == {"samples"}


@pytest.mark.parametrize("answer", ["570.1, 345 MHz, 1980 MHz, 700.00 W\n", "", None])
def test_the_header_names_driver_clocks_and_tf32(
    answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        if answer is None:
            raise FileNotFoundError("nvidia-smi")
        assert "--id=GPU-12ab" in command
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12ab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("HIERA_TF32", raising=False)
    text = machine._accelerator(torch.device("cuda", 0))
    known = "driver 570.1; clock 345 MHz of 1980 MHz; power limit 700.00 W"
    assert text.startswith(known if answer else "driver unknown")
    assert "attention kernels: flash, " in text and text.endswith("TF32 off")
    monkeypatch.setenv("HIERA_TF32", "1")
    assert machine._accelerator(torch.device("cuda", 0)).endswith("TF32 on")


@pytest.mark.parametrize(
    ("name", "build"),
    [("openvino", "build_openvino"), ("onnxruntime", "build_onnxruntime")],
)
@pytest.mark.filterwarnings("ignore")
def test_other_runtimes_compute_our_model(name: str, build: str) -> None:
    pytest.importorskip(name)
    peer: Any = getattr(runtime_peers, build)(zoo.get("hiera_nano_32"), "infer").eval()
    model, x = copy.deepcopy(peer.model), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found, expected = peer(x), model(x)
        assert peer.model is None, "it holds a second copy of the weights"
        again = peer(x)
    for one in (found, again):
        values = torch.from_numpy(next(iter(dict(enumerate(one)).values() if isinstance(one, list)
                                            else one.values())))  # fmt: skip
        assert torch.allclose(values, expected, atol=1e-4)
    (variant,) = workloads.build(replace(NANO, implementation=name))
    assert variant.row.version and variant.row.params == zoo.get("hiera_nano_32").params


def test_programs_are_measured_once_beside_our_compiled_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch compiles nothing around them."""
    calls: list[bool] = []

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.compiler.is_compiling())
            return x

    program = replace(peers.PEERS["openvino"], modules=(), build=lambda entry, mode: Program())
    monkeypatch.setitem(peers.PEERS, "openvino", program)
    monkeypatch.setattr(peers, "version", lambda name: "1")
    (variant,) = workloads.build(replace(NANO, implementation="openvino", compile=True))
    assert variant.row.compiled
    variant.step()
    assert calls == [False]


def test_what_other_runtimes_do_not_offer_is_left_out() -> None:
    for name in ("openvino", "onnxruntime"):
        for job in (replace(NANO, mode="grad"), replace(NANO, model="mae_hiera_nano_32")):
            with pytest.raises(NotOffered):
                workloads.build(replace(job, implementation=name))
    with pytest.raises(NotOffered, match="onnxruntime:fp32"):
        runtime_peers._onnxruntime(b"", torch.bfloat16)


@pytest.mark.parametrize("name", ["hiera_small_abswin_256", "hiera_base_abswin_256"])
def test_operations_of_other_sizes_are_counted(name: str) -> None:
    counted = flops.count_gmacs(Job("hiera", name, 1))
    assert counted == pytest.approx(zoo.get(name).gmacs, rel=0.02)
