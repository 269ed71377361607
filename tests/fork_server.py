"""Run command lines in forked processes, which do not pay for the imports.

`ForkServer` starts `python -m tests.fork_server`, imports PyTorch and this package there once, and
forks for every command line. Signals, exit codes, standard output and standard error are those of a
process of its own; only the start is quicker.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

MODULES = (
    *("torch", "torch.distributed", "torchvision", "numpy", "PIL.Image", "av"),
    *("sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("safetensors.torch", "typer._adapters", "hiera_cli.app"),
    *(f"hiera_core.inference.{name}" for name in ("predict", "evaluate", "model_fingerprint")),
    *(f"hiera_core.training.{name}" for name in ("build", "trainer")),
    "hiera_core.data.decoders.torchcodec_video",
)
# They read variables of the environment when they are imported, such as HF_ENDPOINT.
READ_WHEN_IMPORTED = ("huggingface_hub", "transformers", "hiera_core", "hiera_cli")


class ForkServer:
    """Starts processes that have imported PyTorch.

    Args:
        modules: What else is imported once, for all of them.
        environment: More variables for the server and its processes.
    """

    def __init__(self, *modules: str, **environment: str) -> None:
        self.environment = {"OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *MODULES, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
            cwd=Path(__file__).parents[1],
        )

    def start(
        self,
        folder: Path,
        *arguments: object,
        stdout: str | None = None,
        code: str | None = None,
        file_limit: int | None = None,
        **environment: object,
    ) -> ForkedProcess:
        """Start `hiera` with the arguments, or a program.

        Args:
            folder: Gets files with what the process writes to standard output and error.
            arguments: The command line.
            stdout: Standard output, if it is another file.
            code: The program, if it is not `hiera`, as after `python -c`.
            file_limit: Bytes that a file may have. Longer ones cannot be written.
            environment: Variables, in addition to those of this process.
        """
        place = folder / f"process-{time.monotonic_ns()}"
        outputs = {"stdout": place.with_suffix(".out"), "stderr": place.with_suffix(".err")}
        for path in outputs.values():
            path.touch()
        given = {name: str(value) for name, value in environment.items()}
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": {**os.environ, **self.environment, **given},
            "folder": str(Path.cwd()),
            "code": code,
            "file_limit": file_limit,
            **{stream: str(path) for stream, path in outputs.items()},
            **({} if stdout is None else {"stdout": stdout}),
        }
        return ForkedProcess(self, self.ask(start=request), place)

    def ask(self, **request: object) -> Any:
        """Send a request to the server and return its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class ForkedProcess:
    """A process of a `ForkServer`, with the methods of `subprocess.Popen` that tests need."""

    def __init__(self, server: ForkServer, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.returncode: int | None = None  # negative: the signal that ended the process

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """Return the exit code.

        Raises:
            TimeoutExpired: The process was still running, and was killed.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("hiera", timeout, stderr=self.text("err").encode())
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Return what the process wrote to standard output and standard error, after its end."""
        self.wait(timeout)
        return self.text("out"), self.text("err")

    def text(self, stream: str) -> str:
        return self.output.with_suffix(f".{stream}").read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal to the process. SIGKILL also ends the processes that it started."""
        if self.poll() is None:
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedWorker(ForkedProcess):
    """A forked worker of `hiera bench`, to which this process talks through two named pipes."""

    def __init__(self, server: ForkServer, folder: Path, errors: IO[bytes]) -> None:
        names = [folder / f"worker-{time.monotonic_ns()}.{name}" for name in ("in", "out")]
        for name in names:
            os.mkfifo(name)
        request = {
            "arguments": [],
            "environment": {**os.environ, **server.environment},
            "folder": str(Path.cwd()),
            "code": "from hiera_core.benchmarking.worker import main; main()",
            "stdin": str(names[0]),
            "stdout": str(names[1]),
            "stderr": f"/proc/{os.getpid()}/fd/{errors.fileno()}",
        }
        super().__init__(server, server.ask(start=request), names[1])
        self.stdin, self.stdout = names[0].open("w"), names[1].open()


def serve(modules: list[str]) -> None:
    """Answer requests until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = _fork(**request["start"])
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    stdout: str,
    stderr: str,
    stdin: str = os.devnull,
    code: str | None = None,
    file_limit: int | None = None,
) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _renew_threads()
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        if _settings(environment) != _settings(os.environ):
            _forget(READ_WHEN_IMPORTED)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["hiera" if code is None else "-c", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):  # `nohup pytest` ignores one of them
            signal.signal(number, signal.SIG_DFL)
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        if code is not None:
            _run(code)
        from hiera_cli import app

        app.main()
    finally:
        os._exit(99)  # `main` ends the process itself


def _renew_threads() -> None:
    """Let PyTorch make a new pool of threads, because those of the parent do not survive a fork.

    Otherwise it does so when threads of the backward pass begin, and aborts the process if two of
    them begin at a time.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _settings(environment: Any) -> dict[str, str]:
    """Return the variables that some modules read when they are imported."""
    first = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_CACHE", "HOME")
    return {name: value for name, value in environment.items() if name.startswith(first)}


def _forget(packages: tuple[str, ...]) -> None:
    """Let packages be imported again."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def _run(code: str) -> None:
    """Run a program, and end the process with it."""
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1:])
