"""Tests of Parquet files as data: columns, splits, and data sets of the hub."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hiera_core.data import datasets
from hiera_core.data.indexed import index_cache, parquet_data, parquet_images
from hiera_core.data.indexed.parquet_columns import find_columns
from hiera_core.data.indexed.parquet_images import TableFile
from hiera_core.errors import HubError, OutputError, UsageError

from .conftest import Hub, HubHandler

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Command = Callable[..., tuple[int, str, str]]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["odd", "even"]}}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIERA_INDEX_FOLDER", str(tmp_path / "indices"))
    return tmp_path / "indices"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(count: int, first: int = 0, features: Mapping[str, Any] | None = CLASSES) -> Any:
    """Return a table as `datasets` writes it."""
    rows = range(first, first + count)
    images = pa.array([{"bytes": picture(n), "path": f"{n}.png"} for n in rows], STRUCT)
    found = pa.table({"image": images, "label": pa.array([n % 2 for n in rows])})
    if features is None:
        return found
    return found.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def write(path: Path, content: Any, rows: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with two splits, one of them in two files."""
    data = tmp_path / "data set"
    write(data / "data/train-00000-of-00002.parquet", table(20))
    write(data / "data/train-00001-of-00002.parquet", table(10, 20))
    write(data / "data/validation-00000-of-00001-0a1b.parquet", table(6, 100))
    return data


def test_images_and_labels_of_all_row_groups(folder: Path, own_folder: Path) -> None:
    splits = datasets.open_splits(folder)
    assert splits.val is not None and (len(splits.train), len(splits.val)) == (30, 6)
    assert splits.train.classes == ["odd", "even"] and splits.train.labels is not None
    assert splits.train.labels.tolist() == [n % 2 for n in range(30)]
    for number in (0, 6, 7, 19, 20, 29):
        assert splits.train.sources[number].content() == picture(number)
    assert splits.train.sources[21].name.endswith("train-00001-of-00002.parquet/1.png")
    assert datasets.open_eval_data(folder).sources[0].content() == picture(100)
    unlabelled = datasets.open_splits(folder, labelled=False).train
    assert unlabelled.labels is None and len(unlabelled) == 30
    with pytest.raises(UsageError, match=r"holds the splits train, validation; name one: .*train"):
        datasets.open_dataset(folder)


def test_images_are_copied_once_until_a_file_changes(folder: Path, own_folder: Path) -> None:
    def contents() -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in own_folder.glob("*.content")}

    path = folder / "data/train-00000-of-00002.parquet"
    datasets.open_dataset(path)
    first = contents()
    datasets.open_dataset(path)
    assert contents() == first and len(first) == 1
    write(path, table(5))
    assert len(datasets.open_dataset(path)) == 5
    assert len(contents()) == 1 and contents() != first
    for content in own_folder.glob("*.content"):
        content.unlink()
    assert datasets.open_dataset(path).sources[4].content() == picture(4)


def test_images_that_a_run_reads_are_not_removed(tmp_path: Path, own_folder: Path) -> None:
    path = write(tmp_path / "a.parquet", table(5))
    run = datasets.open_dataset(path)
    write(path, table(7))
    assert len(datasets.open_dataset(path)) == 7
    assert run.sources[4].content() == picture(4)
    del run
    write(path, table(8))
    assert len(datasets.open_dataset(path)) == 8
    assert len([*own_folder.glob("*.content")]) == 1


def test_images_keep_their_time_and_are_as_old_as_their_index(
    folder: Path, own_folder: Path
) -> None:
    """`--cache` of a probe knows a file by its time."""
    (path,) = (folder / "data").glob("validation*")
    datasets.open_dataset(path)
    (content,) = own_folder.glob("*.content")
    os.utime(content, (1, 1))
    datasets.open_dataset(path)
    assert content.stat().st_mtime == 1
    index_cache._remove_unused(own_folder)
    assert content.exists()
    os.utime(next(own_folder.glob("*.index")), (1, 1))
    index_cache._remove_unused(own_folder)
    assert not [*own_folder.glob("*.content"), *own_folder.glob("*.index")]


def test_files_patterns_and_columns_are_named(tmp_path: Path) -> None:
    images = pa.array([picture(n) for n in range(6)])
    names = pa.array(["cat", "dog", "cat", "bird", "dog", "cat"])
    write(tmp_path / "a.parquet", pa.table({"photo": images, "thumb": images, "breed": names}))
    write(tmp_path / "b.parquet", pa.table({"photo": images, "thumb": images, "breed": names}))
    for data, count in (("a.parquet", 6), ("*.parquet", 12)):
        found = datasets.open_dataset(f"{tmp_path}/{data}?image=photo&label=breed")
        assert len(found) == count and found.classes == ["bird", "cat", "dog"]
        assert found.labels is not None and found.labels[:3].tolist() == [1, 2, 1]
    with pytest.raises(UsageError, match=r"no column 'bred'; did you mean breed\?"):
        datasets.open_dataset(f"{tmp_path}/a.parquet?image=photo&label=bred")
    with pytest.raises(UsageError, match=r"no column holds labels .*\?label=COLUMN"):
        datasets.open_dataset(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="names no Parquet files"):
        datasets.open_dataset(f"{tmp_path}/a.csv?label=breed")


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"image": STRUCT, "label": pa.int64()}, {}, ("image", "label")),
        ({"x": pa.binary(), "cls": pa.string()}, {}, ("x", "cls")),
        ({"img": STRUCT, "image": pa.binary(), "label": pa.int8()}, {}, ("image", "label")),
        (
            {"a": STRUCT, "b": STRUCT, "fine": pa.int64(), "label": pa.int64()},
            {"b": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": ["u"]}},
            ("b", "fine"),
        ),
        ({"a": pa.binary(), "b": pa.binary()}, {}, r"several columns may hold the images \(a, b\)"),
        ({"image": pa.string()}, {}, "no column holds images"),
        (
            {"image": STRUCT, "f": pa.int64(), "c": pa.int64()},
            {"f": {"_type": "ClassLabel"}, "c": {"_type": "ClassLabel"}},
            r"several columns may hold the labels \(f, c\)",
        ),
    ],
)
def test_columns_are_found_by_metadata_types_and_names(
    columns: dict[str, Any], features: dict[str, Any], expected: tuple[str, str] | str
) -> None:
    text = json.dumps({"info": {"features": features}})
    schema = pa.schema(columns, metadata={"huggingface": text})
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            find_columns(schema, labelled=True)
    else:
        found = find_columns(schema, labelled=True)
        assert (found.image, found.label) == expected


def test_odd_metadata_is_no_error() -> None:
    for text in (b"", b"{", b"[]", b'{"info": 3}', b'{"info": {"features": [1]}}', b"\xff"):
        schema = pa.schema({"image": STRUCT, "label": pa.int64()}, metadata={b"huggingface": text})
        assert find_columns(schema, labelled=True).classes is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no parquet", "cannot be read"),
        (b"", "cannot be read"),
        (table(4).slice(0, 0), "holds no pictures or videos"),
        (
            pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}], STRUCT), "label": [1]}),
            "row 0 holds a path instead of an image",
        ),
        (
            pa.table({"image": [b"x", b"y"], "label": pa.array([1, None])}),
            r"row 1 has no label \(label: None\)",
        ),
        (pa.table({"image": [b"x"], "label": [-1]}), r"row 0 has no label \(label: -1\)"),
        (pa.table({"image": [b"x"], "label": [10**9]}), "is no class number"),
        (
            pa.table({"image": [b"x"], "label": pa.array([2**63], pa.uint64())}),
            "label 9223372036854775808 is no class number",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, own_folder: Path, content: Any, message: str
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(UsageError, match=message) as error:
        datasets.open_dataset(path)
    assert "\n" not in str(error.value)
    if "holds no pictures" not in message:
        assert not [*own_folder.glob("*.index"), *own_folder.glob("*.content")]


def test_a_damaged_page_is_not_a_full_disk(tmp_path: Path, own_folder: Path) -> None:
    path = write(tmp_path / "a.parquet", table(40), rows=40)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 300 + content[304:])
    with pytest.raises(UsageError, match=r"a.parquet cannot be read .*get it again") as error:
        datasets.open_dataset(path)
    assert "\n" not in str(error.value) and not [*own_folder.glob("*.content")]


def test_files_with_names_and_with_numbers_as_labels_are_not_mixed(tmp_path: Path) -> None:
    for name, labels in (("a", [0, 1]), ("b", ["cat", "dog"])):
        write(tmp_path / f"{name}.parquet", pa.table({"image": [b"x", b"y"], "label": labels}))
    with pytest.raises(UsageError, match=r"b\.parquet: row 0: label 'cat' is a name, unlike"):
        datasets.open_dataset(tmp_path / "*.parquet")


def test_other_columns_leave_the_images_of_a_run_in_their_place(tmp_path: Path) -> None:
    columns = {"image": [picture(1), picture(2)], "fine": [0, 1], "coarse": [0, 0]}
    path = write(tmp_path / "a.parquet", pa.table(columns))
    fine = datasets.open_dataset(f"{path}?label=fine")
    coarse = datasets.open_dataset(f"{path}?label=coarse")
    assert fine.sources[1].content() == coarse.sources[1].content() == picture(2)


def test_a_table_beside_pictures_does_not_hide_them(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(0))
    write(tmp_path / "features.parquet", pa.table({"input": ["cat/0.png"], "x": [0.5]}))
    assert datasets.open_dataset(tmp_path).classes == ["cat", "dog"]
    write(tmp_path / "train.parquet", table(3))
    assert len(datasets.open_dataset(tmp_path / "train.parquet")) == 3


def test_the_hint_for_several_splits_can_be_followed(folder: Path, tmp_path: Path) -> None:
    for data in (folder, folder / "data"):
        with pytest.raises(UsageError, match="holds the splits train, validation") as error:
            datasets.open_dataset(data)
        found = datasets.open_dataset(error.value.hint.removeprefix("name one: "))
        assert len(found) == 30


def test_a_missing_package_and_a_full_disk_have_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    import sys

    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"pip install 'hiera-toolkit\[parquet\]'"):
            datasets.open_splits(folder)
    usage = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(parquet_images.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"GB free.*HIERA_INDEX_FOLDER"):
        datasets.open_splits(folder)


def test_splits_and_configurations_are_told_by_names() -> None:
    def split(wanted: str, *names: str) -> dict[str, list[str]]:
        files = {name: TableFile(name, []) for name in names}
        found = parquet_data.split_files("d", files, wanted)
        return {key: [file.name for file in each] for key, each in found.items()}

    names = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001-ab12.parquet")
    assert split("", *names) == {"train": [names[0]], "test": [names[1]]}
    assert split("test", *names) == {"test": [names[1]]}
    configs = ("a/train/0000.parquet", "a/test/0000.parquet", "b/train/0000.parquet")
    assert set(split("a", *configs)) == {"train", "test"}
    assert split("b/train", *configs) == {"train": [configs[2]]}
    assert split("", "x.parquet", "y.parquet") == {"train": ["x.parquet", "y.parquet"]}
    assert split("", "validation.parquet", "valid_2.parquet").keys() == {"validation", "valid"}
    with pytest.raises(UsageError, match=r"several configurations \(a, b\); name one: d/a"):
        split("", *configs)
    with pytest.raises(UsageError, match=r"\(a\), and files beside them; name one: d/a$"):
        split("", "train.parquet", "a/train/0000.parquet")
    files = {name: TableFile(name, []) for name in configs}
    with pytest.raises(UsageError, match=r"name one: s3://b/d/a/$"):
        parquet_data.split_files("s3://b/d/", files)
    with pytest.raises(UsageError, match="there is no 'tests' in the data set; did you mean test"):
        split("tests", *names)


def test_an_unreadable_image_is_one_bad_sample(tmp_path: Path, hiera: Command) -> None:
    content = pa.table({"image": [picture(1), b"damaged", None], "label": [0, 1, 1]})
    path = write(tmp_path / "a.parquet", content)
    code, out, err = hiera("eval", path, "-m", "hiera_nano_32", "-f", "json")
    assert code == 1 and json.loads(out)["samples"] == 1
    assert "a.parquet/1: " in err and "a.parquet/2: empty file" in err


def test_a_run_on_parquet_files(folder: Path, hiera: Command, tmp_path: Path) -> None:
    settings = ("batch_size=10", "schedule.epochs=1", "schedule.warmup_epochs=0")
    sets = [word for value in settings for word in ("--set", value)]
    given = ("train", "hiera_nano_32", folder, *sets, "-q", "-j", 0, "-o", tmp_path / "run")
    code, _, err = hiera(*given)
    assert code == 0, err
    code, out, err = hiera("eval", folder, "--checkpoint", tmp_path / "run", "-f", "json")
    assert code == 0 and json.loads(out)["samples"] == 6, err
    given = ("eval", folder, "--checkpoint", tmp_path / "run", "--probe", "knn", "-f", "json")
    assert hiera(*given)[0] == 0


def test_parquet_files_at_a_remote_place() -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name, content in (("train", table(9)), ("test", table(3, 50))):
        file = io.BytesIO()
        pq.write_table(content, file, row_group_size=4)
        system.pipe_file(f"/parquet/{name}.parquet", file.getvalue())
    splits = datasets.open_splits("memory://parquet/")
    assert len(splits.train) == 9 and splits.val is None
    assert splits.train.sources[8].content() == picture(8)
    assert len(datasets.open_eval_data("memory://parquet/")) == 3
    assert len(datasets.open_dataset("memory://parquet/t*.parquet")) == 12
    system.rm("/parquet", recursive=True)


# The hub ------------------------------------------------------------------------------------------


class DatasetHandler(HubHandler):
    """Handler with the part of the hub that data sets need: their files."""

    def do_GET(self) -> None:
        api, _, rest = self.path.partition("/tree/")
        if not api.startswith("/api/datasets/"):
            super().do_GET()
            return
        self.server.log.append(f"GET {self.path}")
        repo = f"datasets/{api.removeprefix('/api/datasets/')}"
        revision = rest.partition("?")[0].replace("%2F", "/").rstrip("/")
        if repo not in self.server.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "refs/convert/parquet"):
            self._refuse(404, "RevisionNotFound")
        else:
            files = self.server.repositories[repo]
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": str(hash(content))}
                for name, content in files.items()
                if name.startswith("default/") == (revision != "main")
            ]
            self._send(json.dumps(listed).encode(), True, {"Content-Type": "application/json"})

    def _answer(self, with_body: bool) -> None:
        self.path = self.path.replace("/resolve/refs%2Fconvert%2Fparquet/", "/resolve/main/")
        super()._answer(with_body)


@pytest.fixture
def dataset_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub.RequestHandlerClass = DatasetHandler
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    files = {}
    for name, content in (("train", table(12)), ("test", table(4, 50))):
        file = io.BytesIO()
        pq.write_table(content, file)
        files[f"data/{name}-00000-of-00001.parquet"] = file.getvalue()
    hub.repositories["datasets/me/pets"] = {**files, "README.md": b"# Pets"}
    converted = {
        f"default/{name[5:].partition('-')[0]}/0000.parquet": c for name, c in files.items()
    }
    hub.repositories["datasets/me/csv"] = {"pets.csv": b"a,b", **converted}
    hub.repositories["datasets/me/empty"] = {"README.md": b"# Nothing"}
    yield hub


@pytest.mark.parametrize("repo", ["me/pets", "me/csv"])
def test_data_sets_of_the_hub(dataset_hub: Hub, repo: str) -> None:
    """Also one that the hub has converted to Parquet."""
    splits = datasets.open_splits(f"hf://datasets/{repo}")
    assert len(splits.train) == 12 and splits.val is None
    assert splits.train.classes == ["odd", "even"]
    assert splits.train.sources[11].content() == picture(11)
    assert len(datasets.open_dataset(f"hf://datasets/{repo}/test")) == 4
    assert len(datasets.open_eval_data(f"hf://datasets/{repo}")) == 4
    downloads = sum("GET" in line and ".parquet" in line for line in dataset_hub.log)
    assert len(datasets.open_splits(f"hf://datasets/{repo}", 0.25).train) == 9
    assert downloads == sum("GET" in line and ".parquet" in line for line in dataset_hub.log)


def test_a_data_set_in_the_cache_needs_no_hub(
    dataset_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    datasets.open_splits("hf://datasets/me/pets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(datasets.open_splits("hf://datasets/me/pets").train) == 12
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        datasets.open_splits("hf://datasets/me/other")


def test_a_part_of_a_data_set_in_the_cache_is_not_all_of_it(
    dataset_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_hub_download

    files = dataset_hub.repositories["datasets/me/pets"]
    content = files["data/train-00000-of-00001.parquet"]
    names = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    dataset_hub.repositories["datasets/me/two"] = dict.fromkeys(names, content)
    hf_hub_download("me/two", names[0], repo_type="dataset")
    hf_hub_download("me/empty", "README.md", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("two", "empty"):
        with pytest.raises(HubError, match="not in the cache, and HF_HUB_OFFLINE is set"):
            datasets.open_splits(f"hf://datasets/me/{name}")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("hf://datasets/me/none", HubError, "no such repository"),
        ("hf://datasets/me/pets@v9", HubError, "no such repository or revision"),
        ("hf://datasets/me/pets/trian", UsageError, "did you mean train"),
        ("hf://datasets/me/empty", UsageError, "holds no Parquet files"),
        ("hf://models/me/pets", UsageError, "names no tar or Parquet files"),
    ],
)
def test_what_the_hub_does_not_have(
    dataset_hub: Hub, data: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as found:
        datasets.open_splits(data)
    assert "\n" not in str(found.value)


def test_a_gated_data_set_has_a_remedy(dataset_hub: Hub) -> None:
    datasets.open_splits("hf://datasets/me/pets")
    dataset_hub.gated = True
    os.environ.pop("HF_TOKEN", None)
    with pytest.raises(HubError, match="HF_TOKEN"):
        datasets.open_dataset("hf://datasets/me/pets/test")
