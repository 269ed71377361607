"""Tests of downloads against a server that fails in every way that servers fail.

The hub's real client speaks to it, too. The campaign (`pytest -m slow tests/test_download.py`)
tries each fault at many places.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.errors import CheckpointError, HieraError, HubError, InputError, UsageError
from hiera_core.weights import download, download_record, fetch, hub_patience, load
from hiera_core.weights.integrity import DamagedFile, check_weights_file

from .conftest import SMALL, RunProcess, draw_weights

COMMIT = "c" * 40
SIGN_IN = b"<!doctype html><html><title>Sign in</title></html>"


@dataclass
class Behaviour:
    """What the server does with requests for files.

    Args:
        etag, modified: Headers of a file's version; None for no header. "sha256" and "md5" stand
            for the checksum of the content, and "path" for one that does not depend on it.
        ranges: What it does with Range: "honour", "ignore" it, or ignore the condition
            ("unconditional"); "shifted" sends other bytes than those that were asked for.
        cut: Bytes after which the connection breaks off; `cuts` limits how often.
        length: Whether it says how many bytes follow.
        status: Status code of every answer to a GET; `head_status` to a HEAD.
        headers: Further headers.
        location: Where it redirects to.
        pause_s: Pause before the answer to a GET.
        drip: Bytes that it sends at a time, with a pause of `drip_s` after each.
    """

    etag: str | None = "sha256"
    modified: str | None = None
    ranges: str = "honour"
    cut: int | None = None
    cuts: int = 1_000_000
    length: bool = True
    status: int = 200
    head_status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    location: str | None = None
    pause_s: float = 0.0
    drip: int | None = None
    drip_s: float = 0.02


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path: plain files, and those of hub repositories."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.url = f"http://{host}:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.behaviour = Behaviour()
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.lock = threading.Lock()

    def add_repository(self, repo: str, **files: bytes) -> None:
        for name, content in files.items():
            self.files[f"/{repo}/resolve/main/{name.replace('__', '.')}"] = content

    def gets(self, path: str = "") -> list[str | None]:
        """Return the Range headers of the GET requests for paths that end so."""
        return [r for method, p, r in self.log if method == "GET" and p.endswith(path)]

    def handle_error(self, *_: Any) -> None: ...  # clients hang up


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.0"

    def do_HEAD(self) -> None:
        self._answer(self.server.behaviour.head_status)

    def do_GET(self) -> None:
        self._answer(self.server.behaviour.status)

    def _answer(self, status: int) -> None:
        server, how = self.server, self.server.behaviour
        server.log.append((self.command, self.path, self.headers.get("Range")))
        if self.command == "GET":
            time.sleep(how.pause_s)
        if how.location is not None:
            return self._begin(302, {"Location": how.location, "Content-Length": "0"})
        if status != 200:
            return self._begin(status, {"Content-Length": "0", **how.headers})
        content = server.files.get(self.path)
        if content is None:
            code = "EntryNotFound" if self._in_repository() else "RepoNotFound"
            return self._begin(404, {"X-Error-Code": code, "Content-Length": "0"})
        headers = {"X-Repo-Commit": COMMIT, **how.headers}
        etag = how.etag and {
            "sha256": hashlib.sha256(content).hexdigest(),
            "md5": hashlib.md5(content).hexdigest(),
            "path": hashlib.md5(self.path.encode()).hexdigest(),
        }.get(how.etag, how.etag)
        if etag:
            headers["ETag"] = etag if etag.startswith("W/") else f'"{etag}"'
        if how.modified:
            headers["Last-Modified"] = how.modified
        start = self._first_byte(headers)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if how.ranges == "shifted":
                start -= 1
        if how.length:
            headers["Content-Length"] = str(len(content) - start)
        if start and start >= len(content):
            return self._begin(416, {"Content-Range": f"bytes */{len(content)}"})
        self._begin(206 if start else 200, headers)
        if self.command == "GET":
            self._send(content[start:])
        return None

    def _in_repository(self) -> bool:
        prefix = self.path.partition("/resolve/")[0] + "/resolve/"
        return any(path.startswith(prefix) for path in self.server.files)

    def _first_byte(self, headers: dict[str, str]) -> int:
        how, wanted = self.server.behaviour, self.headers.get("Range")
        if wanted is None or how.ranges == "ignore":
            return 0
        condition = self.headers.get("If-Range")
        versions = (headers.get("ETag"), headers.get("Last-Modified"))
        if condition is not None and how.ranges == "honour" and condition not in versions:
            return 0
        return int(wanted.removeprefix("bytes=").split("-")[0])

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes) -> None:
        how = self.server.behaviour
        if how.cut is not None and how.cut < len(content) and how.cuts:
            content, how.cuts = content[: how.cut], how.cuts - 1
        with contextlib.suppress(OSError):  # the client has hung up
            for start in range(0, len(content), how.drip or len(content) or 1):
                self.wfile.write(content[start:][: how.drip])
                if how.drip:
                    self.wfile.flush()
                    time.sleep(how.drip_s)

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def serve(host: str = "127.0.0.1") -> Iterator[Server]:
    with Server(host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def caches(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the hub's client, the URL of the zoo and both caches to the server and `tmp_path`."""
    from huggingface_hub import constants

    monkeypatch.setenv("HIERA_WEIGHTS_URL", server.url)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(download, "HEAD_PAUSE_S", 0.0)
    return tmp_path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after half a second."""
    for module in (fetch, hub_patience):
        monkeypatch.setattr(module, "PATIENCE_S", 0.5)


def saved(seed: int) -> bytes:
    """Return the content of a .pth file of a small classifier. Its size is always the same."""
    buffer = io.BytesIO()
    torch.save({"model_state": draw_weights(hiera_core.Hiera(**SMALL), seed).state_dict()}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pth() -> bytes:
    return saved(seed=0)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a small classifier, as a hub repository holds them."""
    folder = tmp_path_factory.mktemp("repository")
    draw_weights(hiera_core.Hiera(**SMALL), seed=1).save_pretrained(folder)
    return {path.name.replace(".", "__"): path.read_bytes() for path in folder.iterdir()}


def other(content: bytes) -> bytes:
    """Return a valid .pth file of the same size with other weights."""
    changed = saved(seed=1)
    assert len(changed) == len(content) and changed != content
    return changed


def leftovers(folder: Path) -> list[str]:
    """Return the names of files that must not remain after a success."""
    return [p.name for p in folder.rglob("*") if "partial" in p.name or "incomplete" in p.name]


# Resuming a download from a URL -----------------------------------------------------------------


def test_an_interrupted_download_continues(server: Server, caches: Path, pth: bytes) -> None:
    server.files["/a.pth"] = pth
    url = f"{server.url}/a.pth"
    server.behaviour.cut = 1000
    with pytest.raises(HubError, match="broke off"):
        download.from_url(url)
    server.behaviour.cut = None
    path = download.from_url(url, check=check_weights_file).weights
    assert path.read_bytes() == pth
    assert server.gets() == [None, "bytes=1000-"]
    assert leftovers(caches) == []
    record = json.loads(download_record.record_path(path).read_text())
    assert record["url"] == url and record["size"] == len(pth)
    assert record["sha256"] == hashlib.sha256(pth).hexdigest()


@pytest.mark.parametrize("ranges", ["honour", "ignore", "unconditional", "shifted"])
@pytest.mark.parametrize(
    "versions",
    [
        ("one", "two"),
        (None, None),
        ("W/x", "W/x"),
        ("date one", "date two"),
        ("date one", "date one"),
        ("same", "same"),
    ],
    ids=["etags", "none", "weak-etags", "dates", "same-date", "same-etag"],
)
def test_a_partial_file_is_never_continued_with_another_version(
    server: Server, caches: Path, pth: bytes, ranges: str, versions: tuple[str | None, str | None]
) -> None:
    """The result is one version or the other, whatever the server says and does."""
    url, second = f"{server.url}/a.pth", other(pth)
    by_date = "date" in str(versions[0])

    def publish(content: bytes, version: str | None) -> None:
        server.files["/a.pth"] = content
        server.behaviour.etag = None if by_date else version
        server.behaviour.modified = version if by_date else None

    publish(pth, versions[0])
    server.behaviour.cut = len(pth) // 2
    with pytest.raises(HubError):
        download.from_url(url, check=check_weights_file)
    publish(second, versions[1])
    server.behaviour.cut, server.behaviour.ranges = None, ranges
    try:
        path = download.from_url(url, check=check_weights_file).weights
    except HubError as error:  # a server that lies about its ETag: the CRCs show it
        assert versions == ("same", "same") and "truncated or damaged" in error.message
        path = download.from_url(url, check=check_weights_file).weights
    assert path.read_bytes() == second


@pytest.mark.parametrize("described", [True, False])
def test_a_whole_partial_file_is_not_trusted(
    server: Server, caches: Path, pth: bytes, described: bool
) -> None:
    """A partial file of the right size can be that of another file."""
    url = f"{server.url}/a.pth"
    server.files["/a.pth"] = pth
    server.behaviour.cut = 1000
    with pytest.raises(HubError):
        download.from_url(url)
    server.behaviour.cut = None
    (partial,) = caches.rglob("*.partial")
    partial.write_bytes(other(pth))
    if not described:
        partial.with_name(partial.name + ".json").unlink()
    assert download.from_url(url).weights.read_bytes() == pth


def test_damaged_descriptions_start_over(server: Server, caches: Path, pth: bytes) -> None:
    url = f"{server.url}/a.pth"
    server.files["/a.pth"] = pth
    for text in ("", "[]", "[[[", '{"url": 3}', '{"surprise": 1}', "null", "\0"):
        server.behaviour.cut = 1000
        with pytest.raises(HubError):
            download.from_url(url)
        server.behaviour.cut = None
        (partial,) = caches.rglob("*.partial")
        partial.with_name(partial.name + ".json").write_text(text)
        path = download.from_url(url).weights
        assert path.read_bytes() == pth
        path.unlink()


def test_a_file_that_shrinks_starts_over(server: Server, caches: Path, pth: bytes) -> None:
    url = f"{server.url}/a.pth"
    server.files["/a.pth"] = pth + bytes(5000)
    server.behaviour.cut = len(pth) + 1000
    with pytest.raises(HubError):
        download.from_url(url)
    server.files["/a.pth"] = pth
    server.behaviour.cut, server.behaviour.ranges = None, "unconditional"
    assert download.from_url(url).weights.read_bytes() == pth


# Content that cannot be right -------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["sign-in page", "empty", "cut without a length", "compressed"])
def test_wrong_content_is_not_stored(server: Server, caches: Path, pth: bytes, bad: str) -> None:
    url = f"{server.url}/a.pth"
    server.files["/a.pth"] = {"sign-in page": SIGN_IN, "empty": b""}.get(bad, pth)
    if bad == "cut without a length":
        server.behaviour.length, server.behaviour.cut = False, len(pth) // 2
    if bad == "compressed":
        server.behaviour.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(HubError):
        load.read_checkpoint(url)
    assert [p for p in caches.rglob("*.pth") if p.is_file()] == []
    server.files["/a.pth"], server.behaviour = pth, Behaviour()
    assert load.read_checkpoint(url).num_classes == 10


@pytest.mark.parametrize("damage", ["sign-in page", "truncated", "flipped", "other file"])
def test_a_damaged_file_in_the_cache_is_fetched_again(
    server: Server, caches: Path, pth: bytes, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    url = f"{server.url}/a.pth"
    server.files["/a.pth"] = pth
    path = download.from_url(url).weights
    flipped = bytearray(pth)
    flipped[len(pth) // 2] ^= 1
    bad = {"sign-in page": SIGN_IN, "truncated": pth[:-100], "flipped": bytes(flipped)}
    path.write_bytes(bad.get(damage, other(pth)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=path.name) as caught:
        load.read_checkpoint(url)
    assert "with a network" in caught.value.hint and path.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load.read_checkpoint(url).num_classes == 10
    assert path.read_bytes() == pth and len(server.gets()) == 2


def test_a_file_of_the_reference_in_the_cache_is_checked_and_used(
    server: Server, caches: Path, pth: bytes
) -> None:
    """torch.hub writes no record. Such a file is used as long as it is undamaged."""
    folder = caches / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "a.pth").write_bytes(pth)
    url = f"{server.url}/a.pth"
    assert load.read_checkpoint(url).num_classes == 10 and server.log == []
    (folder / "a.pth").write_bytes(SIGN_IN)
    server.files["/a.pth"] = pth
    assert load.read_checkpoint(url).num_classes == 10 and len(server.gets()) == 1


def test_a_file_of_the_user_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(SIGN_IN)
    with pytest.raises(DamagedFile):
        load.read_checkpoint(path)
    assert path.read_bytes() == SIGN_IN


def test_links_in_the_cache_to_files_of_the_user_are_removed_alone(
    server: Server, caches: Path, pth: bytes
) -> None:
    mine, folder = caches / "mine.pth", caches / "torch" / "checkpoints"
    mine.write_bytes(SIGN_IN)
    folder.mkdir(parents=True)
    (folder / "a.pth").symlink_to(mine)
    server.files["/a.pth"] = pth
    assert load.read_checkpoint(f"{server.url}/a.pth").num_classes == 10
    assert mine.read_bytes() == SIGN_IN and not (folder / "a.pth").is_symlink()
    snapshot = caches / "hf" / "models--me--small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(mine)
    download.drop_from_cache(snapshot / "model.safetensors", unless_newer=time.time() + 1)
    assert mine.read_bytes() == SIGN_IN and not any(snapshot.iterdir())


def test_a_copied_cache_is_verified_once(server: Server, caches: Path, pth: bytes) -> None:
    """Another time stamp leads to one comparison of checksums, which the record remembers."""
    server.files["/a.pth"] = pth
    url = f"{server.url}/a.pth"
    path = download.from_url(url).weights
    os.utime(path, (1, 1))
    assert download.cached_url(url) == path
    record = json.loads(download_record.record_path(path).read_text())
    assert record["mtime_ns"] == 10**9 and record["url"] == url


def test_checksums_of_the_zoo_are_compared(server: Server, caches: Path, pth: bytes) -> None:
    url, right = f"{server.url}/a.pth", hashlib.sha256(pth).hexdigest()
    server.files["/a.pth"] = pth
    with pytest.raises(HubError, match="other bytes than expected"):
        download.from_url(url, "0" * 64)
    path = download.from_url(url, right).weights
    assert download.cached_url(url, right) == path
    with pytest.raises(DamagedFile, match="SHA-256 differs"):
        download.cached_url(url, "0" * 64)


def test_the_script_for_checksums(server: Server, caches: Path, pth: bytes) -> None:
    from . import checksums

    server.files = {"/hiera_tiny_224.pth": pth, "/mae_hiera_tiny_224.pth": pth}
    found = dict(checksums.checksums(["hiera_tiny_224"]))
    digest = hashlib.sha256(pth).hexdigest()
    assert found == {"hiera_tiny_224.pth": digest, "mae_hiera_tiny_224.pth": digest}


# Servers that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_failures_of_a_url_are_one_line(server: Server, caches: Path, status: int) -> None:
    server.behaviour.status = status
    with pytest.raises(HubError, match=f"could not be fetched .*{status}"):
        load.read_checkpoint(f"{server.url}/a.pth")


@pytest.mark.parametrize(
    "location", ["/a.pth", "ftp://127.0.0.1/a.pth", "file:///etc/passwd", "http://[::1", ""]
)
def test_redirects_that_lead_nowhere(server: Server, caches: Path, location: str) -> None:
    server.behaviour.location = location
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint(f"{server.url}/a.pth")


@pytest.mark.parametrize("drip", [1, 100])
def test_a_slow_drip_ends(
    server: Server, caches: Path, pth: bytes, impatient: None, drip: int
) -> None:
    server.files["/a.pth"] = pth
    server.behaviour.drip, server.behaviour.drip_s = drip, 0.3
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint(f"{server.url}/a.pth")


def test_a_drip_within_the_header_ends(impatient: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.0 200 OK\r\nX: ")
                for _ in range(200):
                    connection.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a"
        with pytest.raises(fetch.FetchError, match="per second"), fetch.open_url(url):
            pass
        thread.join()


def test_the_whole_transfer_has_a_time_limit(server: Server) -> None:
    """However fast the bytes arrive."""
    server.files["/a"] = bytes(1 << 20)
    server.behaviour.drip, server.behaviour.drip_s = 10_000, 0.05
    with (
        pytest.raises(fetch.FetchError, match="not complete after"),
        fetch.open_url(f"{server.url}/a", total_s=0.4) as response,
    ):
        for _ in response.chunks():
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has more addresses than 127.0.0.1")
def test_a_public_server_cannot_redirect_into_the_private_network(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1 plays the public server, and 127.0.0.2 the private one."""
    with serve("127.0.0.2") as private:
        private.files["/secret"] = b"secret"
        server.behaviour.location = f"{private.url}/secret"
        with fetch.open_url(f"{server.url}/a") as response:  # the user named a local server
            assert b"".join(response.chunks()) == b"secret"
        monkeypatch.setattr(fetch, "is_public_address", lambda address: address == "127.0.0.1")
        with (
            pytest.raises(fetch.FetchError, match=r"private address 127\.0\.0\.2"),
            fetch.open_url(f"{server.url}/a"),
        ):
            pass
        # A name that resolves to a public address when it is checked, and to another afterwards.
        monkeypatch.setattr(fetch, "is_public_host", lambda host: True)
        with (
            pytest.raises(fetch.FetchError, match=r"private address 127\.0\.0\.2"),
            fetch.open_url(f"{server.url}/a"),
        ):
            pass
        assert len(private.log) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has more addresses than 127.0.0.1")
def test_a_public_server_cannot_redirect_to_its_own_name_at_a_private_address(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that has a public address first, and a private one when the redirect is followed."""
    resolve = socket.getaddrinfo
    with serve("127.0.0.2") as private:
        private.files["/secret"] = b"secret"
        first, second = (urllib.parse.urlsplit(s.url).port for s in (server, private))

        def resolve_name(host: str, port: Any, *rest: Any, **options: Any) -> Any:
            host = "127.0.0.2" if port == second else "127.0.0.1"
            return resolve(host, port, *rest, **options)

        server.behaviour.location = f"http://name.example:{second}/secret"
        monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
        monkeypatch.setattr(fetch, "is_public_address", lambda address: address == "127.0.0.1")
        with (
            pytest.raises(fetch.FetchError, match=r"private address 127\.0\.0\.2"),
            fetch.open_url(f"http://name.example:{first}/a"),
        ):
            pass
        assert private.log == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
    ],
)
def test_private_addresses(address: str, public: bool) -> None:
    assert fetch.is_public_address(address) is public


@pytest.mark.parametrize("url", ["https://[::1", "http://", "http://h:port/x", "http://bad host/x"])
def test_urls_that_are_not_valid(url: str, caches: Path) -> None:
    from hiera_core.data.sources import Source

    with pytest.raises(HubError if "bad host" in url else UsageError):
        load.read_checkpoint(url)
    with pytest.raises(InputError, match="cannot be fetched"):
        Source(url, url=url).content()


def test_long_urls_have_short_names_in_the_cache(server: Server, caches: Path, pth: bytes) -> None:
    path = f"/{'x' * 400}.pth"
    server.files[path] = pth
    assert load.read_checkpoint(server.url + path).num_classes == 10


# The hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("etag", ["sha256", "md5", "path"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_files_in_the_hubs_cache_are_fetched_again(
    server: Server, caches: Path, repository: dict[str, bytes], etag: str, file: str
) -> None:
    server.add_repository("me/small", **repository)
    server.behaviour.etag = etag
    for content in (SIGN_IN, repository[file.replace(".", "__")][:-10]):
        server.files[f"/me/small/resolve/main/{file}"] = content
        with pytest.raises(HieraError) as caught:
            load.read_checkpoint("me/small")
        assert type(caught.value) is HubError
    server.add_repository("me/small", **repository)
    checkpoint = load.read_checkpoint("me/small")
    assert checkpoint.num_classes == 10 and checkpoint.config is not None
    assert leftovers(caches) == []


def test_wrong_bytes_of_the_right_size_from_the_hub(
    server: Server, caches: Path, repository: dict[str, bytes]
) -> None:
    """The hub gives the SHA-256 of weights before it sends them."""
    right = repository["model__safetensors"]
    server.behaviour.etag = hashlib.sha256(right).hexdigest()
    for place in (0, 100, len(right) // 2, len(right) - 1):
        wrong = bytearray(right)
        wrong[place] ^= 1
        server.add_repository("me/bare", model__safetensors=bytes(wrong))
        with pytest.raises(HubError, match="arrived damaged"):
            load.read_checkpoint("me/bare")
    server.add_repository("me/bare", model__safetensors=right)
    assert load.read_checkpoint("me/bare").num_classes == 10


def test_a_damaged_blob_is_named_offline(
    server: Server,
    caches: Path,
    repository: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.add_repository("me/small", **repository)
    load.read_checkpoint("me/small")
    (link,) = caches.rglob("snapshots/*/model.safetensors")
    blob = link.resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load.read_checkpoint("me/small", local_files_only=True)
    assert blob.exists()
    with caplog.at_level(logging.WARNING, "hiera"):
        assert load.read_checkpoint("me/small").num_classes == 10
    assert "removed from the cache, and fetched again" in caplog.text
    assert link.resolve().read_bytes() == repository["model__safetensors"]


@pytest.mark.parametrize("damaged", [False, True])
def test_blobs_may_be_links_to_a_shared_store(tmp_path: Path, damaged: bool) -> None:
    """The client shares files of the protocol Xet among repositories, and names them by other
    hashes, which are as long as a SHA-256."""
    content = b"content"
    store, blobs = tmp_path / "blobs" / "ab", tmp_path / "models--me--small" / "blobs"
    snapshot = tmp_path / "models--me--small" / "snapshots" / COMMIT
    for folder in (store, blobs, snapshot):
        folder.mkdir(parents=True)
    (store / ("ab" * 32)).write_bytes(b"other" if damaged else content)
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).symlink_to(Path("../../blobs/ab") / ("ab" * 32))
    link = snapshot / "model.safetensors"
    link.symlink_to(Path("../../blobs") / digest)
    if damaged:
        with pytest.raises(HubError, match="arrived damaged"):
            download._verify_blob(link, "me/small")
    else:
        download._verify_blob(link, "me/small")
        assert link.read_bytes() == content
        download.drop_from_cache(link, unless_newer=time.time() + 1)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()]


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses(server: Server, caches: Path, status: int) -> None:
    server.behaviour.head_status = server.behaviour.status = status
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint("me/small")


@pytest.mark.parametrize("status", [403, 429, 500])
def test_a_hub_that_refuses_the_download_itself(
    server: Server, caches: Path, repository: dict[str, bytes], status: int
) -> None:
    server.add_repository("me/small", **repository)
    server.behaviour.status = status
    server.behaviour.headers = {"Retry-After": "3600"}
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint("me/small")


def test_a_hub_that_refuses_for_a_moment(
    server: Server,
    caches: Path,
    repository: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add_repository("me/small", **repository)
    server.behaviour.head_status = 503

    def recover(_: float) -> None:
        server.behaviour.head_status = 200

    monkeypatch.setattr(download.time, "sleep", recover)
    assert load.read_checkpoint("me/small").num_classes == 10


def test_the_cache_serves_while_the_hub_is_down(
    server: Server, caches: Path, repository: dict[str, bytes]
) -> None:
    server.add_repository("me/small", **repository)
    load.read_checkpoint("me/small")
    server.behaviour.head_status = server.behaviour.status = 500
    assert load.read_checkpoint("me/small").num_classes == 10


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_hub_that_stalls_is_reported(
    server: Server, caches: Path, repository: dict[str, bytes], impatient: None, fault: str
) -> None:
    server.add_repository("me/small", **repository)
    if fault == "stall":
        server.behaviour.pause_s = 2.0
    else:
        server.behaviour.drip, server.behaviour.drip_s = 10, 0.2
    with pytest.raises(HubError, match=r"too slow|does not answer"):
        load.read_checkpoint("me/small")
    assert leftovers(caches) == []


def test_the_users_time_limit_for_the_hub_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert hub_patience._limit_s() == hub_patience.PATIENCE_S
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 90)
    assert hub_patience._limit_s() == 90


def test_a_redirect_loop_of_the_hub(server: Server, caches: Path) -> None:
    server.behaviour.location = "/me/small/resolve/main/model.safetensors"
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint("me/small")


def test_the_clients_own_messages_stay_off_the_terminal(
    run_process: RunProcess, server: Server, tmp_path: Path, repository: dict[str, bytes]
) -> None:
    """It continues a download that breaks off, and logs that at a level that is on by default."""
    server.add_repository("me/small", **repository)
    server.behaviour.cut, server.behaviour.cuts = len(repository["model__safetensors"]) - 1000, 1
    done = run_process(
        *("features", "-m", "me/small", "-q"),
        HF_ENDPOINT=server.url,
        HF_HOME=str(tmp_path / "hf"),
        TORCH_HOME=str(tmp_path / "torch"),
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert len(server.gets("model.safetensors")) == 2


# Several at once --------------------------------------------------------------------------------


def test_threads_share_one_download(server: Server, caches: Path, pth: bytes) -> None:
    server.files["/a.pth"] = pth
    server.behaviour.pause_s = 0.2
    url = f"{server.url}/a.pth"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load.read_checkpoint(url).num_classes, range(8)))
    assert found == [10] * 8 and len(server.gets()) == 1
    assert leftovers(caches) == []


def test_threads_replace_a_damaged_file_once(server: Server, caches: Path, pth: bytes) -> None:
    server.files["/a.pth"] = pth
    url = f"{server.url}/a.pth"
    download.from_url(url).weights.write_bytes(SIGN_IN)
    server.behaviour.pause_s = 0.2
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load.read_checkpoint(url).num_classes, range(8)))
    assert found == [10] * 8 and len(server.gets()) == 2


READ = """
import sys
from hiera_core.weights import load
for name in sys.argv[1:]:
    checkpoint = load.read_checkpoint(name)
    print(float(sum(t.double().sum() for t in checkpoint.state.values())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_eight_processes_share_the_caches(
    server: Server, tmp_path: Path, pth: bytes, repository: dict[str, bytes], damaged: bool
) -> None:
    """All of them get the right weights, also if the caches hold damaged files at first."""
    server.files["/a.pth"] = pth
    server.add_repository("me/small", **repository)
    server.behaviour.pause_s = 0.5
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", READ, f"{server.url}/a.pth", "me/small"]

    def run(_: int) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = run(0)
    if damaged:
        (link,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
        (cached,) = (tmp_path / "torch").rglob("*.pth")
        for path in (link.resolve(), cached):
            path.write_bytes(path.read_bytes()[:-500])
    else:
        shutil.rmtree(tmp_path / "hf")
        shutil.rmtree(tmp_path / "torch")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [expected] * 8
    assert leftovers(tmp_path) == []


# The campaign -----------------------------------------------------------------------------------

CUTS = [percent / 100 for percent in range(0, 100, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("ranges", ["honour", "ignore", "unconditional", "shifted"])
@pytest.mark.parametrize("etag", ["sha256", "path", "W/x", None])
@pytest.mark.parametrize("changes", [False, True])
def test_cuts_at_every_twentieth(
    server: Server, caches: Path, pth: bytes, changes: bool, etag: str, ranges: str, length: bool
) -> None:
    """A download that is cut, continued, and perhaps changed meanwhile, is right or refused."""
    url, second = f"{server.url}/a.pth", other(pth)
    for cut in CUTS:
        server.files["/a.pth"] = pth
        server.behaviour = Behaviour(etag=etag, cut=int(cut * len(pth)), length=length)
        with pytest.raises(HubError):
            load.read_checkpoint(url)
        server.files["/a.pth"] = expected = second if changes else pth
        server.behaviour = Behaviour(etag=etag, ranges=ranges, length=length)
        try:
            load.read_checkpoint(url)
        except HubError:  # spliced by a server that lies, found by a checksum; the next try is new
            assert changes and etag == "path"
            load.read_checkpoint(url)
        (path,) = caches.rglob("a.pth")
        assert path.read_bytes() == expected, cut
        assert leftovers(caches) == []
        path.unlink()
        download_record.record_path(path).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("etag", ["sha256", "path"])
def test_the_hub_cuts_at_every_twentieth(
    server: Server,
    caches: Path,
    repository: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    etag: str,
) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    server.add_repository("me/small", **repository)
    for cut in CUTS:
        size = len(repository["model__safetensors"])
        server.behaviour = Behaviour(etag=etag, cut=int(cut * size))
        with contextlib.suppress(HubError):  # the client continues by itself, if anything arrives
            load.read_checkpoint("me/small")
        server.behaviour = Behaviour(etag=etag)
        assert load.read_checkpoint("me/small").num_classes == 10
        (link,) = caches.rglob("snapshots/*/model.safetensors")
        assert link.read_bytes() == repository["model__safetensors"], cut
        assert leftovers(caches) == []
        shutil.rmtree(caches / "hf")


@pytest.mark.slow
def test_damage_at_every_twentieth_of_a_cached_file(
    server: Server, caches: Path, pth: bytes, repository: dict[str, bytes]
) -> None:
    """One byte is changed, or the file is cut there. It is fetched again, once."""
    server.files["/a.pth"] = pth
    server.add_repository("me/small", **repository)
    for name, pattern in ((f"{server.url}/a.pth", "a.pth"), ("me/small", "model.safetensors")):
        load.read_checkpoint(name)
        for cut in CUTS:
            (path,) = caches.rglob(pattern)
            whole = path.read_bytes()
            place = int(cut * len(whole))
            for bad in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
                if pattern.endswith("safetensors") and len(bad) == len(whole) and place:
                    continue  # safetensors has no checksum of its values
                path.resolve().write_bytes(bad)
                assert load.read_checkpoint(name).num_classes == 10
                (path,) = caches.rglob(pattern)
                assert path.read_bytes() == whole, (name, cut)


@pytest.mark.slow
def test_a_killed_download_continues(server: Server, tmp_path: Path, pth: bytes) -> None:
    """A process is killed at ten moments of a download; the file is right in the end."""
    server.files["/a.pth"] = pth
    server.behaviour.drip, server.behaviour.drip_s = 20_000, 0.05
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "TORCH_HOME": str(tmp_path / "torch"),
    }
    command = [sys.executable, "-c", READ, f"{server.url}/a.pth"]
    for attempt in range(10):
        before = len(server.log)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while len(server.log) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.05 * attempt)
            process.kill()
    server.behaviour.drip = None
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    (path,) = (tmp_path / "torch").rglob("*-a.pth")
    assert path.read_bytes() == pth and leftovers(tmp_path) == []
    assert any(byte_range is not None for byte_range in server.gets()), "none was continued"
