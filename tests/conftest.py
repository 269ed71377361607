"""Shared helpers and fixtures: drawn weights, small models, real photographs, a local hub."""

from __future__ import annotations

import gc
import hashlib
import http.server
import logging
import os
import subprocess
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from .fork_server import ForkedWorker, ForkServer

# The test processes share the cores, and so do the processes that they start.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
torch.set_num_threads(THREADS)

# A narrow and shallow Hiera: 4 stages and every kind of block. It runs in milliseconds.
SMALL = {"embed_dim": 16, "stages": (1, 1, 2, 1), "num_classes": 10, "input_size": (64, 64)}
POLL_S = 0.02  # after which a server of the tests notices that it should stop
LONG = ("benchmarking", "compiled", "conversion", "distributed", "parity", "predict", "ray_engine")
RunProcess = Callable[..., subprocess.CompletedProcess[str]]
PICTURES = ("chelsea", "coffee", "rocket", "astronaut")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are collected, and never again in what is there by then.

    Nearly all of it is needed to the end: a million objects, in which a search takes a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of the longest tests, so that no process ends with one of them."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill a model with random weights that affect its output.

    Position embeddings, biases and norms get values far from their initial ones, and the head gives
    class probabilities that are far from uniform.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        bound = 0.1 if name.startswith(("head", "pos_embed")) else 0.04
        if name == "head.projection.weight" and parameter.shape[1] < 300:
            bound = 1.0  # with few features, only large weights give peaked probabilities
        parameter.uniform_(-bound, bound, generator=generator)
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    return model


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Check that the largest absolute difference is within the tolerance.

    The tolerance is relative to the reference's largest value, if that exceeds 1.
    """
    assert ours.shape == reference.shape
    scale = max(1.0, reference.abs().max().item())
    difference = (ours - reference).abs().max().item()
    assert difference <= tolerance * scale, f"{difference} > {tolerance} x {scale}"


@pytest.fixture(scope="session", autouse=True)
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep compiled programs in a folder of their own."""
    folder = tmp_path_factory.mktemp("compiled")
    folder.chmod(0o700)
    os.environ["HIERA_COMPILED_FOLDER"] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep indices of data sets in a folder of their own."""
    os.environ["HIERA_INDEX_FOLDER"] = str(tmp_path_factory.mktemp("indices"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of real photographs."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for name in PICTURES:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved small classifier: model.safetensors and config.json."""
    import hiera_core

    folder = tmp_path_factory.mktemp("small")
    model = draw_weights(hiera_core.Hiera(**SMALL))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the tests are as wide as they need to be."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def quick_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write an empty picture in place of their curves, which take most of their time.

    Tests that look at curves, or at what is there without matplotlib, take `real_curves`.
    """
    from hiera_core.atomic import atomic_file
    from hiera_core.viz import charts

    def draw(path: Path, plots: dict[str, Any], x_label: str) -> None:
        assert plots and x_label
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"\x89PNG\r\n\x1a\n")

    if "real_curves" not in request.fixturenames:
        monkeypatch.setattr(charts, "draw_curves", draw)


@pytest.fixture
def real_curves() -> None:
    """Runs draw their curves."""


@pytest.fixture
def hiera(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line in this process.

    It returns (exit code, stdout, stderr).
    """
    from hiera_cli.app import run

    log = logging.getLogger("hiera")

    def call(*arguments: object) -> tuple[int, str, str]:
        level = log.level
        try:
            code = run([str(a) for a in arguments])
        finally:
            log.setLevel(level)  # which a command chooses for its process
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Return a server that starts processes of hiera, which is quicker than a new Python."""
    running = ForkServer()
    yield running
    running.close()


@pytest.fixture
def run_process(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """Return a function that runs a command line of hiera in a separate process."""
    folder = tmp_path_factory.mktemp("streams")

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        process = fork_server.start(folder, *arguments, **environment)
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(arguments, process.wait(), stdout, stderr)

    return run


@pytest.fixture
def forked_workers(
    fork_server: ForkServer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`hiera bench` forks its worker processes, which is quicker than a new Python for each."""
    fork_workers(fork_server, tmp_path_factory.mktemp("workers"), monkeypatch)


def fork_workers(server: ForkServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `hiera bench` fork its worker processes. The folder gets the pipes to them."""
    from hiera_core.benchmarking import runner

    def start(command: list[str], stderr: IO[bytes], **_: object) -> ForkedWorker:
        assert command[1:] == ["-m", "hiera_core.benchmarking.worker"]
        return ForkedWorker(server, folder, stderr)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=start))


class Hub(http.server.ThreadingHTTPServer):
    """Local server with the part of the hub that downloads need: files and their metadata."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.plain: dict[str, bytes] = {}  # files outside repositories, by path
        self.cut: int | None = None  # bytes after which a connection breaks off
        self.gated = False
        self.log: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        hub = self.server
        hub.log.append(f"{self.command} {self.path}")
        repo, _, file = self.path.lstrip("/").partition("/resolve/main/")
        files = hub.repositories.get(repo)
        if self.path in hub.plain:
            self._send(hub.plain[self.path], with_body, {})
        elif files is None:
            self._refuse(404, "RepoNotFound")
        elif hub.gated:
            self._refuse(403, "GatedRepo")
        elif file not in files:
            self._refuse(404, "EntryNotFound")
        else:
            etag = hashlib.sha256(files[file]).hexdigest()
            self._send(files[file], with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40})

    def _send(self, content: bytes, with_body: bool, headers: dict[str, str]) -> None:
        start = 0
        if byte_range := self.headers.get("Range"):
            start = int(byte_range.removeprefix("bytes=").split("-")[0])
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if with_body:
            self.wfile.write(content[start:][: self.server.cut])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Yield a local hub at `hub.url`. Tests fill `hub.repositories` and read `hub.log`."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=[POLL_S], daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Faulty:
    """A WSGI application that fails now and then: 500, a body that is cut, a slow answer."""

    def __init__(self, application: Any) -> None:
        self.application, self.count, self.faults = application, 0, Counter[str]()
        self.is_faulty, self._lock = False, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self._lock:
            self.count += 1
            number = self.count
        if self.is_faulty and number % 4 == 1:
            self.faults["500"] += 1
            start("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = b"".join(self.application(environ, start))
        if self.is_faulty and number % 5 == 2 and environ["REQUEST_METHOD"] == "GET" and body:
            self.faults["cut"] += 1
            return [body[: len(body) // 2]]
        if self.is_faulty and number % 7 == 3:
            self.faults["slow"] += 1
            threading.Event().wait(0.2)
        return [body]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server of S3 on this machine, for the place's own environment variables."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    application = Faulty(server.DomainDispatcherApplication(server.create_backend_app))
    running = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=running.serve_forever, args=[POLL_S], daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    from hiera_core.places import remote_requests

    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.01)
    yield application
    application.is_faulty = False
    reset = f"http://127.0.0.1:{running.port}/moto-api/reset"
    urllib.request.urlopen(reset, b"").close()  # its buckets are those of the process
    running.shutdown()
    thread.join()
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
