"""Make every system call that writes an output fail, or kill the process there, one at a time.

After each fault the output is checked: no file under its final name is half written, one line says
what happened, the exit code is right, and the command that the line suggests completes the work
with the results of a run without faults.

It needs Linux and a C compiler. `pytest -m slow tests/campaigns/test_faults.py -n 0 -s` prints the
number of trials; docs/reliability.md says what they mean.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from hiera_core.inference import feature_formats

from ..fork_server import ForkServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and cc"
    ),
]

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
# Commands import these late; the server imports them once.
MODULES = tuple(
    f"hiera_core.{name}"
    for name in (
        "data.clip_reader",
        "data.toy_datasets",
        "inference.evaluate",
        "inference.feature_store",
        "inference.features",
        "inference.predict",
        "inference.reconstruct",
        "training.trainer",
    )
)
KINDS = ("open", "write", "sync", "rename", "remove", "mkdir")
SECONDS = 120.0  # after which a run counts as hung
MAX_CALLS = 100  # of a kind; if there are more, as many are tried, evenly spread


@dataclass(frozen=True)
class Job:
    """A command, the option that continues it after a fault, and how its results are compared."""

    arguments: str  # of hiera; {in} and {out} are folders
    again: str
    results: Callable[[Path], object]


def file_results(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, except unfinished ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_temporary(path, folder)
    }


def prediction_results(folder: Path) -> dict[str, object]:
    """Return the records of every input, and the digest of other files."""
    found: dict[str, object] = dict(file_results(folder))
    for path in folder.glob("out.*"):
        lines = path.read_text().splitlines()
        is_csv = path.suffix == ".csv"
        found[path.name] = [*csv.reader(lines)] if is_csv else [json.loads(line) for line in lines]
    return found


def feature_results(folder: Path) -> dict[str, object]:
    """Return the embedding of every input, from whatever files hold it. Each may occur once."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, names = feature_formats.read(path)
        for name, row in zip(names, tensors["embedding"], strict=True):
            assert name not in found, f"{name} has two rows"
            found[name] = row.tolist()
    return found


def same(found: Any, expected: Any) -> bool:
    """Return whether results are equal, numbers up to rounding: what was decoded in time decides
    which inputs are in one batch, and the sums of a larger batch have another order."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    try:  # numbers of a CSV file are text
        return math.isclose(float(found), float(expected), rel_tol=1e-4, abs_tol=1e-5)
    except (TypeError, ValueError):
        return bool(found == expected)


def training_results(folder: Path) -> dict[str, str]:
    """Return the digest of the final weights."""
    return {k: v for k, v in file_results(folder).items() if k.endswith("run/model.safetensors")}


JOBS = {
    "predict": Job(
        "predict @{in}/list.txt -m hiera_nano_32 -b 4 -q -o {out}/out.jsonl",
        "--resume",
        prediction_results,
    ),
    "predict to csv": Job(
        "predict @{in}/list.txt -m hiera_nano_32 -b 4 -q -o {out}/out.csv",
        "--overwrite",
        prediction_results,
    ),
    "features": Job(
        "features @{in}/list.txt -m hiera_nano_32 -b 4 -q --shard-size 4 -o {out}/features",
        "--resume",
        feature_results,
    ),
    "features to a file": Job(
        "features @{in}/list.txt -m hiera_nano_32 -b 4 -q -o {out}/f.safetensors",
        "--overwrite",
        feature_results,
    ),
    "mae": Job(
        "mae {in}/0.png {in}/1.png {in}/2.png -m mae_hiera_nano_32 -q -o {out}/mae",
        "--overwrite",
        file_results,
    ),
    "convert to a folder": Job(
        "convert hiera_nano_32 {out}/hub --to hub", "--overwrite", file_results
    ),
    "convert to a file": Job(
        "convert hiera_nano_32 {out}/model.pth --to pth", "--overwrite", file_results
    ),
    "train": Job(
        "train {in}/recipe.yaml {in}/classes -o {out}/run -j 0 -q --resume auto",
        "",
        training_results,
    ),
}
RECIPE = """
extends: hiera_nano_32
schedule: {epochs: 3, warmup_epochs: 1}
batch_size: 4
data: {val: 0.25}
log_every: 1
val_every: 1
save_every: 0.5
ema: 0.9
precision: fp32
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    library = tmp_path_factory.mktemp("library") / "failing_io.so"
    source = Path(__file__).with_name("failing_io.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    running = ForkServer(*MODULES, LD_PRELOAD=str(library))
    yield running
    running.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 12 pictures, a list of them, two classes of them, and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 40, 40, 3), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f"{i}.png")
        of_class = folder / "classes" / ("even", "odd")[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{i}.png", of_class)
    (folder / "list.txt").write_text("".join(f"{folder}/{i}.png\n" for i in range(12)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


class Trials:
    """The trials of one job."""

    def __init__(self, name: str, server: ForkServer, inputs: Path, folder: Path) -> None:
        self.job, self.server, self.folder = JOBS[name], server, folder
        self.inputs, self.counts, self.failures = inputs, Counter[str](), list[str]()
        self.log = folder / "calls"
        self.out = folder / "out"
        self.expected = self._expected()

    def _expected(self) -> object:
        self.out.mkdir()
        answer = self.run(FAIL_KIND="any", FAIL_LOG=self.log)
        assert answer["code"] == 0, answer["stderr"]
        self.calls = [line.split(" ")[0] for line in self.log.read_text().splitlines()]
        assert self.calls
        return self.job.results(self.out)

    def run(self, more: str = "", **environment: object) -> dict[str, Any]:
        # The folders are filled in after the split, because they may contain spaces.
        arguments = f"{self.job.arguments} {more}".split()
        places = {"{in}": str(self.inputs), "{out}": str(self.out)}
        for place, path in places.items():
            arguments = [argument.replace(place, path) for argument in arguments]
        process = self.server.start(self.folder, *arguments, FAIL_ROOT=self.out, **environment)
        try:
            code: int | None = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        return {"code": code, "stdout": process.text("out"), "stderr": process.text("err")}

    def trial(self, what: str, codes: tuple[int | None, ...], **environment: object) -> None:
        """Run the job with a fault, then complete it, and note what is wrong."""
        shutil.rmtree(self.out)
        self.out.mkdir()
        answer = self.run(**environment)
        self.counts[f"exit {answer['code']}"] += 1
        problems = list(self._problems(answer, codes))
        again = self.run(self.job.again if self._has_outputs() else "")
        if again["code"] != 0:
            problems.append(f"the second run ends with {again['code']}: {again['stderr']}")
        elif not same(found := self.job.results(self.out), self.expected):
            problems.append(
                f"the second run has other results: {_difference(found, self.expected)}"
            )
        self.failures += [f"{what}: {problem}" for problem in problems]

    def _has_outputs(self) -> bool:
        return any(not path.name.startswith(".") for path in self.out.iterdir())

    def _problems(self, answer: dict[str, Any], codes: tuple[int | None, ...]) -> Iterator[str]:
        code, stderr = answer["code"], answer["stderr"]
        if code not in codes:
            yield f"exit code {code}, not one of {codes}: {stderr}"
        if "Traceback" in stderr or "unexpected error" in stderr:
            yield stderr
        if code is not None and code > 0 and stderr.count("hiera: ") != 1:
            yield f"not one line on stderr: {stderr!r}"
        for path in sorted(self.out.rglob("*")):
            if path.is_file() and not _is_temporary(path, self.out):
                try:
                    check_whole(path)
                except Exception as error:
                    yield f"{path.name} is half written ({type(error).__name__}: {error})"

    def finish(self, name: str) -> None:
        counts = dict(sorted(self.counts.items()))
        print(f"\n{name}: {sum(counts.values())} trials, {counts}")
        shown = "\n".join(self.failures[:40])
        assert not self.failures, f"{len(self.failures)} failures:\n{shown}"


def _is_temporary(path: Path, root: Path) -> bool:
    """Return whether the name, or that of a folder above, says that a file is unfinished."""
    parts = path.relative_to(root).parts
    return any(p.startswith(".") or p.endswith((".partial", ".unfinished")) for p in parts)


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        names = {
            n for n in found.keys() | expected.keys() if not same(found.get(n), expected.get(n))
        }
        return ", ".join(sorted(names))
    return f"{found} in place of {expected}"


def check_whole(path: Path) -> None:
    """Read a file that has its final name. Raises if it is incomplete."""
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".pth":
        torch.load(path, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.name == "out.jsonl":
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 12
    elif path.suffix == ".csv":
        assert len(path.read_text().splitlines()) == 13
    elif path.suffix == ".png":
        Image.open(path).load()


def spread(count: int) -> list[int]:
    """Return the numbers of the calls to try, from 1 to `count`."""
    numbers = np.linspace(1, count, min(count, MAX_CALLS)).round().astype(int)
    return sorted(set(numbers.tolist()))


@pytest.mark.parametrize("name", JOBS)
def test_every_call_that_fails(name: str, server: ForkServer, inputs: Path, tmp_path: Path) -> None:
    """Each open, write, sync, rename, removal and mkdir fails once, for a changing reason."""
    trials = Trials(name, server, inputs, tmp_path)
    for kind in KINDS:
        for call in spread(trials.calls.count(kind)):
            error = ERRORS[call % len(ERRORS)]
            what = f"{kind} {call} fails with {errno.errorcode[error]}"
            trials.trial(what, (0, 5), FAIL_KIND=kind, FAIL_AT=call, FAIL_ERRNO=error)
    trials.finish(f"{name}: failing calls")


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_every_call(name: str, server: ForkServer, inputs: Path, tmp_path: Path) -> None:
    """SIGKILL before each call that changes the output folder."""
    trials = Trials(name, server, inputs, tmp_path)
    for call in spread(len(trials.calls)):
        what = f"killed at call {call} ({trials.calls[call - 1]})"
        number = int(signal.SIGKILL)
        trials.trial(what, (-9,), FAIL_KIND="any", FAIL_AT=call, FAIL_SIGNAL=number)
    trials.finish(f"{name}: SIGKILL")


@pytest.mark.parametrize("name", JOBS)
def test_interrupted_at_calls(name: str, server: ForkServer, inputs: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM before a sample of the calls that change the output folder."""
    trials = Trials(name, server, inputs, tmp_path)
    count = len(trials.calls)
    for call in sorted(random.Random(0).sample(range(1, count + 1), min(count, 12))):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            what = f"{number.name} at call {call} ({trials.calls[call - 1]})"
            # The signal may come too late to stop anything.
            fault = {"FAIL_KIND": "any", "FAIL_AT": call, "FAIL_SIGNAL": int(number)}
            trials.trial(what, (code, 0), **fault)
    trials.finish(f"{name}: SIGINT and SIGTERM")
