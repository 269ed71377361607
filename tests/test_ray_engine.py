"""Tests of the engine on Ray: its rows are those of the local engine, and a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hiera_core
from hiera_core.data.division.manifest import Manifest
from hiera_core.errors import CheckpointError, HieraError, OutputError
from hiera_core.inference import Classifier, Decoder, Embedder
from hiera_core.places.places import place_of
from hiera_core.scale import ray_cluster, ray_engine
from hiera_core.scale.input_table import ListedInputs, ManifestInputs, write_listing
from hiera_core.scale.row_folder import DoneRows

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
    assert "hiera: 7 inputs in " in err and "the model waited" in err and "GB written" in err
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


@pytest.mark.slow
def test_failed_inputs_are_tried_again_on_ray(
    hiera: Command, cluster: None, folder: Path, tmp_path: Path
) -> None:
    given = ("features", folder, *MODEL, "--engine", "ray", "--rows", tmp_path / "ray")
    assert hiera(*given, "--shard-size", 3)[0] == 1
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
    from hiera_core.data import sources

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
