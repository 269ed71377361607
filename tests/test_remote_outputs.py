"""Tests of results, weights and labels at remote places: whole, and with the same values."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hiera_core import weights
from hiera_core.atomic import unfinished
from hiera_core.errors import HubError, OutputError, UsageError
from hiera_core.inference.feature_formats import read
from hiera_core.places import places, remote_requests
from hiera_core.places.places import RemotePlace
from hiera_core.places.uploads import Upload
from hiera_core.weights import remote_weights
from hiera_core.weights.load import read_checkpoint
from hiera_core.weights.remote_weights import copy_checkpoint

from .conftest import Faulty
from .test_remote_files import MODEL, SAMPLES, bucket, fill

__all__ = ["bucket"]  # a fixture
Command = Callable[..., tuple[int, str, str]]
PICTURES = [SAMPLES / "eight.png", SAMPLES / "three.png"]
CLIP = SAMPLES / "moving_right.mp4"


def names_in(system: Any, folder: str) -> list[str]:
    system.invalidate_cache()
    return sorted(name.rpartition(folder)[2].lstrip("/") for name in system.find(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_faulty", [False, True])
def test_outputs_go_to_s3(hiera: Command, s3: Faulty, tmp_path: Path, is_faulty: bool) -> None:
    system, _ = fill(2)
    s3.is_faulty = is_faulty
    url = "s3://pictures/out"
    given = ("predict", *PICTURES, *MODEL, "-q")
    _, printed, _ = hiera(*given, "-f", "json")
    assert hiera(*given, "-o", f"{url}/classes.json")[0] == 0
    features = ("features", *PICTURES, *MODEL, "-q")
    assert hiera(*features, "-o", f"{url}/one.safetensors")[0] == 0
    assert hiera(*features, "-o", f"{url}/features", "--shard-size", 1)[0] == 0
    shown = ("mae", PICTURES[0], "-m", "mae_hiera_nano_32", "-q", "-f", "jsonl")
    code, out, _ = hiera(*shown, "-o", f"{url}/shown/")
    assert code == 0 and json.loads(out)["files"] == [f"{url}/shown/eight.png"]
    assert hiera(*given[:2], *MODEL, "--save-images", f"{url}/a.png", "-f", "jsonl")[0] == 0
    s3.is_faulty = False
    assert names_in(system, "pictures/out") == [
        "a.png", "classes.json", "features/image-00000.safetensors",
        "features/image-00001.safetensors", "one.safetensors", "shown/eight.png",
    ]  # fmt: skip
    assert system.cat_file("pictures/out/classes.json").decode() == printed
    assert hiera(*features, "-o", tmp_path / "one.safetensors")[0] == 0
    system.get_file("pictures/out/one.safetensors", str(tmp_path / "copy.safetensors"))
    expected, inputs = read(tmp_path / "one.safetensors")
    found, same_inputs = read(tmp_path / "copy.safetensors")
    assert inputs == same_inputs
    np.testing.assert_array_equal(found["embedding"].numpy(), expected["embedding"].numpy())
    for name in ("a.png", "shown/eight.png"):
        Image.open(io.BytesIO(system.cat_file(f"pictures/out/{name}"))).load()


def test_records_name_the_remote_files(hiera: Command, bucket: Any) -> None:
    url = "memory://bucket/out"
    given = ("features", PICTURES[0], *MODEL, "-f", "jsonl")
    _, out, err = hiera(*given, "-o", url)
    assert json.loads(out)["file"]["name"] == f"{url}/image-00000.safetensors"
    assert f"features are in {url}" in err
    _, out, err = hiera(*given, "-o", "memory://bucket/x.npy")
    assert json.loads(out)["file"]["name"] == "memory://bucket/x.npy"
    assert np.load(io.BytesIO(bucket.cat_file("/bucket/x.npy"))).shape == (96,)
    _, _, err = hiera("predict", *PICTURES, *MODEL, "-o", "memory://bucket/x.csv")
    assert "2 ok, 0 failed -> memory://bucket/x.csv" in err
    video = ("mae", CLIP, "-m", "mae_hiera_nano_8x32", "-f", "jsonl", "-o")
    code, out, _ = hiera(*video, "memory://bucket/clips/")
    assert code == 0 and len(json.loads(out)["files"]) == 2
    assert [name.rpartition(".")[2] for name in names_in(bucket, "/bucket/clips")] == ["mp4", "png"]


def test_shards_go_to_a_remote_folder(hiera: Command, bucket: Any) -> None:
    given = ("predict", *PICTURES, *MODEL, "-q")
    for index in range(2):
        shard = ("--shard", f"{index}/2")
        assert hiera(*given, *shard, "-o", "memory://bucket/o/x.jsonl")[0] == 0
        assert hiera("features", *given[1:], *shard, "-o", "memory://bucket/f/")[0] == 0
    assert names_in(bucket, "/bucket/o") == [f"shard-0000{n}-of-00002-x.jsonl" for n in range(2)]
    stem = "-of-00002-image-00000.safetensors"
    assert names_in(bucket, "/bucket/f") == [f"shard-0000{n}{stem}" for n in range(2)]
    for command, place in (("predict", "o/x.jsonl"), ("features", "f")):
        other = (command, *given[1:], "-o", f"memory://bucket/{place}")
        code, _, err = hiera(*other, "--shard", "0/3")
        assert code == 2 and "over 2 shards" in err
        code, _, err = hiera(*other, "--shard", "0/2")
        assert code == 2 and ("exists" in err or "has files" in err)


def test_what_is_there_is_not_replaced(hiera: Command, bucket: Any) -> None:
    bucket.pipe_file("/bucket/f/image-00007.npz", b"of an earlier run")
    bucket.pipe_file("/bucket/f/notes.txt", b"mine")
    for given, message in (
        (("predict", *PICTURES, *MODEL, "-o", "memory://bucket/a.png.csv"), None),
        (("predict", *PICTURES, *MODEL, "-o", "memory://bucket/a.png.csv"), "exists"),
        (("features", *PICTURES, *MODEL, "-o", "memory://bucket/f/"), "has files such as 'image"),
        (("mae", PICTURES[0], "-m", "mae_hiera_nano_32", "-o", "memory://bucket/f/"), "has files"),
        (("mae", PICTURES[0], "-m", "mae_hiera_nano_32", "-o", "memory://bucket/a.png"), "exists"),
    ):
        code, _, err = hiera(*given, "-q")
        assert (code == 0) if message is None else (code == 2 and message in err), err
        if message:
            assert hiera(*given, "-q", "--overwrite")[0] == 0
    names = ["eight.png", "image-00000.safetensors", "notes.txt"]
    assert names_in(bucket, "/bucket/f") == names


@pytest.mark.parametrize(
    "given, message",
    [
        (("predict", "-o", "https://h/x.csv"), "cannot be written"),
        (("predict", "-o", "memory://bucket/"), "is a folder"),
        (("predict", "-o", "memory://bucket/o.xyz"), "unknown file extension"),
        (("predict", "-o", "memory://bucket/x.jsonl", "--resume"), "--resume does not continue"),
        (("predict", "-o", "nosuch://bucket/x.csv"), "nosuch"),
        (("predict", "--rows", "memory://"), "names no place"),
        (("features", "-o", "memory://"), "names no place"),
        (("mae", "-o", "memory:///"), "names no place"),
        (("features", "-o", "memory://bucket/o.xyz"), "unknown file extension"),
        (("features", "-o", "memory://bucket/o/", "--resume"), "--resume does not continue"),
        (("features", "--visualize", "s3://bucket/o/"), "is a URL"),
        (("features", "--manifest", "s3://bucket/m/"), "is of no known format"),
        (("features", "--manifest", "file:///m.csv"), "is a URL"),
        (("mae", "-o", "memory://bucket/o.xyz"), "unknown file extension"),
        (("mae", "-o", "http://h/o/"), "cannot be written"),
        (("predict", "--rows", "http://h/rows"), "cannot be written"),
        (("predict", "-o", "file:///tmp/x.csv"), "cannot be written"),
        (("predict", "-o", "HTTPS://h/x.csv"), "cannot be written"),
    ],
)
def test_what_cannot_be_remote_is_refused(
    hiera: Command, bucket: Any, given: tuple[str, ...], message: str
) -> None:
    inputs = () if "--manifest" in given else (PICTURES[0],)
    code, _, err = hiera(given[0], *inputs, *given[1:])
    assert code == 2 and message in err and len(err.splitlines()) == 1, err


@pytest.mark.filterwarnings("ignore")
def test_a_missing_bucket_is_named_before_any_work(hiera: Command, s3: Faulty) -> None:
    code, _, err = hiera("predict", PICTURES[0], *MODEL, "-o", "s3://none/x.csv")
    assert code == 2 and "there is no bucket 'none'" in err and len(err.splitlines()) == 1
    code, _, err = hiera("mae", PICTURES[0], "-m", "mae_hiera_nano_32", "-o", "s3://none/x/")
    assert code == 2 and "there is no bucket 'none'" in err


def test_what_cannot_be_sent_is_kept(
    hiera: Command, bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(type(bucket), "put_file", refuse)
    code, _, err = hiera("predict", *PICTURES, *MODEL, "-q", "-o", "memory://bucket/x.jsonl")
    (kept,) = tmp_path.glob("hiera-*/x.jsonl")
    assert code == 5 and "memory://bucket/x.jsonl cannot be written (access denied" in err
    assert str(kept) in err and len(kept.read_text().splitlines()) == 2
    given = ("features", *PICTURES, *MODEL, "-q", "-f", "jsonl", "-o", "memory://bucket/f/")
    code, _, err = hiera(*given)
    (kept,) = tmp_path.glob("hiera-*/image-00000.safetensors")
    assert code == 5 and str(kept) in err


def test_a_run_that_stops_keeps_its_results(
    hiera: Command, bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = ("predict", PICTURES[0], "missing.png", *MODEL, "--on-error", "stop", "-o")
    code, _, err = hiera(*given, "memory://bucket/x.jsonl")
    (kept,) = tmp_path.glob("hiera-*/x.jsonl.partial")
    assert code == 1 and str(kept) in err and not bucket.exists("/bucket/x.jsonl")
    assert hiera("predict", PICTURES[0], *MODEL, "-q", "-o", "memory://bucket/x.jsonl")[0] == 0
    assert len(list(tmp_path.glob("hiera-*"))) == 1  # temporary folders go


def test_other_places_rename_at_the_end(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(places, "OBJECT_STORES", ())  # memory:// as if it were a file server
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    upload = Upload("memory://bucket/new")
    (upload.folder / "x").write_bytes(b"content")
    written: list[str] = []
    original = type(bucket).put_file

    def put(self: Any, local: str, remote: str, **options: Any) -> None:
        written.append(remote)
        assert unfinished.being_finished() == [upload.folder / "x"]  # a signal waits
        original(self, local, remote, **options)

    monkeypatch.setattr(type(bucket), "put_file", put)
    assert upload.send(upload.folder / "x") == "memory://bucket/new/x"
    assert bucket.cat_file("/bucket/new/x") == b"content"
    assert "/.hiera-" in written[0] and names_in(bucket, "/bucket/new") == ["x"]
    upload.close()
    assert not upload.folder.exists()


# Reading only what is needed ----------------------------------------------------------------------


def test_a_resumed_run_reads_little(
    hiera: Command, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    given = ("features", SAMPLES, *MODEL, "-q", "--rows", "memory://bucket/rows")
    hiera(*given)
    (name,) = bucket.ls("/bucket/rows", detail=False)
    # A file whose embeddings are by far the largest part of it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(bucket.cat_file(name)))
    noise = np.random.default_rng(0).random((len(table), 50_000), np.float32)
    wide = pa.array(list(noise), pa.list_(pa.float32()))
    place = table.schema.get_field_index("embedding")
    sink = io.BytesIO()
    pq.write_table(table.set_column(place, table.schema.field("embedding"), wide), sink)
    bucket.pipe_file(name, sink.getvalue())
    ranges: list[int] = []
    original = type(bucket).cat_file

    def cat(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        content: bytes = original(self, path, start=start, end=end, **options)
        ranges.append(len(content))
        return content

    monkeypatch.setattr(type(bucket), "cat_file", cat)
    assert hiera(*given, "--resume")[0] in (0, 1)
    assert ranges and sum(ranges) < len(sink.getvalue()) / 5, (ranges, len(sink.getvalue()))


def test_a_place_that_fails_is_no_damage(
    hiera: Command, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    given = ("features", PICTURES[0], *MODEL, "-q", "--rows", "memory://bucket/rows")
    assert hiera(*given)[0] == 0

    def fail(*_: Any, **__: Any) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(bucket), "cat_file", fail)
    code, _, err = hiera(*given, "--resume")
    assert code == 5 and "reset by peer" in err and "damaged" not in err, err


def test_a_place_that_does_not_answer_is_an_error_in_one_line(hiera: Command) -> None:
    for option, ending in (("-o", "csv"), ("--save-images", "png")):
        url = f"ftp://127.0.0.1:1/x.{ending}"
        code, _, err = hiera("predict", PICTURES[0], *MODEL, option, url)
        assert code == 5 and "cannot be reached" in err and len(err.splitlines()) == 1, err
    with pytest.raises(HubError, match="refused"):
        read_checkpoint("ftp://127.0.0.1:1/x.pth")


@pytest.mark.filterwarnings("ignore")
def test_an_empty_object_named_like_the_folder_is_no_file(s3: Faulty) -> None:
    system, _ = fill(1)
    for key in ("new/", "plain"):
        system.call_s3("put_object", Bucket="pictures", Key=key, Body=b"")
        assert RemotePlace(f"s3://pictures/{key}").names("", "") == []


def test_a_signal_ends_the_attempts_of_an_upload(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    (tmp_path / "x.csv").write_text("a")
    attempts = []

    def put(*_: Any, **__: Any) -> None:
        attempts.append(1)
        monkeypatch.setattr(unfinished, "_deferred", KeyboardInterrupt())
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(bucket), "put_file", put)
    with pytest.raises(KeyboardInterrupt):
        RemotePlace("memory://bucket/o").upload(tmp_path / "x.csv", "x.csv")
    assert len(attempts) == 1


def test_a_signal_during_an_upload_says_where_the_file_is(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_requests, "FIRST_WAIT_S", 0.001)
    upload, put = Upload("memory://bucket/o"), type(bucket).put_file

    def interrupted(*given: Any, **options: Any) -> None:
        monkeypatch.setattr(unfinished, "_deferred", KeyboardInterrupt())
        if not is_sent:
            raise ConnectionError("reset by peer")
        put(*given, **options)

    monkeypatch.setattr(type(bucket), "put_file", interrupted)
    for is_sent in (True, False):
        (upload.folder / "x.csv").write_text("a")
        with pytest.raises(KeyboardInterrupt) as caught:
            upload.send(upload.folder / "x.csv")
        assert (upload.folder / "x.csv").exists() is upload.is_kept is not is_sent
        assert bool(getattr(caught.value, "__notes__", [])) is not is_sent
    assert names_in(bucket, "/bucket/o") == ["x.csv"]


def test_results_before_an_error_of_usage_are_named(
    hiera: Command, bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are in a temporary folder, which the user did not choose."""
    from hiera_core.inference.predict import Predictor

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    finish = Predictor.finish_image

    def fail_later(self: Any, record: Any, *given: Any) -> None:
        if record.index:
            raise UsageError("of another kind", "leave it out")
        finish(self, record, *given)

    monkeypatch.setattr(Predictor, "finish_image", fail_later)
    code, _, err = hiera("predict", *PICTURES, *MODEL, "-o", "memory://bucket/x.csv")
    (kept,) = tmp_path.glob("hiera-*/x.csv.partial")
    assert code == 2 and str(kept) in err, err


def test_a_request_number_is_no_end_of_file() -> None:
    """Only what is said about the range is the end, not a number that contains 416."""

    class Place:
        def __init__(self, error: Exception) -> None:
            self.errors = [error]

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            if self.errors:
                raise self.errors.pop()
            return b"content"

    busy = OSError("An error occurred (SlowDown) ... RequestId: 9A4167BC for part-000000004160")
    assert remote_requests.read_range(Place(busy), "x", 0, 7) == b"content"
    for text in ("(InvalidRange) when calling", "416 Client Error: Range Not Satisfiable for url"):
        assert remote_requests.read_range(Place(OSError(text)), "x", 0, 7) == b""
    coded = OSError("no text")
    coded.status = 416  # type: ignore[attr-defined]
    assert remote_requests.read_range(Place(coded), "x", 0, 7) == b""


def test_a_remote_file_is_read_in_parts(bucket: Any) -> None:
    bucket.pipe_file("/bucket/x", bytes(range(200)))
    with RemotePlace("memory://bucket").open("x") as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == bytes(range(190, 200)) and file.tell() == 200
        file.seek(5)
        assert file.read(3) == bytes([5, 6, 7]) and file.read(2) == bytes([8, 9])
    with pytest.raises(OutputError, match="no such file"):
        RemotePlace("memory://bucket").open("missing")


# Weights and labels -------------------------------------------------------------------------------


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A folder with a model of three classes."""
    import hiera_core

    model = hiera_core.create_model("hiera_nano_32")
    model.save_pretrained(tmp_path / "saved", config=model.config)
    return tmp_path / "saved"


def write_parts(source: Path, folder: Path) -> None:
    """Write the weights of a folder as two files and their index, beside its other files."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    state, listed = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = dict(list(state.items())[number - 1 :: 2])
        save_file(part, folder / file)
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.filterwarnings("ignore")
def test_weights_come_from_s3(
    hiera: Command, s3: Faulty, nano: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    system, _ = fill(1)
    for path in nano.iterdir():
        system.pipe_file(f"pictures/model/{path.name}", path.read_bytes())
    write_parts(nano, tmp_path / "parts")
    for path in (tmp_path / "parts").iterdir():
        system.pipe_file(f"pictures/parts/{path.name}", path.read_bytes())
    s3.is_faulty = True
    expected = hiera("predict", *PICTURES, "-m", nano, "--dtype", "fp32", "-f", "csv")[1]
    for place in ("model/model.safetensors", "model/", "parts/"):
        url = f"s3://pictures/{place}"
        code, out, err = hiera("predict", *PICTURES, "-m", url, "--dtype", "fp32", "-f", "csv")
        assert code == 0, err
        assert [line.split(",")[4:] for line in out.splitlines()[1:]] == [
            line.split(",")[4:] for line in expected.splitlines()[1:]
        ]
    copies = list((tmp_path / "home/hub/checkpoints").glob("remote-*"))
    assert len([path for path in copies if path.is_dir()]) == 2  # the second run takes the copy
    code, _, err = hiera("predict", PICTURES[0], "-m", "s3://pictures/none.pth")
    assert code == 4 and "s3://pictures/none.pth: no such file" in err


def test_replaced_weights_are_fetched_again(
    bucket: Any, nano: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = (nano / "model.safetensors").read_bytes()
    bucket.pipe_file("/bucket/w/any.safetensors", content)
    first = copy_checkpoint("memory://bucket/w/any.safetensors")
    assert first == copy_checkpoint("memory://bucket/w/")  # the only file of the folder
    assert read_checkpoint("memory://bucket/w/any.safetensors").num_classes
    first.write_bytes(b"damaged")  # a damaged copy is fetched again
    assert read_checkpoint("memory://bucket/w/any.safetensors").num_classes
    bucket.pipe_file("/bucket/w/any.safetensors", content + b" ")
    assert copy_checkpoint("memory://bucket/w/any.safetensors") != first
    bucket.pipe_file("/bucket/w/any.safetensors", b"no weights")
    with pytest.raises(HubError):
        read_checkpoint("memory://bucket/w/any.safetensors")
    bucket.pipe_file("/bucket/empty/notes.txt", b"text")
    with pytest.raises(HubError, match=r"holds no model\.safetensors"):
        read_checkpoint("memory://bucket/empty")
    with pytest.raises(UsageError, match="nosuch"):
        read_checkpoint("nosuch://bucket/x.pth")
    assert weights.names.is_location("s3://bucket/x")


def test_weights_that_change_while_they_are_copied_are_refused(
    bucket: Any, nano: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url, content = "memory://bucket/w/any.safetensors", (nano / "model.safetensors").read_bytes()
    bucket.pipe_file("/bucket/w/any.safetensors", content)
    read = remote_weights.read_range

    def changing(*given: Any) -> bytes:
        bucket.pipe_file("/bucket/w/any.safetensors", content)  # as large, and another version
        return read(*given)

    monkeypatch.setattr(remote_weights, "read_range", changing)
    with pytest.raises(HubError, match="has changed"):
        copy_checkpoint(url)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    monkeypatch.setattr(remote_weights, "read_range", read)
    assert copy_checkpoint(url).read_bytes() == content


@pytest.mark.parametrize("key", ["updated", "last_modified", "modificationTime", "sha"])
def test_the_version_of_a_file_is_what_its_place_calls_it(key: str) -> None:
    first, second = ({"size": 1, key: value} for value in ("a", "b"))
    assert remote_weights._version(first) != remote_weights._version(second)


def test_labels_come_from_a_url(hiera: Command, bucket: Any, hub: Any) -> None:
    names = "".join(f"name {n}\n" for n in range(10)).encode()
    bucket.pipe_file("/bucket/names.txt", names)
    bucket.pipe_file("/bucket/bad.txt", b"\0\1")
    hub.plain["/names.txt"] = names
    given = ("predict", PICTURES[0], *MODEL, "-f", "jsonl", "-k", 1, "--labels")
    for url in ("memory://bucket/names.txt", f"{hub.url}/names.txt"):
        code, out, err = hiera(*given, url)
        assert code == 0 and json.loads(out)["topk"][0]["label"] == "name 8", err
    for name, message in (("none", "no such file"), ("bad", "not a text file")):
        code, _, err = hiera(*given, f"memory://bucket/{name}.txt")
        assert code == 2 and message in err and len(err.splitlines()) == 1
