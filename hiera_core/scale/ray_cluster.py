"""Ray itself: whether it is installed, the connection to a cluster, its devices and its errors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import HieraError, OutputError, UsageError, first_line

START_ATTEMPTS = 3
log = logging.getLogger("hiera")


@dataclass(frozen=True)
class RayOptions:
    """How Ray is used.

    Args:
        address: A cluster, `auto` for the one on this machine, or None for a new one in this
            process (or the cluster of RAY_ADDRESS).
        cpus: Number of CPUs of a new one; None for all.
        device: `auto`, `cpu` or `cuda`: whether actors take a GPU each.
    """

    address: str | None = None
    cpus: int | None = None
    device: str = "auto"


def check_ray() -> None:
    """Check that Ray is installed.

    Raises:
        UsageError: It is not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", "pip install 'hiera-toolkit[ray]'"
        ) from error


def connect(options: RayOptions) -> tuple[Any, bool]:
    """Return Ray, connected to a cluster or to a new one on this machine, and whether it was
    connected here."""
    check_ray()
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        where = options.address or os.environ.get("RAY_ADDRESS")
        if where is None:
            _start(ray, options.cpus)
        else:
            try:
                _init(ray, options.address)
            except Exception as error:  # Ray raises many types, also a plain Exception
                raise OutputError(
                    f"no Ray cluster at {where} ({first_line(error)})", "check --address"
                ) from error
        _hide_worker_deaths()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):  # they print tracebacks of errors that we report in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray, is_ours


def _hide_worker_deaths() -> None:
    """Keep Ray from printing a paragraph to standard output for each worker that dies. The worker
    is replaced, and what ends the run is an error of ours. Ray has no option for this."""
    from ray._private import worker

    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = False


def _init(ray: Any, address: str | None, **options: Any) -> None:
    with _kept_signals():
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)


def _start(ray: Any, cpus: int | None) -> None:
    """Start Ray on this machine. It gives up after 30 seconds, which is short on a busy machine, so
    this is tried several times."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init(ray, "local", num_cpus=cpus, include_dashboard=False)
            return
        except Exception as error:
            _end_processes(error)
            if attempt == START_ATTEMPTS or "timed out" not in str(error).lower():
                raise OutputError(
                    f"Ray does not start on this machine ({first_line(error)})",
                    "run again when it is less busy; --resume continues",
                ) from error
            log.info("Ray did not start in time; attempt %d of %d", attempt + 1, START_ATTEMPTS)


def _end_processes(error: BaseException) -> None:
    """End the processes of a start that failed. Ray leaves them, and only the frame that raised the
    error knows them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        end = getattr(frame.f_locals.get("self"), "kill_all_processes", None)
        if end is not None:
            with contextlib.suppress(Exception):
                end(check_alive=False, allow_graceful=True)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Restore the handlers of signals, which Ray replaces by its own."""
    is_main = threading.current_thread() is threading.main_thread()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if is_main and handler is not None:
                signal.signal(number, handler)


def count_gpus(ray: Any, device: str) -> int:
    """Return the number of actors with a GPU; 0 for actors on CPUs.

    Raises:
        UsageError: The cluster has no GPU, and one is asked for.
    """
    count = int(ray.cluster_resources().get("GPU", 0))
    if device.startswith("cuda") and not count:
        raise UsageError("the Ray cluster has no GPU", "leave out --device, or add a node")
    return 0 if device == "cpu" else count


def as_hiera_error(error: BaseException) -> HieraError:
    """Return the error of a worker that is for users, or one about Ray."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or one in seen:
            continue
        if isinstance(one, HieraError):
            # Ray's own class is derived from ours; return ours.
            kind = next(c for c in type(one).__mro__ if c.__module__ == HieraError.__module__)
            cause: Any = getattr(one, "cause", one)
            known = cause if isinstance(cause, HieraError) else one
            return kind(known.message, known.hint)
        seen.append(one)
        waiting += [one.__cause__, one.__context__, getattr(one, "cause", None)]
    return OutputError(
        f"Ray stopped ({type(error).__name__}: {first_line(error)})",
        "what is written stays; --resume continues, --debug shows more",
    )
