"""Tests of the engine on Ray: its rows are those of the local engine, and a run goes on."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hiera_core
from hiera_core.data import sources
from hiera_core.data.division.manifest import Manifest
from hiera_core.data.sources import Source
from hiera_core.errors import CheckpointError, HieraError, InputError, OutputError
from hiera_core.inference import Classifier, Decoder, Embedder
from hiera_core.places.places import place_of
from hiera_core.scale import ray_cluster, ray_engine
from hiera_core.scale.done_rows import DoneRows
from hiera_core.scale.input_table import (
    ListedInputs,
    ManifestInputs,
    list_failed_again,
    write_listing,
)
from hiera_core.scale.run_summary import RunSummary

from .test_row_folder import forged
from .test_row_runs import MODEL, SAMPLES, folder, read_rows, same

__all__ = ["folder"]  # a fixture
ray = pytest.importorskip("ray")
Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in this process, with two CPUs."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow  # Ray may need a minute to begin on a busy machine
def test_rows_of_ray_are_those_of_the_local_engine(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    given = ("features", folder, *MODEL, "--rows")
    assert hiera(*given, tmp_path / "local", "-q")[0] == 1
    code, out, err = hiera(*given, tmp_path / "ray", "--engine", "ray")
    assert code == 1 and out == "", err
    assert "4.png: not a picture" in err and "hiera: 6 ok, 1 failed" in err
    assert "hiera: 7 inputs in " in err and "the model waited" in err and "kB written" in err
    assert same(read_rows(tmp_path / "ray"), read_rows(tmp_path / "local"))
    code, _, err = hiera(*given, tmp_path / "ray", "--engine", "ray", "--resume", "--clips", 2)
    assert code == 2 and "was made with views" in err


@pytest.mark.slow
def test_a_run_on_ray_goes_on(hiera: Command, cluster: None, folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    given = ("features", folder, *MODEL, "--rows")
    assert hiera(*given, tmp_path / "local", "-q")[0] == 1
    assert hiera(*given, tmp_path / "ray", "--engine", "ray")[0] == 1
    # Some rows are missing, as after a crash; other files lie in the folder of inputs by now.
    (part,) = (tmp_path / "ray").glob("part-*")
    pq.write_table(pq.read_table(part).slice(0, 5), part)
    (folder / "00.png").write_bytes(b"new")
    code, _, err = hiera(*given, tmp_path / "ray", "--engine", "ray", "--resume")
    assert code == 1 and "hiera: 2 inputs in " in err, err
    assert same(read_rows(tmp_path / "ray"), read_rows(tmp_path / "local"))
    table = forged([10**7]).replace_schema_metadata({"hiera": "{}"})
    pq.write_table(table, tmp_path / "ray/part-000010000000-0badcafe.parquet")
    code, _, err = hiera(*given, tmp_path / "ray", "--engine", "ray", "--resume")
    assert code == 2 and "holds row 10000000, and there are 7 inputs" in err, err


@pytest.mark.slow
def test_failed_inputs_are_tried_again_on_ray(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    given = ("features", folder, *MODEL, "--engine", "ray", "--rows", tmp_path / "ray")
    assert hiera(*given, "--shard-size", 3)[0] == 1
    before = read_rows(tmp_path / "ray")
    code, _, err = hiera(*given, "--resume", "--retry-failed", "--random-init")
    assert code == 2 and "was made with weights" in err, err
    assert read_rows(tmp_path / "ray") == before  # what failed is still known
    (folder / "4.png").write_bytes((SAMPLES / "three.png").read_bytes())
    code, _, err = hiera(*given, "--resume", "--retry-failed")
    assert code == 0 and "hiera: 1 input in " in err, err
    hiera("features", folder, *MODEL, "--rows", tmp_path / "local", "-q")
    assert same(read_rows(tmp_path / "ray"), read_rows(tmp_path / "local"))


@pytest.mark.slow
def test_the_callables_run_in_ray_data(cluster: None) -> None:
    paths = [str(SAMPLES / name) for name in ("eight.png", "three.png", "missing.png")]
    rows = ray.data.from_items([{"path": path, "key": n} for n, path in enumerate(paths)])
    pool = ray.data.ActorPoolStrategy(size=1)
    options: dict[str, Any] = {"batch_size": 2, "compute": pool}
    arguments = {"fn_constructor_args": ("hiera_nano_32",)}
    decoded = rows.map_batches(Decoder, **arguments, **options)
    embedded = decoded.map_batches(Embedder, **arguments, **options).to_pandas()
    classified = decoded.map_batches(Classifier, **arguments, **options).to_pandas()
    found = embedded.sort_values("key")
    expected = hiera_core.features(paths[:2], "hiera_nano_32")
    vectors = np.stack([np.asarray(value) for value in found["embedding"]])
    for vector, one in zip(vectors[:2], expected, strict=True):
        np.testing.assert_allclose(vector, one["embedding"].numpy(), atol=1e-2)
    assert np.isnan(vectors[2]).all() and "no such file" in list(found["error"])[2]
    labels = list(classified.sort_values("key")["label"])
    assert labels == ["eight", "three", ""]


@pytest.mark.slow
def test_an_error_of_the_model_ends_the_run(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    given = ("--checkpoint", tmp_path / "bad.pth", "--rows", tmp_path / "rows", "--engine", "ray")
    code, _, err = hiera("features", folder, *given)
    assert code == 3 and len(err.splitlines()) == 1, err


def test_errors_of_workers_are_ours() -> None:
    inner = CheckpointError("is damaged", "get it again")
    outer = RuntimeError("the task failed")
    outer.__cause__ = inner
    found = ray_cluster.as_hiera_error(outer)
    assert type(found) is CheckpointError and str(found) == "is damaged; get it again"
    unknown: HieraError = ray_cluster.as_hiera_error(RuntimeError("no more memory\nstack"))
    assert isinstance(unknown, OutputError) and "no more memory" in str(unknown)


def test_ray_is_started_again_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class Node:
        """What Ray starts; it knows its processes, and leaves them when it fails."""

        def __init__(self, message: str) -> None:
            if message:
                raise Exception(message)

        def kill_all_processes(self, **options: object) -> None:
            ended.append(1)

    slow = "The current node timed out during startup. This could happen because"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for messages, starts in (([slow, slow, ""], 2), ([slow] * 3, 3), (["no disk", ""], 1)):
        left = list(messages)
        monkeypatch.setattr(ray, "init", lambda left=left, **options: Node(left.pop(0)))
        ended.clear()
        if messages[-1] or messages[0] != slow:
            with pytest.raises(OutputError, match="does not start on this machine") as found:
                ray_cluster.connect(ray_cluster.RayOptions())
            assert "--resume continues" in str(found.value) and messages[0][:7] in str(found.value)
        else:
            assert ray_cluster.connect(ray_cluster.RayOptions())[1]
        assert len(ended) == starts
    monkeypatch.setattr(ray, "init", lambda **options: Node(slow))
    with pytest.raises(OutputError, match=r"no Ray cluster at host:6379 .*; check --address"):
        ray_cluster.connect(ray_cluster.RayOptions(address="host:6379"))


def test_deaths_of_workers_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    death = {"lines": ["A worker died"], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(dict(death), ignore_prefix=False)
    assert "A worker died" in capsys.readouterr().out
    ray_cluster.connect(ray_cluster.RayOptions())
    worker.print_to_stdstream({**death, "lines": ["Another died"]}, ignore_prefix=False)
    assert capsys.readouterr().out == ""


def test_chunks_are_what_is_left() -> None:
    done = DoneRows()
    done.add(np.arange(256, 512), ["a"] * 256, ["ok"] * 256)
    done.add(np.array([3, 600]), ["a", "b"], ["ok", "error"])
    first, last = ray_engine._chunks(601, done)
    assert (first["start"], first["stop"]) == (0, 256)
    assert first["wanted"] == [n for n in range(256) if n != 3]
    assert last["wanted"] == list(range(512, 600))
    assert (done.ok, done.failed) == (257, 1)
    sizes = [ray_engine._rows_of_task(left, 4) for left in (1, 1000, 3000, 10**8)]
    assert sizes == [16, 31, 93, 256]
    assert done.some(3).tolist() == [3, 383, 600] and not len(DoneRows().some(3))


def test_a_listing_is_what_was_listed(folder: Path, tmp_path: Path) -> None:
    place = place_of(str(tmp_path))
    inputs = [str(folder), "http://host/x.png", "memory://none/"]
    write_listing(sources.expand(inputs), place)
    listing = ListedInputs(place).open()
    assert len(listing) == 9
    found = list(listing.read(range(9)))
    for source, expected in zip(found, sources.expand(inputs), strict=True):
        assert (source.name, source.path, source.url, str(source.error)) == (
            expected.name,
            expected.path,
            expected.url,
            str(expected.error),
        )
    assert [source.position for source in listing.read(range(4, 6))] == [4, 5]
    (tmp_path / "m.txt").write_text("a.png\nb.png\n")
    manifest = ManifestInputs(tmp_path / "m.txt").open()
    assert isinstance(manifest, Manifest) and len(manifest) == 2


def write_tar(path: Path, names: tuple[str, ...]) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(SAMPLES / name, name)


def test_what_could_not_be_listed_is_listed_again(folder: Path, tmp_path: Path) -> None:
    place, tar = place_of(str(tmp_path)), tmp_path / "late.tar"
    (tmp_path / "empty").mkdir()
    inputs = [str(folder / "0.png"), str(tar), str(tmp_path / "empty"), str(folder / "1.png")]

    def listed() -> list[tuple[str, bool]]:
        listing = ListedInputs(place).open()
        return [(Path(s.name).name, s.error is None) for s in listing.read(range(len(listing)))]

    write_listing(sources.expand(inputs), place)
    first = [("0.png", True), ("late.tar", False), ("empty", False), ("1.png", True)]
    assert listed() == first
    list_failed_again(place, lambda name: sources.expand([name]))
    assert listed() == first
    write_tar(tar, ("eight.png", "three.png", "five.png"))
    list_failed_again(place, lambda name: sources.expand([name]))
    later = [("three.png", True), ("five.png", True)]
    assert listed() == [first[0], ("eight.png", True), *first[2:], *later]
    before = (tmp_path / "_inputs.parquet").stat().st_mtime_ns
    (tmp_path / "empty/x.png").write_bytes(b"x")
    list_failed_again(place, lambda name: sources.expand([name]))
    assert listed()[2] == ("x.png", True) and len(listed()) == 6
    assert (tmp_path / "_inputs.parquet").stat().st_mtime_ns > before
    written = (tmp_path / "_inputs.parquet").stat().st_mtime_ns
    list_failed_again(place, lambda name: sources.expand([name]))  # there is nothing to do
    assert (tmp_path / "_inputs.parquet").stat().st_mtime_ns == written


def test_a_tar_file_that_was_damaged_is_not_listed_twice(tmp_path: Path) -> None:
    place, tar = place_of(str(tmp_path)), tmp_path / "x.tar"
    write_tar(tar, ("eight.png", "three.png"))
    content = tar.read_bytes()
    tar.write_bytes(content[:1000])
    write_listing(sources.expand([str(tar)]), place)
    tar.write_bytes(content)
    list_failed_again(place, lambda name: sources.expand([name]))
    listing = ListedInputs(place).open()
    names = [source.name for source in listing.read(range(len(listing)))]
    assert len(set(names)) == len(names), names
    sparse = Source(f"{tar}/a.png", path=tar, span=(0, 9), error=InputError("is sparse", "unpack"))
    write_listing([sparse], place)
    list_failed_again(place, lambda name: sources.expand([name]))
    (found,) = ListedInputs(place).open().read(range(1))
    assert found.error is not None and found.error.message == "is sparse"


@pytest.mark.slow
def test_inputs_that_could_not_be_listed_are_tried_again_on_ray(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    tar = tmp_path / "late.tar"
    given = ("features", tar, folder / "0.png", *MODEL, "--engine", "ray")
    given = (*given, "--rows", tmp_path / "rows")
    code, _, err = hiera(*given)
    assert code == 1 and "late.tar: no such file" in err, err
    write_tar(tar, ("eight.png", "three.png"))
    code, _, err = hiera(*given, "--resume")  # without --retry-failed, the error stays
    assert code == 1 and "hiera: 1 ok, 1 failed" in err, err
    code, _, err = hiera(*given, "--resume", "--retry-failed")
    assert code == 0 and "hiera: 3 ok, 0 failed" in err, err
    rows = read_rows(tmp_path / "rows")
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [Path(row["input"]).name for row in rows] == ["eight.png", "0.png", "three.png"]


def test_a_summary_has_units_that_suit_it() -> None:
    small = RunSummary(ok=2, failed=1, seconds=1.5, busy=1.0, waited=3.0, decoded=7300, written=410)
    assert small.text() == (
        "3 inputs in 1.5 s, 2.0/s; the model waited 75% of its time; 1 error; "
        "7.3 kB decoded, 0.41 kB written"
    )
    large = RunSummary(ok=10**6, seconds=1.0, decoded=int(3.1e12), written=int(4.2e9)).text()
    assert "0 errors; 3,100 GB decoded, 4.2 GB written" in large


def test_empty_lines_of_a_manifest_need_no_rows(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.txt").write_text(f"{folder / '0.png'}\n\n{folder / '1.png'}\n\n")
    given = ("features", "--manifest", tmp_path / "m.txt", *MODEL, "--rows", tmp_path / "rows")
    assert hiera(*given, "--engine", "ray")[0] == 0
    assert [row["index"] for row in read_rows(tmp_path / "rows")] == [0, 2]
    code, _, err = hiera(*given, "--engine", "ray", "--resume")
    assert code == 0, err
    (tmp_path / "m.txt").write_text(f"{folder / '2.png'}\n\n{folder / '1.png'}\n\n")
    code, _, err = hiera(*given, "--engine", "ray", "--resume")
    assert code == 2 and "input 0 is" in err and "2.png' now" in err
