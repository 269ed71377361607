"""Tests of the number of cores: affinity, quotas of containers, and processes of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiera_core.benchmarking import machine
from hiera_core.inference.predict import Predictor
from hiera_core.process import cores
from hiera_core.training import build

V1, V2 = "4:cpu,cpuacct:{path}\n0::/\n", "0::{path}\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for files of control groups, on a machine with 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "cgroup")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def write(groups: Path, membership: str, **files: str) -> None:
    """Write the membership of this process, and files: `a__cpu.max` is cgroup/a/cpu.max."""
    (groups / "self").write_text(membership)
    for name, text in files.items():
        path = (groups / "cgroup").joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),  # docker --cpus=1.5
        ("10000 100000\n", 1),  # a tenth of a core
        ("max 100000\n", 64),
        ("9900000 100000\n", 64),  # more than there are
        ("", 64),
        ("damaged", 64),
        ("1000 0\n", 64),
        ("-5 100000\n", 64),
    ],
)
def test_quota_of_version_2(groups: Path, text: str, expected: int) -> None:
    write(groups, V2.format(path="/"), **{"cpu.max": text})
    assert cores.allowed_cores() == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["48K\n", "2048K\n", "491520K\n"], 491520 << 10),
        (["32M"], 32 << 20),
        (["12345"], 12345),
        (["", "K", "?", "1K"], 1024),
        ([], 0),
    ],
)
def test_the_last_cache_counts(
    texts: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CACHES", tmp_path)
    for i, text in enumerate(texts):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(text)
    assert cores.cache_bytes() == expected


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "expected"), [("250000", 3), ("-1", 64), ("x", 64)])
def test_quota_of_version_1(groups: Path, folder: str, quota: str, expected: int) -> None:
    files = {
        f"{folder}__docker__ab__cpu.cfs_quota_us": quota,
        f"{folder}__docker__ab__cpu.cfs_period_us": "100000",
    }
    write(groups, V1.format(path="/docker/ab"), **files)
    assert cores.allowed_cores() == expected


def test_the_smallest_quota_on_the_way_counts(groups: Path) -> None:
    write(
        groups,
        V2.format(path="/jobs/one/step"),
        **{
            "jobs__cpu.max": "800000 100000",
            "jobs__one__cpu.max": "300000 100000",
            "jobs__one__step__cpu.max": "max 100000",
        },
    )
    assert cores.allowed_cores() == 3


@pytest.mark.parametrize("membership", [V1, V2])
def test_the_path_of_the_host_is_not_there_in_a_container(groups: Path, membership: str) -> None:
    files = {
        "cpu.max": "400000 100000",
        "cpu__cpu.cfs_quota_us": "400000",
        "cpu__cpu.cfs_period_us": "100000",
    }
    write(groups, membership.format(path="/docker/0123"), **files)
    assert cores.allowed_cores() == 4


def test_without_control_groups_the_affinity_counts(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cores.allowed_cores() == 64
    monkeypatch.delattr(os, "sched_getaffinity")  # not on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores.allowed_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.allowed_cores() == 1


@pytest.mark.parametrize(
    ("local", "expected"), [("1", 6), ("2", 3), ("4", 1), ("100", 1), ("0", 6), ("x", 6), ("", 6)]
)
def test_processes_share_the_cores(
    groups: Path, monkeypatch: pytest.MonkeyPatch, local: str, expected: int
) -> None:
    write(groups, V2.format(path="/"), **{"cpu.max": "600000 100000"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("WORLD_SIZE", "512")  # also counts the processes on other machines
    assert cores.cores_per_process() == expected
    assert Predictor("hiera_nano_32").workers == expected
    assert build.default_workers() == expected
    assert Predictor("hiera_nano_32", workers=7).workers == 7


def test_the_benchmark_header_has_the_allowed_cores(groups: Path) -> None:
    write(groups, V2.format(path="/"), **{"cpu.max": "500000 100000"})
    header, _ = machine.settings("cpu", "fp32", "infer", None)
    assert header.cores == 5 and "5 cores" in header.machine


def test_libraries_start_a_thread_for_each_allowed_core(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    write(groups, V2.format(path="/"), **{"cpu.max": "max 100000"})
    cores.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    write(groups, V2.format(path="/"), **{"cpu.max": "300000 100000"})
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # the user's choice
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize("name", cores.WAIT_SETTINGS)
def test_waiting_threads_soon_sleep_unless_the_user_has_chosen(
    groups: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(groups, V2.format(path="/"), **{"cpu.max": "max 100000"})
    for setting in cores.WAIT_SETTINGS:
        monkeypatch.setenv(setting, "")
        monkeypatch.delenv(setting)
    cores.limit_threads()
    assert os.environ["GOMP_SPINCOUNT"] == str(cores.SPIN_COUNT)
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv(name, "7")
    cores.limit_threads()
    assert os.environ[name] == "7"
    assert name == "GOMP_SPINCOUNT" or "GOMP_SPINCOUNT" not in os.environ


def test_the_command_line_limits_threads_before_torch_starts_them() -> None:
    code = (
        "import os, sys; from hiera_core.process import cores\n"
        "os.sched_getaffinity = lambda _: range(8); cores._quotas = lambda: [1.0]\n"
        "import hiera_cli.app as app; app.run = lambda arguments: 0\n"
        "app._exit_now = lambda code: None; app.main()\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
