"""How many CPU cores this process may use: by its affinity, the quota of its container, and the
number of processes that share the machine; and the size of their cache."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")  # on Linux: the control groups of this process
GROUPS = Path("/sys/fs/cgroup")  # where their files are
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # on Linux: the caches of the first core
# Variables that say how threads of OpenMP wait: in general, and in GCC's library.
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# How often a waiting thread checks whether it may go on before it sleeps; by default 300,000 times,
# which takes milliseconds. A check takes 10 ns on an Intel Xeon, and longer on others. On this Xeon
# with 2 idle cores, Hiera-B at batch 1 in bf16 is as fast with this value as by default, a fifth
# slower with a third of it, and a third slower with 0. Beside other busy processes it is many times
# faster than by default.
SPIN_COUNT = 30_000
# Folders of `GROUPS` in which version 1 has the CPU controller.
CPU_CONTROLLERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


def allowed_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    This is the smaller of its CPU affinity (`taskset`, Slurm) and its quota of CPU time
    (`docker --cpus=1.5`, Kubernetes limits), rounded up.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def cores_per_process() -> int:
    """Return this process's share of `allowed_cores`, at least 1. Under torchrun, the processes on
    a machine share its cores."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = int(text) if text.isdecimal() else 1
    return max(1, allowed_cores() // max(1, processes))


def cache_bytes() -> int:
    """Return the size of the last cache before memory, in bytes, or 0 if the system does not tell
    (it does on Linux)."""
    sizes = [0]
    for path in CACHES.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip().upper()  # such as 32768K
            number, unit = text.rstrip("KMG"), text[-1:]
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}.get(unit, 0))
    return max(sizes)


def limit_threads() -> None:
    """Let numerical libraries start one thread for each allowed core.

    They count the cores of the affinity, and ignore a quota. Threads beyond a quota make the system
    pause all threads of the process. The number is not changed if OMP_NUM_THREADS is set, or if
    there is no quota.

    Threads of GCC's OpenMP, which PyTorch's packages for Linux use, soon sleep while they wait for
    one another, unless the user has chosen. By default they keep their core busy for milliseconds
    after each layer, while another thread has to decode, or another process needs the core that
    they wait for.

    This has to be called before PyTorch is imported.
    """
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    cores = allowed_cores()
    has_affinity = hasattr(os, "sched_getaffinity")
    if has_affinity and cores < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _quotas() -> Iterator[float]:
    """Yield the quotas of CPU time, in cores, of the control groups that this process is in."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except (OSError, ValueError):  # not on Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")  # number:controllers:path
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2
            yield from _quotas_on_the_way(GROUPS, path, _quota_of_version_2)
        elif "cpu" in controllers.split(","):
            for name in CPU_CONTROLLERS:
                yield from _quotas_on_the_way(GROUPS / name, path, _quota_of_version_1)


def _quotas_on_the_way(
    root: Path, path: str, read: Callable[[Path], float | None]
) -> Iterator[float]:
    """Yield the quotas of a control group and of all groups around it, up to `root`.

    In a container, `path` can be that on the host, which does not exist here. The files of the
    container's own group are then in `root`.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or no quota
            quota = read(root.joinpath(*parts[:count]))
            if quota is not None:
                yield quota


def _quota_of_version_2(group: Path) -> float | None:
    """Read `cpu.max`: microseconds of CPU time in a period, or `max`, and the period."""
    quota, period = (group / "cpu.max").read_text().split()[:2]
    return None if quota == "max" else _in_cores(int(quota), int(period))


def _quota_of_version_1(group: Path) -> float | None:
    """Read `cpu.cfs_quota_us`, which is -1 without a quota, and `cpu.cfs_period_us`."""
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return _in_cores(quota, int((group / "cpu.cfs_period_us").read_text()))


def _in_cores(quota: int, period: int) -> float | None:
    return quota / period if quota > 0 and period > 0 else None
