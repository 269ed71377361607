"""Tests of training data in tar files at S3, at a web server, and in memory."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import pickle
import shlex
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import datasets
from hiera_core.data.indexed import remote_shards
from hiera_core.data.indexed.sample_index import SampleIndex
from hiera_core.errors import InputError, UsageError
from hiera_core.places import remote_requests
from hiera_core.training import recipe_reader
from hiera_core.training.checkpoints import run_recipe

from .conftest import POLL_S, Faulty, RunProcess

fsspec = pytest.importorskip("fsspec")
Command = Callable[..., tuple[int, str, str]]
SHARDS, EACH = 3, 4
SETTINGS = ("batch_size=4", "schedule.epochs=1", "schedule.warmup_epochs=0", "log_every=1")
NARROW = 'model.config={"embed_dim": 8, "stages": [1, 1, 1]}'


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIERA_INDEX_FOLDER", str(tmp_path / "indices"))
    return tmp_path / "indices"


def digit_shard(number: int) -> bytes:
    """Return a tar file of digits with labels, in webdataset's form."""
    digits = datasets.open_dataset("digits")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in range(number * EACH, (number + 1) * EACH):
            assert digits.labels is not None
            content = digits.sources[row].content()
            assert isinstance(content, bytes)
            for ending, data in (("png", content), ("cls", str(digits.labels[row]).encode())):
                entry = tarfile.TarInfo(f"{row:04}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


class Web(http.server.ThreadingHTTPServer):
    """A web server that sends parts of files, and counts its answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.sends_parts, self.failures = True, 0


class WebHandler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        web = self.server
        web.log.append(f"{self.path} {self.headers.get('Range')}")
        content = web.files.get(self.path)
        if web.failures:
            web.failures -= 1
            self._answer(503, b"")
        elif content is None:
            self._answer(404, b"")
        elif not web.sends_parts:
            self._answer(200, content)
        else:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            total = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._answer(206 if part else 416, part, {"Content-Range": total, "ETag": '"1"'})

    def _answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.01)
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=[POLL_S], daemon=True).start()
        server.files = {f"/s-{n:02}.tar": digit_shard(n) for n in range(SHARDS)}
        yield server
        server.shutdown()


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for number in range(SHARDS):
        system.pipe_file(f"/shards/s-{number:02}.tar", digit_shard(number))
    yield system
    system.rm("/shards", recursive=True)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in lines if event["event"] == "step"]


def check_samples(samples: datasets.MediaDataset) -> None:
    digits = datasets.open_dataset("digits")
    assert samples.labels is not None and digits.labels is not None
    assert samples.labels.tolist() == digits.labels[: SHARDS * EACH].tolist()
    for number in (0, EACH, SHARDS * EACH - 1):
        assert samples.sources[number].content() == digits.sources[number].content()


@pytest.mark.parametrize(
    "pattern", ["s-{00..02}.tar", "s-*.tar", "s-0?.tar", ""], ids=["braces", "star", "one", "all"]
)
def test_shards_are_named_by_patterns_and_folders(memory: Any, pattern: str) -> None:
    samples = datasets.open_dataset(f"memory://shards/{pattern}")
    check_samples(samples)
    assert len(samples) == SHARDS * EACH


def test_an_index_is_kept_until_a_shard_changes(memory: Any) -> None:
    def build() -> str:
        sources = datasets.open_dataset("memory://shards/s-{00..02}.tar").sources
        assert isinstance(sources, SampleIndex)
        name: str = sources._sections.facts["build"]
        return name

    first = build()
    assert build() == first
    memory.pipe_file("/shards/s-01.tar", digit_shard(5))
    assert build() != first


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("memory://shards/none-*.tar", "nothing matches"),
        ("memory://shards/s-{03..04}.tar", "s-03.tar: no such file"),
        ("memory://shards/bad.tar", "the tar file is damaged or compressed"),
        ("memory://shards/cut.tar", "unexpected end of data"),
        ("memory://shards/unlabelled.tar", "a.jpg has no label"),
        ("memory://shards/a.jpg", "names no tar or Parquet files"),
        ("memory://nowhere/", "names no tar or Parquet files"),
        ("nosuch://bucket/s.tar", "nosuch"),
        ("http://127.0.0.1:9/s-*.tar", "cannot be listed"),
        ("http://127.0.0.1:9/photos/", "names no tar or Parquet files"),
    ],
)
def test_what_cannot_be_read_is_one_line(memory: Any, data: str, message: str) -> None:
    memory.pipe_file("/shards/bad.tar", b"no tar" * 200)
    memory.pipe_file("/shards/cut.tar", digit_shard(0)[:900])
    memory.pipe_file("/shards/unlabelled.tar", _tar_of("a.jpg", b"x"))
    with pytest.raises(UsageError, match=message) as error:
        datasets.open_dataset(data)
    assert "\n" not in str(error.value)


def _tar_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def test_a_web_server_sends_headers_once_and_then_samples(web: Web) -> None:
    data = f"{web.url}/s-{{00..02}}.tar"
    web.failures = 2
    samples = datasets.open_dataset(data)
    check_samples(samples)
    web.log.clear()
    again = datasets.open_dataset(data)
    assert len(web.log) == SHARDS, "one request each, which asks for the version"
    assert again.sources[3].content() == samples.sources[3].content()
    span = samples.sources[3].span
    assert span is not None
    assert web.log[-1].endswith(f"bytes={span[0]}-{sum(span) - 1}")


def test_a_web_server_that_sends_only_whole_files_is_refused(web: Web) -> None:
    web.sends_parts = False
    with pytest.raises(UsageError, match=r"sends no parts of files.*download it yourself"):
        datasets.open_dataset(f"{web.url}/s-00.tar")
    with pytest.raises(UsageError, match="no such file"):
        datasets.open_dataset(f"{web.url}/none.tar")


def test_parquet_files_of_a_web_server(web: Web) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pa.table({"image": [b"one", b"two"], "label": [0, 1]}), file)
    web.files["/a.parquet"] = file.getvalue()
    for found in (datasets.open_dataset, datasets.open_eval_data):
        assert found(f"{web.url}/a.parquet").sources[1].content() == b"two"
    with pytest.raises(UsageError, match="files of a web server cannot be listed"):
        datasets.open_dataset(f"{web.url}/*.parquet")


def test_a_web_server_that_sends_another_part_is_refused(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = WebHandler._answer

    def from_the_beginning(
        self: Any, code: int, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        if headers:
            start = web.files[self.path][: len(content)]
            content, headers = start, {**headers, "Content-Range": f"bytes 0-{len(start) - 1}/*"}
        answer(self, code, content, headers)

    samples = datasets.open_dataset(f"{web.url}/s-00.tar")
    monkeypatch.setattr(WebHandler, "_answer", from_the_beginning)
    with pytest.raises(InputError, match="the server sends no parts"):
        samples.sources[1].content()


def test_large_members_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their content is not read to find the next header."""
    monkeypatch.setattr(remote_shards, "BLOCK", 4096)
    monkeypatch.setattr(remote_shards, "SHORT_BLOCK", 512)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(4):
            entry = tarfile.TarInfo(f"{number}.mp4")
            entry.size = 100_000
            archive.addfile(entry, io.BytesIO(bytes(100_000)))
    system = fsspec.filesystem("memory")
    system.pipe_file("/large.tar", file.getvalue())
    read: list[int] = []
    original = remote_requests.read_range

    def counting(system: Any, path: str, start: int, length: int) -> bytes:
        read.append(length)
        return original(system, path, start, length)

    monkeypatch.setattr(remote_requests, "read_range", counting)
    assert len(datasets.open_dataset("memory://large.tar", labelled=False)) == 4
    assert sum(read) < 40_000
    system.rm("/large.tar")


def fill_bucket() -> str:
    """Write the shards to a bucket, and return the pattern that names them."""
    system, _ = remote_requests.open_place("s3://shards")
    system.mkdir("shards")
    for number in range(SHARDS):
        system.pipe_file(f"shards/s-{number:02}.tar", digit_shard(number))
    return "s3://shards/s-{00..02}.tar"


def run_arguments(data: object, folder: Path, workers: int = 0) -> list[object]:
    sets = [word for value in (*SETTINGS, NARROW, "data.val=0.25") for word in ("--set", value)]
    return ["train", "hiera_nano_32", data, *sets, "-q", "-j", workers, "-o", folder]


@pytest.fixture
def local_losses(hiera: Command, tmp_path: Path) -> list[float]:
    """Return the losses of a run on local files."""
    (tmp_path / "local").mkdir()
    for number in range(SHARDS):
        (tmp_path / "local" / f"s-{number:02}.tar").write_bytes(digit_shard(number))
    assert hiera(*run_arguments(tmp_path / "local", tmp_path / "expected"))[0] == 0
    found = losses(tmp_path / "expected")
    assert len(found) == 2
    return found


@pytest.mark.filterwarnings("ignore")
def test_shards_at_s3_are_read_in_spite_of_faults(s3: Faulty) -> None:
    data = fill_bucket()
    s3.is_faulty = True
    check_samples(datasets.open_dataset(data))
    assert s3.faults["500"] or s3.faults["cut"]


def test_a_run_on_remote_shards_equals_one_on_files(
    hiera: Command, web: Web, tmp_path: Path, local_losses: list[float]
) -> None:
    url, run = f"{web.url}/s-{{00..02}}.tar", tmp_path / "remote"
    code, _, err = hiera(*run_arguments(url, run))
    assert code == 0, err
    assert losses(run) == local_losses
    assert url in (run / "recipe.yaml").read_text()  # so that it can be continued, and repeated
    code, out, err = hiera("eval", url, "--checkpoint", run, "-f", "json")
    assert code == 0 and json.loads(out)["samples"] == SHARDS * EACH, err


PRIVATE = r"127.0.0.1 is in a private network; --private-urls allows it"


@pytest.mark.parametrize(
    "values",
    [
        "data: {{path: '{url}', val: 0.25}}",
        "data: {{path: shapes, val: '{url}'}}",
        "data: {{path: shapes}}\nprobe: {{every: 1, data: '{url}', val: 0.25}}",
        "data: {{path: shapes}}\ninit_from: '{url}'",
    ],
    ids=["path", "val", "probe", "init_from"],
)
def test_urls_of_a_recipe_do_not_lead_into_private_networks(
    hiera: Command, web: Web, tmp_path: Path, values: str
) -> None:
    """A recipe from somebody else would otherwise ask servers that only this machine can reach."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: hiera_nano_32\n" + values.format(url=f"{web.url}/s-00.tar"))
    code, _, err = hiera("train", recipe, "-q", "-j", "0", "-o", tmp_path / "run")
    assert code == 2 and PRIVATE in err and err.count("\n") == 1
    assert not web.log and not (tmp_path / "run").exists()


def test_private_networks_are_allowed_where_they_are_asked_for(
    hiera: Command, web: Web, tmp_path: Path
) -> None:
    recipe, run, url = tmp_path / "recipe.yaml", tmp_path / "run", f"{web.url}/s-{{00..02}}.tar"
    sets = [word for value in (*SETTINGS, NARROW) for word in ("--set", value)]
    recipe.write_text(f"extends: hiera_nano_32\ndata: {{path: '{url}'}}\n")
    # What the command names is asked for. The recipe of the run then names it, for whoever resumes.
    given = ("train", recipe, url, *sets, "-q", "-j", "0", "-o", run)
    assert hiera(*given)[0] == 0
    (run / "model.safetensors").unlink()
    assert hiera(*given, "--resume", "auto")[0] == 0
    (run / "model.safetensors").unlink()
    code, _, err = hiera("train", "--resume", run, "-q", "-j", "0")
    assert code == 2 and PRIVATE in err
    assert hiera("train", "--resume", run, "-q", "-j", "0", "--private-urls")[0] == 0


def test_the_command_to_resume_names_the_urls_that_were_named(
    hiera: Command, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not allow the other private URLs of the recipe."""
    run, url, other = tmp_path / "run", f"{web.url}/s-{{00..02}}.tar", f"{web.url}/s-00.tar"
    sets = [word for value in (*SETTINGS, NARROW) for word in ("--set", value)]
    given = ("train", "hiera_nano_32", url, *sets, "-q", "-j", "0", "-o", run)
    assert hiera(*given)[0] == 0
    (run / "model.safetensors").unlink()
    recipe = recipe_reader.read_recipe(run / "recipe.yaml")
    options = hiera_core.RunOptions(workers=0, named_urls=frozenset({url}))
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a look-up for a hint"))
        command = run_recipe.resume_command(run, options, None, recipe)
        private = hiera_core.RunOptions(private_urls=True, named_urls=frozenset({url}))
        assert run_recipe.resume_command(run, private, None, recipe).endswith("--private-urls")
        data = dataclasses.replace(recipe.data, path="s3://bucket/s.tar", val=other)
        mixed = dataclasses.replace(recipe, data=data, init_from=other)
        shared = hiera_core.RunOptions(named_urls=frozenset({"s3://bucket/s.tar"}))
        words = shlex.split(run_recipe.resume_command(run, shared, None, mixed))
    assert words == ["hiera", "train", "--resume", str(run)]  # the server of S3 is a setting
    assert "--private-urls" not in command and url in command
    code, _, err = hiera(*shlex.split(command)[1:], "-q")
    assert code == 0, err
    allowed = options.public_urls
    assert other in allowed and url not in allowed


def test_a_url_that_is_written_in_another_way_is_not_the_one_that_was_named() -> None:
    public = hiera_core.RunOptions(named_urls=frozenset({"http://10.0.0.1/a.tar"})).public_urls
    assert "http://10.0.0.1/a.tar" not in public
    for other in ("http://10.0.0.1/a.tar ", "HTTP://10.0.0.1/a.tar", "http://10.0.0.1:80/a.tar"):
        assert other in public
    assert "shapes" not in public and "/data/a.tar" not in public
    named = hiera_core.RunOptions(init_from="http://10.0.0.1/a.pth").public_urls
    assert "http://10.0.0.1/a.pth" not in named and "http://10.0.0.1/b.pth" in named
    assert "http://10.0.0.1/b.pth" not in hiera_core.RunOptions(private_urls=True).public_urls


@pytest.mark.parametrize("first", ["8.8.8.8", None])
def test_names_of_weights_that_change_their_address_are_refused(
    hiera: Command,
    web: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str | None,
) -> None:
    """When the name is looked up for the check, it is public or unknown; afterwards, private."""
    look_up, looked_up = socket.getaddrinfo, list[str]()

    def change(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        looked_up.append(host)
        if port is None and first is None:
            raise socket.gaierror("unknown")
        return look_up(str(first) if port is None else "127.0.0.1", port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", change)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    recipe, url = tmp_path / "recipe.yaml", f"http://weights.example:{web.server_address[1]}/a.pth"
    text = "extends: hiera_nano_32\ndata: {path: shapes}\n"
    recipe.write_text(f"{text}init_from: '{url}'")
    code, _, err = hiera("train", recipe, "-q", "-j", "0", "-o", tmp_path / "run")
    assert code != 0 and "private address 127.0.0.1" in err, err
    assert looked_up and not web.log


def test_samples_stay_public_in_workers_and_when_the_index_was_kept(web: Web) -> None:
    url = f"{web.url}/s-00.tar"
    index = datasets.open_dataset(url).sources
    assert isinstance(index, SampleIndex) and not index[0].public_only
    index.public_only = True
    web.log.clear()
    with pytest.raises(InputError, match=PRIVATE):
        pickle.loads(pickle.dumps(index))[0].content()
    for data in (url, f"{web.url}/a.parquet"):
        with pytest.raises(UsageError, match=PRIVATE):
            datasets.open_splits(data, public_urls=[data])
        with pytest.raises(UsageError, match=PRIVATE):
            datasets.open_splits("shapes", data, public_urls=[data])
    with pytest.raises(UsageError, match="webhdfs:// may lead into a private network"):
        datasets.open_dataset("webhdfs://127.0.0.1:1/s/", public_only=True)
    assert not web.log


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_read_shards_at_s3_in_spite_of_faults(
    run_process: RunProcess, s3: Faulty, tmp_path: Path, local_losses: list[float]
) -> None:
    data = fill_bucket()
    s3.is_faulty = True
    found = run_process(*run_arguments(data, tmp_path / "remote", workers=2))
    assert found.returncode == 0, found.stderr
    assert losses(tmp_path / "remote") == local_losses


def test_an_index_is_for_all_processes(memory: Any) -> None:
    """Rank and number of processes are no part of it, so the order of a run does not change."""
    samples = datasets.open_dataset("memory://shards/s-{00..02}.tar")
    splits = datasets.open_splits("memory://shards/s-{00..02}.tar", 0.25)
    assert splits.val is not None and len(splits.val) == len(samples) // 4
    assert samples.fingerprint == datasets.open_dataset("memory://shards/").fingerprint
