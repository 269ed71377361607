"""Tests of training and evaluation on several processes, and of processes that are killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from hiera_core.atomic.lock import exclusive
from hiera_core.errors import DeviceError, OutputError, TrainingError, UsageError
from hiera_core.training import distributed
from hiera_core.training.build import RunOptions

from .fork_server import ForkedProcess, ForkServer
from .ports import free_port

FULL_SIZE = os.environ.get("HIERA_FULL")  # a model of real size for every form of training
KILLS = int(os.environ.get("HIERA_KILLS", "1"))  # number of runs to kill
RECIPE = """
extends: {model}
model: {{config: {{embed_dim: 8, stages: [1, 1, 1], drop_path_rate: {drop_path}{decoder}}}}}
batch_size: 96
log_every: 1
save_every: {save_every}
schedule: {{epochs: {epochs}, warmup_epochs: 0}}
ema: 0.9
val_every: 0.25
"""
Start = Callable[..., list[ForkedProcess]]
Call = Callable[..., str]
DECODER = ", decoder_embed_dim: 16, decoder_depth: 1, decoder_num_heads: 2"


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Start:
    """Return a function that starts one process of hiera, or several that work together.

    Several are started without torchrun, which would stop them all with the first.
    """

    def start(*arguments: object, processes: int = 1) -> list[ForkedProcess]:
        if processes == 1:
            return [fork_server.start(tmp_path, *arguments)]
        group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [
            fork_server.start(tmp_path, *arguments, **group, RANK=rank, LOCAL_RANK=rank)
            for rank in range(processes)
        ]

    return start


@pytest.fixture
def call(start: Start) -> Call:
    """Return a function that runs hiera and returns the standard output of the first process."""

    def call(*arguments: object, processes: int = 1, patience: float = 300) -> str:
        started = start(*arguments, processes=processes)
        outputs = [process.communicate(patience) for process in started]
        codes = [process.returncode for process in started]
        assert not any(codes), (codes, [stderr for _, stderr in outputs])
        return outputs[0][0]

    return call


def write_recipe(
    folder: Path, model: str, epochs: float = 1, save_every: float = 1, drop_path: float = 0
) -> Path:
    """Write a recipe for a narrow model, and return its path."""
    path = folder / "recipe.yaml"
    values = {"model": model, "epochs": epochs, "save_every": save_every, "drop_path": drop_path}
    decoder = DECODER if model.startswith("mae_") else ""
    path.write_text(RECIPE.format(**values, decoder=decoder))
    return path


def losses(folder: Path, after: int = 0) -> list[float]:
    """Return the losses of the steps, and of the evaluations (of averaged weights) between them."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    measured = [e for e in lines if e["event"] in ("step", "val")]
    return [event["loss"] for event in measured if event["step"] > after]


def probe_of(folder: Path) -> float:
    """Return the last accuracy of the probe of a run."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [float(event["top1"]) for event in lines if event["event"] == "probe"][-1]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_an_unknown_way_to_share_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown parallel 'fdsp'; did you mean fsdp\?"):
        RunOptions(parallel="fdsp")  # type: ignore[arg-type]


def test_ddp_and_fsdp_agree_with_one_process(tmp_path: Path, call: Call) -> None:
    """With drop path, which drops the same branches of a view in whatever process it is."""
    path = write_recipe(tmp_path, "mae_hiera_nano_32", save_every=0.5, drop_path=0.2)
    probe = ("--set", "probe.every=1", "--set", "probe.samples=100")
    train = ("train", path, "digits", "-q", "-j", "0", *probe, "-o")
    call(*train, tmp_path / "one")
    call(*train, tmp_path / "ddp", processes=2)
    call(*train, tmp_path / "fsdp", "--parallel", "fsdp", processes=2)
    one = losses(tmp_path / "one")
    assert len(one) == 14 + 4 and one[-2] < 0.9 * one[0]  # steps and evaluations
    assert largest_difference(one, losses(tmp_path / "ddp")) < 1e-5
    assert largest_difference(one, losses(tmp_path / "fsdp")) < 1e-5
    found = [probe_of(tmp_path / name) for name in ("one", "ddp", "fsdp")]
    assert found == pytest.approx([found[0]] * 3, abs=0.3)  # one of 359 may be a tie
    # One process resumes from the shards of two processes.
    half, resumed = tmp_path / "fsdp/checkpoints/step_00000007", tmp_path / "fsdp-on"
    call(*train, resumed, "--resume", half)
    assert largest_difference(losses(tmp_path / "one", 7), losses(resumed)) < 1e-5


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path: Path, call: Call) -> None:
    """Also where the batch cannot be divided by it: 95 samples are 48 and 47."""
    path = write_recipe(tmp_path, "mae_hiera_nano_32", save_every=0.5, drop_path=0.2)
    train = ("train", path, "digits", "-q", "-j", "0", "--set", "batch_size=95", "-o")
    call(*train, tmp_path / "one")
    call(*train, tmp_path / "ddp", processes=2)
    assert largest_difference(losses(tmp_path / "one"), losses(tmp_path / "ddp")) < 1e-5
    # One process resumes from what two processes saved without shards.
    half, resumed = tmp_path / "ddp/checkpoints/step_00000008", tmp_path / "ddp-on"
    call(*train, resumed, "--resume", half)
    assert largest_difference(losses(tmp_path / "one", 8), losses(resumed)) < 1e-5
    # And two processes with shards resume from what one process saved.
    half, resumed = tmp_path / "one/checkpoints/step_00000008", tmp_path / "one-on"
    call(*train, resumed, "--resume", half, "--parallel", "fsdp", processes=2)
    assert largest_difference(losses(tmp_path / "one", 8), losses(resumed)) < 1e-5


# Real architectures at full width take hours on a CPU: HIERA_FULL=hiera_tiny_224 runs one, for 20
# steps with a sample for each of two processes. HIERA_NO_COMPILE leaves out compiled forms, and
# HIERA_FORMS=fsdp-True those that have no such name.
FULL = """
extends: {name}
model: {{config: {{drop_path_rate: 0.1}}}}
batch_size: 2
optimizer: {{lr_batch_size: 256}}
schedule: {{epochs: 0.02227, warmup_epochs: 0}}
augment: {{mixup: 0, cutmix: 0}}
data: {{repeats: 1, val: 0}}
log_every: 1
"""
FORMS = [
    (parallel, compiled, checkpointing, precision)
    for compiled in (False, True)
    for parallel in ("one", "ddp", "fsdp")
    for checkpointing in (False, True, "selective")
    for precision in ("fp32", "bf16")
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hiera_nano_32", "mae_hiera_nano_32"])
def test_every_form_of_training_agrees(tmp_path: Path, call: Call, model: str) -> None:
    """One process, DDP and FSDP, compiled or not, with and without checkpointing, in fp32 and bf16,
    with drop path. Losses differ by 1e-5 in fp32, 1e-4 compiled, and 3% in bf16."""
    path = write_recipe(tmp_path, model, epochs=0.5, drop_path=0.1)
    if FULL_SIZE is not None:
        name = FULL_SIZE if not model.startswith("mae_") else f"mae_{FULL_SIZE}"
        path.write_text(FULL.format(name=name))
    found: dict[tuple[object, ...], list[float]] = {}
    skipped = os.environ.get("HIERA_NO_COMPILE") is not None
    chosen = os.environ.get("HIERA_FORMS", "")
    for form in FORMS:
        parallel, compiled, checkpointing, precision = form
        name = "-".join(map(str, form))
        is_chosen = form == FORMS[0] or re.search(chosen, name) is not None
        if not is_chosen or (compiled and skipped):
            continue
        folder = tmp_path / name
        words: list[object] = ["train", path, "digits", "-q", "-j", "0", "-o", folder]
        words += ["--set", f"grad_checkpointing={str(checkpointing).lower()}"]
        words += ["--set", f"precision={precision}"] + ["--compile"] * compiled
        words += ["--parallel", parallel] if parallel != "one" else []
        begin = time.monotonic()
        call(*words, processes=1 if parallel == "one" else 2, patience=3600)  # it may compile
        found[form] = losses(folder)
        difference = largest_difference(found[FORMS[0]], found[form])
        print(name, f"{difference:.1e} in {time.monotonic() - begin:.0f} s", flush=True)
        shutil.rmtree(folder / "checkpoints")
    expected = found[FORMS[0]]
    assert len(expected) >= (7 if FULL_SIZE is None else 20)
    for form, values in found.items():
        scale = max(expected)
        limit = 0.03 * scale if form[3] == "bf16" else 1e-4 if form[1] else 1e-5
        assert largest_difference(expected, values) < limit, form


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_two_processes_resume_bit_exactly_with_drop_path(
    tmp_path: Path, call: Call, parallel: str
) -> None:
    path = write_recipe(tmp_path, "hiera_nano_32", save_every=0.5, drop_path=0.3)
    train = ("train", path, "digits", "-q", "-j", "0", "--parallel", parallel, "-o")
    call(*train, tmp_path / "whole", processes=2)
    half = tmp_path / "whole/checkpoints/step_00000007"
    call(*train, tmp_path / "cut", "--resume", half, processes=2)
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    assert losses(tmp_path / "whole", 7) == losses(tmp_path / "cut")


def test_evaluation_counts_every_sample_once(call: Call) -> None:
    """359 samples are not a multiple of the 2 processes."""
    evaluate = ("eval", "digits", "-m", "hiera_nano_32", "-f", "json", "-q")
    one, two = (json.loads(call(*evaluate, processes=n)) for n in (1, 2))
    assert one["samples"] == two["samples"] == 359
    assert one == two


def test_a_killed_run_resumes_bit_exactly(tmp_path: Path, start: Start, call: Call) -> None:
    """SIGKILL arrives at a random moment, maybe while saving: every second step saves. The recipe
    uses drop path and mixup."""
    path = write_recipe(tmp_path, "hiera_nano_32", epochs=1, save_every=2 / 14, drop_path=0.3)
    arguments = ("train", path, "digits", "-q", "-j", "0", "-o")
    begin = time.monotonic()
    call(*arguments, tmp_path / "whole")
    duration = time.monotonic() - begin
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for number in range(KILLS):
        folder = tmp_path / f"run{number}"
        (process,) = start(*arguments, folder)
        while not (folder / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, max(0.5, duration - 2)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        call(*arguments, folder, "--resume", "auto")
        assert (folder / "model.safetensors").read_bytes() == expected
        assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_terminated_run_has_a_checkpoint_of_its_step(
    tmp_path: Path, start: Start, call: Call
) -> None:
    """SIGTERM arrives at random moments, also while a thread saves and during validation. The
    checkpoint is that of the last step in the log or of a later one, and the continued run is
    that of the one that was not interrupted, bit for bit. HIERA_KILLS is the number of moments."""
    path = write_recipe(tmp_path, "hiera_nano_32", epochs=1, save_every=2 / 14, drop_path=0.3)
    arguments = ("train", path, "digits", "-q", "-j", "0", "-o")
    begin = time.monotonic()
    call(*arguments, tmp_path / "whole")
    duration = time.monotonic() - begin
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    stopped = 0
    for number in range(KILLS):
        folder = tmp_path / f"run{number}"
        (process,) = start(*arguments, folder)
        while not (folder / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, max(0.5, 0.7 * duration)))
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code == 0:  # it was quicker
            continue
        assert code == 143
        stopped += 1
        steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        last = max(event["step"] for event in steps)
        saved = int((folder / "checkpoints/latest").read_text().removeprefix("step_"))
        assert saved >= last, (saved, last)
        if saved < 14:  # else all steps were done, and the weights were being written
            assert f"step {saved} of 14 is saved" in process.text("err")
        call(*arguments, folder, "--resume", "auto")
        assert (folder / "model.safetensors").read_bytes() == expected
        assert losses(folder) == losses(tmp_path / "whole")
    assert stopped or KILLS == 1


def test_when_one_of_two_processes_dies_the_other_stops(tmp_path: Path, start: Start) -> None:
    """The test does not use torchrun, because that would stop the other process at once."""
    path = write_recipe(tmp_path, "hiera_nano_32", epochs=1000)
    arguments = ("train", path, "digits", "-q", "-j", "0", "-o", tmp_path / "run")
    processes = start(*arguments, processes=2)
    log = tmp_path / "run/log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"step"') > 3):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)
    try:
        _, err = processes[0].communicate(timeout=60)
    finally:
        processes[0].kill()
    processes[1].communicate()
    assert processes[0].returncode == 6
    assert "Traceback" not in err and err.count("hiera:") == 1 and "--resume auto" in err


def test_all_processes_end_if_the_folder_is_locked(tmp_path: Path, start: Start) -> None:
    path = write_recipe(tmp_path, "hiera_nano_32")
    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run"):
        arguments = ("train", path, "digits", "-q", "-j", "0", "-o", tmp_path / "run")
        for process in start(*arguments, processes=2):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 2
            assert err.count("hiera:") == 1 and f"process {os.getpid()}" in err


EVALUATE = """
import sys, time
from datetime import timedelta
from hiera_cli import app
from hiera_core.inference import evaluate
from hiera_core.training import distributed

def slow(*arguments, rank, **options):
    if rank:
        time.sleep(6)
    return original(*arguments, rank=rank, **options)

original, evaluate.evaluate_dataset = evaluate.evaluate_dataset, slow
distributed.TIMEOUT = timedelta(seconds=2)
distributed.join_processes.__wrapped__.__defaults__ = ("auto", distributed.TIMEOUT)
sys.exit(app.run(sys.argv[1:]))
"""


def test_a_share_that_takes_long_does_not_end_an_evaluation(tmp_path: Path) -> None:
    """The first process waits for the second one longer than training would."""
    script = tmp_path / "script.py"
    script.write_text(EVALUATE)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    done = subprocess.run(
        [sys.executable, *map(str, torchrun), "eval", "digits", "-m", "hiera_nano_32", "-q"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 359


class FakeGroup:
    """Stands in for torch.distributed: keeps the arguments of `init_process_group`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
        self.backend, self.options = "", dict[str, Any]()
        monkeypatch.setattr(distributed, "select_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.distributed, "init_process_group", self.init)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
        monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
        for name, value in ("WORLD_SIZE", "8"), ("RANK", "5"), ("LOCAL_RANK", "1"):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")

    def init(self, backend: str, **options: Any) -> None:
        self.backend, self.options = backend, options


def test_processes_on_gpus_know_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And NCCL reports a lost process instead of ending this one."""
    group = FakeGroup(monkeypatch, gpus=2)
    with distributed.join_processes() as world:
        assert world == distributed.World(torch.device("cuda", 1), 5, 8)
    assert group.backend == "cpu:gloo,cuda:nccl"
    assert group.options["device_id"] == torch.device("cuda", 1)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
    error = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1.")
    with pytest.raises(TrainingError, match="another process"), distributed.join_processes():
        raise error
    # An error for the user stays what it is, whatever words are in it.
    with pytest.raises(OutputError, match="gloo"), distributed.join_processes():
        raise OutputError("runs/gloo cannot be written")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', no number of at least 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', no number of at least 1"),
        ("RANK", "", "RANK is missing"),
        ("RANK", "2", "RANK is '2', no number from 0 to 1"),
        ("RANK", "-1", "RANK is '-1', no number from 0 to 1"),
        ("MASTER_ADDR", "", "MASTER_ADDR is missing"),
        ("MASTER_PORT", "", "MASTER_PORT is missing"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http', no number from 0 to 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT is '65536', no number from 0 to 65535"),
    ],
)
def test_variables_of_a_launcher_are_checked(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """They are before processes wait ten minutes for one another."""
    group = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, text in {**group, variable: value}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=message), distributed.join_processes("cpu"):
        pass


def test_processes_that_do_not_meet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    group = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, text in group.items():
        monkeypatch.setenv(name, text)
    taken = pytest.raises(TrainingError, match=f"port {port} of this machine is in use")
    with socket.create_server(("127.0.0.1", port)), taken, distributed.join_processes("cpu"):
        pass
    monkeypatch.setenv("RANK", "1")
    lost = pytest.raises(TrainingError, match=f"find one another at 127.0.0.1:{port}")
    with lost, distributed.join_processes("cpu", timedelta(seconds=1)):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGroup(monkeypatch, gpus=1)
    with pytest.raises(DeviceError, match="1 GPUs"), distributed.join_processes():
        pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run(tmp_path: Path, start: Start, signum: signal.Signals) -> None:
    path = write_recipe(tmp_path, "hiera_nano_32", epochs=1000)
    (process,) = start("train", path, "digits", "-q", "-j", "1", "-o", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    while not (log.exists() and log.read_text().count('"step"') > 2):
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "is saved in" in line]
    assert f"to continue: hiera train --resume {tmp_path / 'run'} -j 1" in line
    step = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step_"))
    assert f"step {step} of" in line


@pytest.mark.parametrize(
    "signalled",
    [pytest.param((0, 1), marks=pytest.mark.slow, id="both"), pytest.param((1,), id="one")],
)
def test_processes_stop_after_the_same_step(
    tmp_path: Path, start: Start, signalled: tuple[int, ...]
) -> None:
    """Also if only one of them gets the signal. The checkpoint can be resumed."""
    path = write_recipe(tmp_path, "hiera_nano_32", epochs=1000, save_every=1000)
    folder = tmp_path / "run"
    arguments = ("train", path, "digits", "-q", "-j", "0", "--parallel", "fsdp", "-o", folder)
    processes = start(*arguments, processes=2)
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count('"step"') > 3):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.1)
    for rank in signalled:
        processes[rank].send_signal(signal.SIGTERM)
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=90)[1])
        finally:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [143 if rank in signalled else 6 for rank in range(2)], errors
    (saved,) = folder.glob("checkpoints/step_*")
    meta = json.loads((saved / "meta.json").read_text())
    assert f"step {meta['step']} of 14000 is saved in {folder}" in errors[0]
    assert f"--nproc-per-node 2 -m hiera_cli train --resume {folder}" in errors[0]
    assert "Traceback" not in "".join(errors)
