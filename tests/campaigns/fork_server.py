"""Run command lines in forked processes, so that a trial does not pay for the import of PyTorch.

    python -m tests.campaigns.fork_server

Reads one JSON object a line from stdin: `arguments` of `hiera`, `environment` (variables to set)
and `seconds` (after which the process is killed). Answers with one a line: `code` (negative: the
number of the signal that ended it; null: it was killed because it hung), `stdout` and `stderr`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from typing import Any


def main() -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    from hiera_cli import app
    from hiera_core.data import clip_reader, toy_datasets
    from hiera_core.inference import evaluate, feature_store, features, predict, reconstruct
    from hiera_core.training import trainer

    # The modules that commands import late are loaded here, once.
    _ = clip_reader, toy_datasets, evaluate, feature_store, features, predict, reconstruct, trainer
    for line in sys.stdin:
        answer = run(app.main, **json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def run(
    main: Any, arguments: list[str], environment: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Run a command line in a fork of this process, and return how it ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(main, arguments, environment, out.fileno(), err.fileno())
        code = _wait(child, seconds)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"code": code, "stdout": texts[0], "stderr": texts[1]}


def _become(
    main: Any, arguments: list[str], environment: dict[str, str], out: int, err: int
) -> None:
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(environment)
        sys.argv = ["hiera", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    finally:
        os._exit(99)  # `main` ends the process itself


def _wait(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    main()
