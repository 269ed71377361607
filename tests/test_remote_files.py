"""Tests of remote inputs and outputs: in memory, and at a server of S3 that fails now and then."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core.data import sources, url_content
from hiera_core.data.division.manifest import Manifest
from hiera_core.data.remote import remote_files
from hiera_core.data.sources import Source
from hiera_core.errors import InputError, UsageError
from hiera_core.places import remote_requests
from hiera_core.scale.input_table import ManifestInputs

from .conftest import Faulty

fsspec = pytest.importorskip("fsspec")
SAMPLES = Path(hiera_core.__file__).parent / "zoo/assets/samples"
EIGHT, THREE = ((SAMPLES / name).read_bytes() for name in ("eight.png", "three.png"))
Command = Callable[..., tuple[int, str, str]]
MODEL = ("-m", "hiera_nano_32", "--dtype", "fp32")


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A file system in memory, with a few files."""
    system = fsspec.filesystem("memory")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in (("a.png", EIGHT), ("b.txt", b"text"), ("c.png", THREE)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    files = {"a.png": EIGHT, "b.png": THREE, "note.txt": b"text", "deep/c.png": EIGHT}
    for name, content in {**files, "x.tar": tar.getvalue(), "bad.png": b"damaged"}.items():
        system.pipe_file(f"/bucket/{name}", content)
    yield system
    system.rm("/bucket", recursive=True)


def names(text: str, **options: Any) -> list[str]:
    return [source.name for source in sources.expand([text], **options)]


def test_files_folders_patterns_and_tars_are_inputs(bucket: Any) -> None:
    assert names("memory://bucket/a.png") == ["memory://bucket/a.png"]
    passed_over = Counter[str]()
    here = [f"memory:///bucket/{name}.png" for name in ("a", "b", "bad")]
    assert names("memory://bucket/", passed_over=passed_over) == here
    assert passed_over == {".txt": 1, ".tar": 1}
    assert len(names("memory://bucket/", recursive=True)) == 4
    assert names("memory://bucket/?.png") == here[:2]
    members = list(sources.expand(["memory://bucket/x.tar"]))
    assert [m.name.rpartition("/")[2] for m in members] == ["a.png", "c.png"]
    assert [m.content() for m in members] == [EIGHT, THREE]
    assert sources.from_name("memory://bucket/b.png").content() == THREE


@pytest.mark.parametrize(
    "text, message",
    [
        ("memory://bucket/missing.png", "no such file"),
        ("memory://bucket/missing.tar", "no such file"),
        ("memory://bucket/none*.png", "holds no pictures"),
        ("memory://missing/", "holds no pictures"),
        ("memory://bucket/bad.tar", "no such file"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_its_own(bucket: Any, text: str, message: str) -> None:
    (source,) = sources.expand([text])
    with pytest.raises(InputError, match=message):
        source.content()


def test_large_files_are_read_in_ranges(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 100)
    content = bytes(range(256)) * 4
    bucket.pipe_file("/bucket/large.png", content)
    assert Source("x", url="memory://bucket/large.png").content() == content
    part = Source("x", url="memory://bucket/large.png", span=(10, 300)).content()
    assert part == content[10:310]
    with pytest.raises(InputError, match="ends within this file"):
        Source("x", url="memory://bucket/large.png", span=(1000, 100)).content()
    monkeypatch.setattr(remote_files, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="larger than"):
        Source("x", url="memory://bucket/large.png").content()


def test_a_request_that_fails_or_hangs_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_requests, "REQUEST_S", 0.05)
    release = threading.Event()
    calls: list[int] = []

    def sometimes() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("reset by peer")
        if len(calls) == 2:
            release.wait(5)
        return "content"

    assert remote_requests.with_retries(sometimes, "x") == "content" and len(calls) == 3
    release.set()

    def never() -> str:
        calls.append(1)
        raise ConnectionError("refused")

    calls.clear()
    with pytest.raises(ConnectionError):
        remote_requests.with_retries(never, "x")
    assert len(calls) == remote_requests.ATTEMPTS

    def missing() -> str:
        calls.append(1)
        raise FileNotFoundError

    calls.clear()
    with pytest.raises(FileNotFoundError):
        remote_requests.with_retries(missing, "x")
    assert len(calls) == 1


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        remote_requests.open_place("nosuch://bucket/a.png")
    assert remote_requests.is_remote("s3://b/a.png") and remote_requests.is_remote(
        "HF://datasets/x/y"
    )
    for text in ("http://h/a", "https://h/a", "a.png", "C:\\a", "file:///a", "//host/a", "a://b"):
        assert not remote_requests.is_remote(text), text


def test_rows_go_to_a_remote_folder(hiera: Command, bucket: Any, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    given = ("features", "memory://bucket/", *MODEL, "--rows", "memory://bucket/rows")
    code, _, err = hiera(*given)
    assert code == 1 and "2 ok, 1 failed" in err
    (name,) = bucket.ls("/bucket/rows", detail=False)
    rows = pq.read_table(io.BytesIO(bucket.cat_file(name))).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "error"]
    code, _, err = hiera(*given)
    assert code == 2 and "holds rows already" in err
    bucket.pipe_file("/bucket/aa.png", THREE)
    assert hiera(*given, "--resume")[0] == 2  # the inputs have changed
    assert hiera(*given, "--overwrite")[0] == 1
    (name,) = bucket.ls("/bucket/rows", detail=False)
    assert pq.read_table(io.BytesIO(bucket.cat_file(name))).num_rows == 4


def test_private_networks_are_refused_for_manifests(
    hiera: Command, hub: Any, tmp_path: Path
) -> None:
    hub.plain["/eight.png"] = EIGHT
    manifest = tmp_path / "m.txt"
    manifest.write_text(f"{hub.url}/eight.png\n")
    code, _, err = hiera("predict", "--manifest", manifest, *MODEL, "-f", "jsonl")
    assert code == 1 and "127.0.0.1 is in a private network" in err and not hub.log
    assert "--private-urls allows it" in err
    given = ("predict", "--manifest", manifest, *MODEL, "-f", "jsonl", "--private-urls")
    assert hiera(*given)[0] == 0
    assert hiera("predict", f"{hub.url}/eight.png", *MODEL, "-f", "jsonl")[0] == 0


def test_other_places_lead_into_private_networks_too(tmp_path: Path) -> None:
    urls = ["zip://a.png::http://127.0.0.1:1/x.zip", "webhdfs://127.0.0.1:1/a.png", "nosuch://b/a"]
    manifest = tmp_path / "m.txt"
    manifest.write_text("".join(f"{url}\n" for url in [*urls, "memory://bucket/missing.png"]))
    *private, public = Manifest(manifest).read(range(4))
    for source in private:
        with pytest.raises(InputError, match="may lead into a private network"):
            source.content()
    with pytest.raises(InputError, match="no such file"):
        public.content()
    *_, unknown, _ = Manifest(manifest, private_urls=True).read(range(4))
    with pytest.raises(InputError, match="nosuch"):  # and not an error that would end the run
        unknown.content()


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "parquet"])
@pytest.mark.parametrize("is_remote", [True, False])
def test_a_manifest_may_be_at_a_url(
    hiera: Command, hub: Any, bucket: Any, tmp_path: Path, ending: str, is_remote: bool
) -> None:
    paths = [f"{SAMPLES}/{name}.png" for name in ("eight", "three")]
    mark = "\t" if ending == "tsv" else ","
    rows = [f"key{mark}path", *(f"{7 + n}{mark}{path}" for n, path in enumerate(paths))]
    content = "\n".join(paths if ending == "txt" else rows).encode()
    if ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"key": [7, 8], "path": paths}), tmp_path / "m.parquet")
        content = (tmp_path / "m.parquet").read_bytes()
    bucket.pipe_file(f"/bucket/m.{ending}", content)
    hub.plain[f"/m.{ending}?version=3"] = content
    url = f"memory://bucket/m.{ending}" if is_remote else f"{hub.url}/m.{ending}?version=3"
    ids = () if ending == "txt" else ("--id-column", "key")
    code, out, err = hiera("predict", "--manifest", url, *ids, *MODEL, "-f", "jsonl", "-k", 1)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["input"] for record in records] == paths, err
    assert [record["topk"][0]["label"] for record in records] == ["eight", "three"]
    if ids:
        assert [int(record["id"]) for record in records] == [7, 8]


def test_a_manifest_that_cannot_be_fetched_ends_the_run(
    hiera: Command, hub: Any, bucket: Any
) -> None:
    bucket.pipe_file("/bucket/m.csv", b'path,n\nb.png,"1\nc.png,2\n')
    bucket.pipe_file("/bucket/m.parquet", b"no parquet")
    hub.plain["/bad.csv"] = b""
    for text, code, message in (
        ("memory://bucket/none.csv", 4, "manifest memory://bucket/none.csv: no such file"),
        ("memory://bucket/deep/.csv", 2, "manifest '.csv' is of no known format"),
        ("memory://bucket/", 2, "manifest 'bucket' is of no known format"),
        ("memory://bucket/m.csv", 2, "manifest memory://bucket/m.csv has a quote that is not"),
        ("memory://bucket/m.parquet", 2, "memory://bucket/m.parquet is no Parquet file"),
        ("nosuch://bucket/m.csv", 2, "nosuch"),
        (f"{hub.url}/none.csv", 4, f"manifest {hub.url}/none.csv: cannot be fetched ("),
        (hub.url.upper() + "/none.csv", 4, "/none.csv: cannot be fetched ("),
        (f"{hub.url}/bad.csv", 2, f"manifest {hub.url}/bad.csv has no header"),
        ("file:///m.csv", 2, "is a URL"),
    ):
        found, out, err = hiera("predict", "--manifest", text, *MODEL)
        assert (found, out) == (code, "") and message in err, err


def test_a_manifest_that_changes_meanwhile_is_refused(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 100)
    bucket.pipe_file("/bucket/m.txt", b"a.png\n" * 100)
    assert url_content.fetch_file("memory://bucket/m.txt").read_bytes() == b"a.png\n" * 100
    parts = remote_files.fetch_whole("memory://bucket/m.txt")
    assert len(next(parts)) == 100
    bucket.pipe_file("/bucket/m.txt", b"a.png\n" * 99)
    with pytest.raises(InputError, match="has changed while it was fetched"):
        list(parts)


@pytest.mark.parametrize("is_remote", [True, False])
def test_workers_read_the_manifest_that_the_driver_has_read(
    hub: Any, bucket: Any, is_remote: bool
) -> None:
    def serve(content: bytes) -> None:
        bucket.pipe_file("/bucket/m.txt", content)
        hub.plain["/m.txt"] = content

    serve(b"a.png\nb.png\n")
    inputs = ManifestInputs.of(
        Manifest("memory://bucket/m.txt" if is_remote else f"{hub.url}/m.txt")
    )
    assert [source.name for source in inputs.open().read(range(2))] == ["a.png", "b.png"]
    serve(b"b.png\na.png\n")
    with pytest.raises(UsageError, match="has changed since the run began"):
        inputs.open()


def test_a_busy_server_is_asked_again(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_content, "FIRST_WAIT_S", 0.001)
    answers = iter([503, 500])
    original = hub.RequestHandlerClass._answer

    def busy(self: Any, with_body: bool) -> None:
        code = next(answers, None)
        if code is None:
            original(self, with_body)
        else:
            self._refuse(code, "busy")

    monkeypatch.setattr(hub.RequestHandlerClass, "_answer", busy)
    hub.plain["/eight.png"] = EIGHT
    assert url_content.fetch_content(f"{hub.url}/eight.png") == EIGHT
    answers = iter([503, 500])
    assert url_content.fetch_file(f"{hub.url}/eight.png").read_bytes() == EIGHT


# S3 -----------------------------------------------------------------------------------------------


def fill(count: int) -> tuple[Any, list[str]]:
    """Write pictures to a bucket, each twentieth of them damaged, and return their URLs."""
    system, _ = remote_requests.open_place("s3://pictures")
    system.mkdir("pictures")
    for number in range(count):
        content = b"damaged" if number % 20 == 7 else (EIGHT, THREE)[number % 2]
        system.pipe_file(f"pictures/in/{number:05}.png", content)
    return system, [f"s3://pictures/in/{number:05}.png" for number in range(count)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "count", [12, pytest.param(400, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_faults_of_a_server_lose_nothing(hiera: Command, s3: Faulty, count: int) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    system, urls = fill(count)
    s3.is_faulty = True
    given = ("predict", "s3://pictures/in/", *MODEL, "-q", "-j", 2)
    code, out, _ = hiera(*given, "-f", "jsonl")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [record["input"] for record in records] == urls
    for number, record in enumerate(records):
        if number % 20 == 7:
            assert "not a picture" in record["error"]["message"]
        else:
            assert record["topk"][0]["label"] == ("eight", "three")[number % 2], record
    system.pipe_file("pictures/m.txt", "\n".join(urls).encode())
    manifest = ("--manifest", "s3://pictures/m.txt", *MODEL, "-q", "-j", 2)
    assert hiera("predict", *manifest, "--rows", "s3://pictures/rows")[0] == 1
    assert s3.faults["500"] and s3.faults["cut"], s3.faults
    s3.is_faulty = False
    system.invalidate_cache()
    found = [
        row
        for name in system.ls("pictures/rows", detail=False)
        for row in pq.read_table(io.BytesIO(system.cat_file(name))).to_pylist()
    ]
    assert sorted(row["index"] for row in found) == list(range(count))
    assert sum(row["status"] == "error" for row in found) == sum(n % 20 == 7 for n in range(count))
